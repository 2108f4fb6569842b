"""Chapter 4 - The objective: mask tokens, predict them, compare (sections 3.1 to 3.5).

One task is drawn for each update. t2i masks image tokens and shows the caption, i2t masks text tokens and shows the
image, it2it masks some of both. The loss is the cross entropy at the masked positions, and only there (eq. 1-3). Three
terms join it in eq. 6, total_loss():

  length   the length of the caption (section 3.2)
  unroll   UnrollMask (section 3.3): tokens that are sampled from the model's predictions replace the masked tokens,
           fewer positions are masked again, and the ORIGINAL tokens are predicted there. Decoding has such inputs: most
           visible tokens are earlier predictions, and some are wrong. In the main pass every visible token is true.
  mixsel   MixSel (section 3.4): two images, or two captions, are joined as the context, and a selector token says which
           of them the target belongs to. A model that ignores the context, or uses the wrong one, has a high loss.

How to read: losses() is the whole method, a few passes through the model. The code for large runs (parts of a
batch, torch.compile, freeing one pass's memory before the next) is outside, in training/update.py.

A batch is a dict of tensors: image_tokens (B, G G), text_tokens (B, T), text_lengths (B,), and for MixSel those of the
partner and of the joined picture (see make_batch() in data/cache.py).
Randomness comes from `rng` (see rng.py); each of its purposes gives its own numbers.

Shapes: B batch, N positions of a piece (G x G for an image, T for a text, padded to about the longest of the batch), V
vocabulary of the piece. Read on in decoding.py.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomagvlt.masking import bottom_k_mask, gamma, num_masked, sample
from nanomagvlt.rng import Rng
from nanomagvlt.sequence import (KIND, SEPARATOR, TASKS, Sequence, Vocabulary, build, build_for_length, empty_texts,
                                 not_padding)

Batch = dict[str, Tensor]
Logits = dict[str, Tensor]   # for each generated piece, (B, N, V)
Masks = dict[str, Tensor]    # for each generated piece, True (B, N) where its tokens are masked
Terms = dict[str, Tensor]    # for each term of eq. 6, a scalar

SCHEDULE = {"image": "cosine", "text": "linear"}  # gamma in training (section 3.1)
MAIN_TERM = "mask"           # validations are compared by it
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products, by cfg.precision


def total_loss(cfg, mask: Tensor | float = 0.0, length: Tensor | float = 0.0, unroll: Tensor | float = 0.0,
               mixsel: Tensor | float = 0.0) -> Tensor:
    """The loss: the sum of all terms, or of those of one pass. A term that a task or cfg does not have is 0."""
    return (mask                              # L_mask                              eq. 6
            + cfg.length_weight * length      # + lambda_TL L_TL, not in T2I
            + cfg.unroll_weight * unroll      # + lambda_UM L_UM, not in IT2IT
            + cfg.mixsel_weight * mixsel)     # + lambda_MS L_MS


def losses(model, task: str, batch: Batch, rng: Rng, run: Callable | None = None) -> tuple[Tensor, Terms]:
    """The loss of a batch in one task, and its terms by name, without their weights.

    `run` replaces run_pass(). Training passes one that also runs backward, so the returned loss has no graph.
    """
    cfg, record, run = model.cfg, TASKS[task], run or run_pass
    shown = drop_captions(task, batch, rng, cfg) if model.training else batch
    masks = sample_masks(maskable(task, batch), rng, "main", cfg)
    terms, logits = run(model, "mask", build(task, cfg, shown, masks), batch)                        # eq. 1-3
    guesses = {piece: sample(values.float() / cfg.unroll_temperature, rng("unroll guesses", values.shape[1]),
                             cfg.unroll_top_k) for piece, values in logits.items()}                  # (B, N), (B, N)
    del logits  # they are large, and would stay in memory through the next passes

    if record.length_of and cfg.length_pass == "own":                                                # section 3.2
        few, few_masks = ({name: x[:cfg.length_rows or None] for name, x in of.items()} for of in (batch, masks))
        terms |= run(model, "length", build_for_length(task, cfg, few, few_masks), few)[0]

    if cfg.unroll_mask and record.unroll:                                                            # figure 3
        ((piece, (guess, p)),) = guesses.items()
        unrolled = {f"{piece}_tokens": torch.where(masks[piece], guess, batch[f"{piece}_tokens"])}   # (B, N)
        second_masks = remask(task, batch, masks, p, rng, cfg)
        terms |= run(model, "unroll", build(task, cfg, {**shown, **unrolled}, second_masks), batch)[0]   # eq. 4

    if cfg.mixsel != "off":                                                                          # figure 5
        mixed, mixed_masks, selector = mix(task, batch, rng, cfg)
        terms |= run(model, "mixsel", build(task, cfg, mixed, mixed_masks, selector), mixed)[0]      # eq. 5
    return total_loss(cfg, **terms), terms


# ---------------------------------------------------------------------------------------------- one pass

def run_pass(model, name: str, seq: Sequence, targets: Batch, score: Callable | None = None) -> tuple[Terms, Logits]:
    """One pass through the model: its terms, and the logits (B, N, V) by piece, if UnrollMask is used.

    `name` names its term. Pass "length" has only the length; with cfg.length_pass "main", "mask" has it too.
    `score` replaces score_pass(), to compile it.
    """
    with autocast(model.cfg, seq.token_ids.device):
        if name == "length":
            return {"length": length_loss(model, model(seq), seq, targets)}, {}
        loss, length, logits = (score or score_pass)(model, seq, targets)
    if name == "mask" and length is not None:
        return {"mask": loss, "length": length}, logits
    return {name: loss}, logits


def score_pass(model, seq: Sequence, targets: Batch) -> tuple[Tensor, Tensor | None, Logits]:
    """The loss at the masked positions of a sequence, the loss of the length or None, and the logits by piece.

    The targets are the original tokens, whatever the sequence shows. it2it adds the losses of both pieces (eq. 3).
    """
    cfg, loss, logits = model.cfg, 0.0, {}
    states = model(seq)                                                                              # (B, L, D)
    for piece in seq.task.generates:
        where = seq.slices[piece]
        values = model.logits(states[:, where], KIND[piece])                                         # (B, N, V)
        loss = loss + masked_cross_entropy(values, targets[f"{piece}_tokens"], seq.is_masked[:, where],
                                           cfg.label_smoothing)
        if seq.task.unroll and cfg.unroll_mask:
            logits[piece] = values.detach()
    has_length = seq.task.length_of and cfg.length_pass == "main"
    return loss, length_loss(model, states, seq, targets) if has_length else None, logits


def autocast(cfg, device: torch.device) -> torch.autocast:
    """With cfg.precision "bf16" or "fp16" matrix products are in it; weights, residuals and losses stay in float32."""
    return torch.autocast(device.type, DTYPE[cfg.precision], enabled=cfg.precision != "fp32")


def masked_cross_entropy(logits: Tensor, targets: Tensor, is_masked: Tensor, smoothing: float) -> Tensor:
    """The mean cross entropy over the masked positions of the batch, 0 if none is masked (eq. 1-3, which have sums).

    logits (B, N, V), targets (B, N) long, is_masked (B, N) bool. Label smoothing spreads `smoothing` of the target over
    the vocabulary of the piece. Visible positions are ignored, not removed, so that no shape depends on the mask.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.masked_fill(~is_masked, -100).flatten(),
                            ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    return total / is_masked.sum().clamp(min=1)


def length_loss(model, states: Tensor, seq: Sequence, targets: Batch) -> Tensor:
    """L_TL: the mean cross entropy of the texts' lengths, predicted at BOT, from states (B, L, D) (section 3.2)."""
    return F.cross_entropy(model.length_logits(states, seq).float(), targets[f"{seq.task.length_of}_lengths"] - 1)


# ---------------------------------------------------------------------------------------------- what is masked

def maskable(task: str, batch: Batch) -> Masks:
    """True (B, N) at the positions of each generated piece that may be masked: all, except padding."""
    return {piece: not_padding(batch, piece) for piece in TASKS[task].generates}


def sample_masks(allowed: Masks, rng: Rng, purpose: str, cfg, round_image_up: bool = True) -> Masks:
    """Random masks for the generated pieces, (B, N) bool each, among the positions that are allowed.

    r ~ U[0, 1] is the progress of decoding (section 3.1): ceil(gamma(r) N) of the N allowed positions, chosen
    uniformly, are masked. In it2it both pieces share r. By default the text then uses 1 - r, as in the authors' code:
    the more of the image is masked, the less of the text. With cfg.it2it_ratio "same" both use r.
    """
    masks = {}
    r = rng(f"{purpose} r")                                                                          # (B,)
    for piece, may_mask in allowed.items():
        kind = KIND[piece]
        is_opposite = len(allowed) > 1 and kind == "text" and cfg.it2it_ratio == "opposite"
        share = gamma(1 - r if is_opposite else r, SCHEDULE[kind])                                   # (B,)
        count = num_masked(share, may_mask.sum(1), round_up=kind == "text" or round_image_up)        # (B,)
        masks[piece] = bottom_k_mask(rng(f"{purpose} {piece} places", may_mask.shape[1]), count, may_mask)
    return masks


def remask(task: str, batch: Batch, masks: Masks, p: Tensor, rng: Rng, cfg) -> Masks:
    """UnrollMask's second masks, M^(k+1) of eq. 4, among the positions masked before (with cfg.unroll_text "all": among
    all positions of a text, as in decoding). p (B, N) are the probabilities of the guesses. Eq. 4 leaves open which:

      fresh      floor(gamma(r') x the number masked before), with a new r', at random (figure 3)
      next       as many as decoding leaves masked one of its K steps later, ceil(gamma(r + 1/K) N), at random
      confident  as many as next, where p is lowest, as decoding does. It costs drawings least in the small world (exact
                 at equal updates 0.79, next 0.75, fresh 0.63, without UnrollMask 0.82; data/results/unroll.md)
    """
    (piece,) = TASKS[task].generates
    before, allowed, kind = masks[piece].sum(1), maskable(task, batch)[piece], KIND[piece]           # (B,), (B, N)
    if cfg.unroll_step == "fresh":
        count = num_masked(gamma(rng("unroll r"), SCHEDULE[kind]), before, round_up=False)           # (B,)
    else:
        r = rng("main r") + 1 / (cfg.image_steps if kind == "image" else cfg.text_steps)             # (B,)
        count = num_masked(gamma(r.clamp(max=1), SCHEDULE[kind]), allowed.sum(1)).minimum(before)    # (B,)
    allowed = allowed if kind == "text" and cfg.unroll_text == "all" else masks[piece]
    scores = p if cfg.unroll_step == "confident" else rng("unroll places", p.shape[1])               # (B, N)
    return {piece: bottom_k_mask(scores, count, allowed)}


def drop_captions(task: str, batch: Batch, rng: Rng, cfg) -> Batch:
    """The batch, with a share cfg.condition_dropout of the given texts empty, for classifier-free guidance."""
    if not cfg.condition_dropout:
        return batch
    return empty_texts(task, batch, rng("captions left out") < cfg.condition_dropout, cfg.end_token)


# ---------------------------------------------------------------------------------------------- MixSel

def mix(task: str, batch: Batch, rng: Rng, cfg) -> tuple[Batch, Masks, Tensor]:
    """MixSel's batch (figure 5), its masks, and its selectors (B,), which are special tokens.

    Each sample's context is joined with its partner's. The target belongs to its own part:
      t2i    the two captions are joined as a || b; the own image is predicted      selector LEFT or RIGHT
      i2t    the two images, left|right or top|bottom; the own caption              LEFT, RIGHT, TOP or BOTTOM
      it2it  both are joined; the own half of the image and the own caption         LEFT, RIGHT, TOP or BOTTOM
    LEFT and TOP select the first. With cfg.mixsel "random", MixRandom (appendix E), the selector selects at random.
    """
    joined = TASKS[task].given or TASKS[task].generates  # it2it has no given piece: it joins what it generates
    is_own_first, own = batch["is_first"], torch.arange(len(batch["is_first"]), device=batch["is_first"].device)  # (B,)
    is_stacked = batch["is_stacked"] & any(KIND[piece] == "image" for piece in joined)               # (B,) top|bottom?

    mixed, allowed = dict(batch), maskable(task, batch)
    for piece in joined:
        if KIND[piece] == "image":
            mixed[f"{piece}_tokens"] = batch[f"joined_{piece}_tokens"]                               # (B, G G)
            is_own = first_half(batch[f"{piece}_tokens"].shape[1], is_stacked) == is_own_first[:, None]  # (B, G G)
        else:
            both = {name: torch.stack([batch[name], batch[f"other_{name}"]])                         # (2, B, T), (2, B)
                    for name in (f"{piece}_tokens", f"{piece}_lengths")}
            first, second = ({name: x[(is_own_first == is_other).long(), own] for name, x in both.items()}
                             for is_other in (False, True))
            tokens, lengths, is_first, is_second = join_texts(first, second, piece, cfg)
            mixed |= {f"{piece}_tokens": tokens, f"{piece}_lengths": lengths}                        # (B, T'), (B,)
            is_own = torch.where(is_own_first[:, None], is_first, is_second)                         # (B, T')
        if piece in allowed:
            allowed[piece] = is_own
    # In it2it the authors' code rounds the number of masked image tokens down.
    masks = sample_masks(allowed, rng, "mix", cfg, round_image_up=bool(TASKS[task].given))
    left, right, top, bottom = (Vocabulary(cfg).special(name) for name in ("LEFT", "RIGHT", "TOP", "BOTTOM"))
    selects_first = rng("mix selector") < 0.5 if cfg.mixsel == "random" else is_own_first            # (B,)
    selector = torch.where(selects_first, torch.where(is_stacked, top, left),
                           torch.where(is_stacked, bottom, right))                                   # (B,)
    return mixed, masks, selector


def first_half(num_image: int, is_stacked: Tensor) -> Tensor:
    """True at the image positions of the left half, or of the top half if is_stacked (B,): (B, G G)."""
    g = math.isqrt(num_image)
    position = torch.arange(num_image, device=is_stacked.device)                                     # (G G,)
    return torch.where(is_stacked[:, None], position < num_image // 2, position % g < g // 2)


def join_texts(first: Batch, second: Batch, piece: str, cfg) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two texts as one, `a || b end`: tokens (B, T'), lengths (B,), and the masks of a and of b, (B, T') each.

    cfg.mixsel_separators separators replace a's end token; the end token belongs to neither. T' is enough for any two
    texts of the batch, but at most cfg.text_length. If not all fits, a text over half of it is cut, as far as needed.
    """
    name, gap = f"{piece}_tokens", cfg.mixsel_separators
    t = min(cfg.text_length, 2 * (first[name].shape[1] - 1) + gap + 1)  # a, separators, b, end token

    def num_words(text: Batch) -> Tensor:
        """The tokens of each text without its end token, which a text that was cut at T does not have: (B,)."""
        lengths = text[f"{piece}_lengths"]                                                           # (B,)
        last = text[name].gather(1, lengths[:, None] - 1)[:, 0]                                      # (B,)
        return lengths - (last == cfg.end_token).long()
    room = t - gap - 1                                                  # for a and b together
    len_a, len_b = num_words(first), num_words(second)                                               # (B,) each
    len_a = len_a.minimum((room - len_b).clamp(min=room // 2))
    len_b = len_b.minimum(room - len_a)

    position = torch.arange(t, device=len_a.device).expand(len(len_a), t)                            # (B, T')
    start_b = (len_a + gap)[:, None]                                                                 # (B, 1)
    end = start_b + len_b[:, None]                                                                   # (B, 1)
    is_first, is_second = position < len_a[:, None], (position >= start_b) & (position < end)        # (B, T') each
    words_a, words_b = (F.pad(text[name], (0, t - text[name].shape[1])) for text in (first, second))
    tokens = torch.where(is_first, words_a, SEPARATOR)                                               # (B, T')
    tokens = torch.where(is_second, words_b.gather(1, (position - start_b).clamp(min=0)), tokens)
    tokens = torch.where(position >= end, cfg.end_token, tokens)
    return tokens, end[:, 0] + 1, is_first, is_second
