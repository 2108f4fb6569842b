"""Chapter 4 - The objective: hide, guess, compare (sections 3.1, 3.2 and 3.5).

One task is drawn per update. t2i hides image tokens and shows the caption, i2t hides text tokens and shows the image,
it2it hides some of both. The loss is the cross entropy at the hidden places, and only there (eq. 1-3), plus that of
the caption's length (section 3.2); eq. 6 adds them up.

Everything here is on tokens: no pixel, no string. The model is handed in, and so is the randomness, as
`draw(purpose, *shape)`, which gives uniform numbers in [0, 1) of shape (B, *shape), always the same for a purpose in
one update: so that the numbers can be made independent of how a batch is split.

Shapes: B batch, N image places, T text places, V vocabulary. Read on in decode.py.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.masking import gamma, lowest, num_masked

Draw = Callable[..., Tensor]


def hide(task: str, num_image: int, text_lengths: Tensor, num_text: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Which tokens are hidden: image_is_masked (B, N) and text_is_masked (B, T), bool.

    r ~ U[0, 1] stands for a moment of decoding (section 3.1). In each hidden modality ceil(gamma(r) N) places, chosen
    uniformly, are masked: at least 1, never a padding or special place. In it2it both come from one r, in opposite
    directions, as in the authors' code: a fully hidden image comes with a visible caption, and the reverse.
    """
    r = draw("r")                                                                                    # (B,)
    image_share = gamma(r, "cosine") if task != "i2t" else torch.zeros_like(r)
    text_share = {"t2i": torch.zeros_like(r), "i2t": gamma(r, "linear"), "it2it": gamma(1 - r, "linear")}[task]

    image_may_hide = torch.full((len(r), num_image), task != "i2t", device=r.device)                 # (B, N)
    text_may_hide = sequence.real_places(text_lengths, num_text) & (task != "t2i")                   # (B, T)
    image_is_masked = lowest(draw("image places", num_image), num_masked(image_share, num_image), image_may_hide)
    text_is_masked = lowest(draw("text places", num_text), num_masked(text_share, text_lengths), text_may_hide)
    return image_is_masked, text_is_masked


def masked_cross_entropy(logits: Tensor, targets: Tensor, is_masked: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy over the masked places of the whole batch (eq. 1-3): a scalar.

    logits (B, N, V), targets (B, N) long, is_masked (B, N) bool with at least one True. Label smoothing spreads
    `smoothing` of the target over the modality's own vocabulary. Visible places are ignored, not gathered out, so that
    no shape depends on the mask.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~is_masked, -100).flatten(),
                           ignore_index=-100, label_smoothing=smoothing)


def loss_terms(model, task: str, batch: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
    """The terms of eq. 6 for one batch of one task, unweighted: "mask" and, except in t2i, "length".

    batch: image_tokens (B, N), text_tokens (B, T), text_lengths (B,).
    """
    cfg = model.cfg
    image_tokens, text_tokens, lengths = batch["image_tokens"], batch["text_tokens"], batch["text_lengths"]
    image_is_masked, text_is_masked = hide(task, image_tokens.shape[1], lengths, text_tokens.shape[1], draw)
    seq = sequence.build(task, cfg, image_tokens, image_is_masked, text_tokens, text_is_masked, lengths)
    states = model(seq)                                                                              # (B, L, D)

    mask_loss = torch.zeros((), device=states.device)
    if task != "i2t":
        mask_loss = mask_loss + masked_cross_entropy(model.image_logits(states, seq.layout), image_tokens,
                                                     image_is_masked, cfg.label_smoothing)           # eq. 2
    if task != "t2i":
        mask_loss = mask_loss + masked_cross_entropy(model.text_logits(states, seq.layout), text_tokens,
                                                     text_is_masked, cfg.label_smoothing)            # eq. 1
    terms = {"mask": mask_loss}                                                 # eq. 3, in it2it: both means added
    if task != "t2i":
        if cfg.length_pass == "own":
            seq = sequence.build_for_length(task, cfg, image_tokens, image_is_masked)
            states = model(seq)
        terms["length"] = F.cross_entropy(model.length_logits(states, seq.layout), lengths - 1)     # section 3.2
    return terms


def total_loss(terms: dict[str, Tensor], length_weight: float) -> Tensor:
    """Eq. 6: the terms, each with its weight; a term that a task does not have is not there."""
    weights = {"mask": 1.0, "length": length_weight}
    return sum(weights[name] * term for name, term in terms.items())
