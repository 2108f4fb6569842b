"""Chapter 4 - The objective: mask tokens, predict them, compare (sections 3.1 to 3.5).

One task is drawn for each update. t2i masks image tokens and shows the caption, i2t masks text tokens and shows the
image, it2it masks some of both. The loss is the cross entropy at the masked positions, and only there (eq. 1-3). Three
terms join it in eq. 6, total_loss():

  length   the length of the caption (section 3.2)
  unroll   UnrollMask (section 3.3): the model's own predictions replace the masked tokens, fewer positions are masked
           again, and the ORIGINAL tokens are predicted there. Decoding has such inputs: most visible tokens are earlier
           predictions, and some are wrong, while in the main pass every visible token is true.
  mixsel   MixSel (section 3.4): two images, or two captions, are joined as the context, and a selector token says which
           of them the target belongs to. A model that ignores the context, or uses the wrong one, has a high loss.

How to read: losses() is the whole method, one pass through the model for each term. What scale needs (parts of a batch,
torch.compile, freeing one pass's memory before the next) wraps it from outside: see training/update.py.

A batch is a dict of tensors: image_tokens (B, N), text_tokens (B, T), text_lengths (B,) and, for MixSel, the tokens of
the whole image squeezed to half its width, tall_tokens (B, N/2) on G x G/2, and to half its height, wide_tokens
(B, N/2) on G/2 x G. Randomness comes from `rng` (see rng.py); the words of its purposes are part of the seed.

Shapes: B batch, N image positions on G x G, T text positions of this batch, V vocabulary. Read on in decoding.py.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomagvlt.masking import bottom_k_mask, gamma, num_masked, sample
from nanomagvlt.rng import Rng
from nanomagvlt.sequence import KIND, SEPARATOR, TASKS, Sequence, Task, Vocabulary, build, build_for_length, valid_mask

Batch = dict[str, Tensor]
Masks = dict[str, Tensor]    # for each generated piece, True (B, N) where its tokens are masked
Terms = dict[str, Tensor]

SCHEDULE = {"image": "cosine", "text": "linear"}  # gamma in training (section 3.1)
MAIN = "mask"                # the term by which validations are compared


def total_loss(cfg, mask: Tensor | float = 0.0, length: Tensor | float = 0.0, unroll: Tensor | float = 0.0,
               mixsel: Tensor | float = 0.0) -> Tensor:
    """The loss of one update. A term that the task does not have (see TASKS) is 0."""
    return (mask                              # L_mask                              eq. 6
            + cfg.length_weight * length      # + lambda_TL L_TL, not in T2I
            + cfg.unroll_weight * unroll      # + lambda_UM L_UM, not in IT2IT
            + cfg.mixsel_weight * mixsel)     # + lambda_MS L_MS


def losses(model, task: str, batch: Batch, rng: Rng, run: Callable | None = None) -> tuple[Tensor, Terms]:
    """The loss of one batch of one task, and its terms by name, without their weights.

    `run` is run_pass(), or a wrapper that also does the backward pass of each term (see training/update.py).
    """
    cfg, record, run = model.cfg, TASKS[task], run or run_pass
    shown = drop_captions(record, batch, rng, cfg) if cfg.condition_dropout and model.training else batch
    masks = sample_masks(record, maskable(record, batch), rng, "main", cfg)
    terms, logits = run(model, "mask", build(task, cfg, shown, masks), batch)
    predictions = {piece: sample(values, rng("unroll guesses", values.shape[1]))[0]                  # (B, N)
                   for piece, values in logits.items()}
    del logits  # they are large, and would stay in memory through the next passes
    if record.length_of and cfg.length_pass == "own":
        terms |= run(model, "length", build_for_length(task, cfg, batch, masks), batch)[0]
    if cfg.unroll_mask and record.unroll:
        again = remask(record, batch, masks, rng, cfg)
        filled = {f"{piece}_tokens": torch.where(masks[piece], predictions[piece], batch[f"{piece}_tokens"])
                  for piece in record.generates}
        terms |= run(model, "unroll", build(task, cfg, {**shown, **filled}, again), batch)[0]        # eq. 4
    if cfg.mixsel != "off":
        mixed, masks, selector = mix(task, batch, rng, cfg)
        selector = selector if cfg.mixsel == "select" else None  # "random" is MixRandom: nothing is selected
        terms |= run(model, "mixsel", build(task, cfg, mixed, masks, selector), mixed)[0]
    return total_loss(cfg, **terms), terms


# ---------------------------------------------------------------------------------------------- one pass

def run_pass(model, name: str, seq: Sequence, targets: Batch, score: Callable | None = None) -> tuple[Terms, Batch]:
    """One pass through the model: its terms of eq. 6 and, where UnrollMask needs them, its logits by piece.

    The pass "length" has no other term; with cfg.length_pass "main" the main pass has it, too. `score` is score_pass(),
    possibly compiled.
    """
    with autocast(model.cfg, seq.token_ids.device):
        if name == "length":
            return {"length": length_loss(model, model(seq), seq, targets)}, {}
        loss, length, logits = (score or score_pass)(model, seq, targets)
    terms = {name: loss}
    if name == "mask" and length is not None:
        terms["length"] = length
    return terms, logits


def score_pass(model, seq: Sequence, targets: Batch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """The loss at the masked positions of a sequence, the loss of the length or None, and the logits by piece.

    The targets are the original tokens, whatever the sequence shows. it2it adds two means, over all masked image
    positions and over all masked text positions of the batch (eq. 3); the paper writes sums.
    """
    cfg, loss, logits = model.cfg, 0.0, {}
    states = model(seq)                                                                              # (B, L, D)
    for piece in seq.task.generates:
        where = seq.slices[piece]
        scored = model.logits(states[:, where], KIND[piece])                                         # (B, N, V)
        loss = loss + masked_cross_entropy(scored, targets[f"{piece}_tokens"], seq.is_masked[:, where],
                                           cfg.label_smoothing)                                      # eq. 1-3
        if seq.task.unroll and cfg.unroll_mask:
            logits[piece] = scored.detach()
    has_length = seq.task.length_of and cfg.length_pass == "main"
    return loss, length_loss(model, states, seq, targets) if has_length else None, logits


def autocast(cfg, device: torch.device) -> torch.autocast:
    """With cfg.precision "bf16" matrix products are in bfloat16; weights, residuals and losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def masked_cross_entropy(logits: Tensor, targets: Tensor, is_masked: Tensor, smoothing: float) -> Tensor:
    """The mean cross entropy over the masked positions of the batch: a scalar, 0 if none is masked.

    logits (B, N, V), targets (B, N) long, is_masked (B, N) bool. Label smoothing spreads `smoothing` of the target over
    the modality's own vocabulary. Visible positions are ignored, not removed, so that no shape depends on the mask.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.masked_fill(~is_masked, -100).flatten(),
                            ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    return total / is_masked.sum().clamp(min=1)


def length_loss(model, states: Tensor, seq: Sequence, targets: Batch) -> Tensor:
    """L_TL: the mean cross entropy of the texts' lengths, read at BOT from the states (B, L, D) (section 3.2)."""
    lengths = targets[f"{seq.task.length_of}_lengths"]
    total = F.cross_entropy(model.length_logits(states, seq).float(), lengths - 1, reduction="sum")
    return total / len(lengths)


# ---------------------------------------------------------------------------------------------- what is masked

def maskable(record: Task, batch: Batch) -> Masks:
    """True (B, N) at the positions of each generated piece that may be masked: all, except padding."""
    tokens = {piece: batch[f"{piece}_tokens"] for piece in record.generates}
    return {piece: torch.ones_like(values, dtype=torch.bool) if KIND[piece] == "image" else
            valid_mask(batch[f"{piece}_lengths"], values.shape[1]) for piece, values in tokens.items()}


def sample_masks(record: Task, maskable: Masks, rng: Rng, purpose: str, cfg,
                 image_rounding: Callable = torch.ceil) -> Masks:
    """Random masks for the generated pieces, (B, N) bool each, among the positions that may be masked.

    r ~ U[0, 1] is the progress of decoding (section 3.1): ceil(gamma(r) N) of the N positions, chosen uniformly, are
    masked, and at least 1. In it2it both pieces share one r. In the authors' code their mask ratios run in opposite
    directions: a fully masked image comes with a visible caption, and the reverse. With cfg.it2it_ratio "same" both
    ratios are high or both are low, as the paper's text has it.
    """
    r, masks = rng(f"{purpose} r"), {}                                                               # (B,)
    for piece, allowed in maskable.items():
        is_reversed = len(maskable) > 1 and KIND[piece] == "text" and cfg.it2it_ratio == "opposite"
        share = gamma(1 - r if is_reversed else r, SCHEDULE[KIND[piece]])                            # (B,)
        count = num_masked(share, allowed.sum(1), image_rounding if KIND[piece] == "image" else torch.ceil)
        masks[piece] = bottom_k_mask(rng(f"{purpose} {piece} places", allowed.shape[1]), count, allowed)
    return masks


def remask(record: Task, batch: Batch, masks: Masks, rng: Rng, cfg) -> Masks:
    """UnrollMask's second masks: floor(gamma(r') x the number masked before), at least 1, with a new r'.

    They are chosen uniformly among the positions masked before or, with cfg.unroll_text "all", among all positions of a
    text: decoding can mask any text token again. (Decoding chooses the least confident; eq. 4 leaves this open.)
    """
    (piece,), share = record.generates, rng("unroll r")
    count = num_masked(gamma(share, SCHEDULE[KIND[piece]]), masks[piece].sum(1), torch.floor)        # (B,)
    anywhere = KIND[piece] == "text" and cfg.unroll_text == "all"
    among = (maskable(record, batch) if anywhere else masks)[piece]                                  # (B, N)
    return {piece: bottom_k_mask(rng("unroll places", among.shape[1]), count, among)}


def drop_captions(record: Task, batch: Batch, rng: Rng, cfg) -> Batch:
    """The batch, with a share cfg.condition_dropout of the given texts empty: only their end token is left.

    Classifier-free guidance needs a model that has learnt this (see generate() in decoding.py).
    """
    drop, shown = rng("captions left out") < cfg.condition_dropout, dict(batch)                      # (B,)
    for piece in record.given:
        if KIND[piece] == "text":
            shown[f"{piece}_tokens"] = batch[f"{piece}_tokens"].masked_fill(drop[:, None], cfg.end_token)
            shown[f"{piece}_lengths"] = batch[f"{piece}_lengths"].masked_fill(drop, 1)
    return shown


# ---------------------------------------------------------------------------------------------- MixSel

def mix(task: str, batch: Batch, rng: Rng, cfg) -> tuple[Batch, Masks, Tensor]:
    """MixSel's batch (figure 5), its masks, and its selectors (B,), which are special tokens.

    Each sample's context is joined with that of another sample, in random order; the target stays its own.
      t2i    the two captions are joined as a || b; the own image is predicted      selector LEFT or RIGHT
      i2t    the two images, left|right or top|bottom; the own caption              LEFT, RIGHT, TOP or BOTTOM
      it2it  both are joined; the own half of the image and the own caption         LEFT, RIGHT, TOP or BOTTOM
    LEFT and TOP select the first. The direction, left|right or top|bottom, is drawn once for the batch. Only tokens of
    the own sample are masked and scored.
    """
    record, vocab = TASKS[task], Vocabulary(cfg)
    joined = record.given or record.generates            # it2it gives nothing: what it generates is joined
    own_first = rng("mix side") < 0.5                                                                # (B,)
    partner = partners(rng("mix partner"))                                                           # (B,)
    other = {name: tensor[partner] for name, tensor in batch.items()}
    first = {name: choose(own_first, tensor, other[name]) for name, tensor in batch.items()}
    second = {name: choose(own_first, other[name], tensor) for name, tensor in batch.items()}
    has_image = any(KIND[piece] == "image" for piece in joined)
    stacked = (rng("mix direction")[:1] < 0.5) & has_image                                           # (1,) top|bottom?

    mixed, allowed = dict(batch), maskable(record, batch)
    for piece in joined:
        if KIND[piece] == "image":
            mixed[f"{piece}_tokens"] = join_images(first, second, stacked)                           # (B, N)
            own = first_half(batch[f"{piece}_tokens"].shape[1], stacked) == own_first[:, None]       # (B, N)
        else:
            tokens, lengths, is_first, is_second = join_texts(first, second, piece, cfg)
            mixed |= {f"{piece}_tokens": tokens, f"{piece}_lengths": lengths}                        # (B, T'), (B,)
            own = choose(own_first, is_first, is_second)                                             # (B, T')
        if piece in allowed:
            allowed[piece] = own
    rounding = torch.ceil if record.given else torch.floor   # in it2it the authors' code rounds the image's share down
    left, right, top, bottom = (vocab.special(name) for name in ("LEFT", "RIGHT", "TOP", "BOTTOM"))
    selector = torch.where(own_first, torch.where(stacked, top, left), torch.where(stacked, bottom, right))  # (B,)
    return mixed, sample_masks(record, allowed, rng, "mix", cfg, rounding), selector


def partners(uniform: Tensor) -> Tensor:
    """Another row for each row, from uniform numbers (B,), B > 1: each takes its neighbour in a random ring."""
    ring = uniform.argsort()
    return ring.roll(1)[ring.argsort()]


def choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Row by row a where condition (B,) is True, else b."""
    return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)


def join_images(first: Batch, second: Batch, stacked: Tensor) -> Tensor:
    """Two squeezed images as one, (B, N): the tall ones side by side, or the wide ones stacked where stacked (1,)."""
    g = math.isqrt(2 * first["tall_tokens"].shape[1])
    side_by_side = torch.cat([half["tall_tokens"].unflatten(1, (g, g // 2)) for half in (first, second)], dim=2)
    one_above_other = torch.cat([first["wide_tokens"], second["wide_tokens"]], dim=1)                # (B, N)
    return torch.where(stacked[:, None], one_above_other, side_by_side.flatten(1))


def first_half(num_image: int, stacked: Tensor) -> Tensor:
    """True at the image positions of the left half, or of the top half where stacked (1,): (1, N)."""
    g = math.isqrt(num_image)
    position = torch.arange(num_image, device=stacked.device)
    return torch.where(stacked[:, None], position < num_image // 2, position % g < g // 2)


def join_texts(first: Batch, second: Batch, piece: str, cfg) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two texts as one, `a || b end`: tokens (B, T'), lengths (B,), and the masks of a and of b, (B, T') each.

    cfg.mixsel_separators separators replace a's end token; the end token belongs to neither. T' is what any two texts
    of the batch need, but at most cfg.text_length: the longer text is cut first, and neither below half of the room.
    """
    name, gap, end_token = f"{piece}_tokens", cfg.mixsel_separators, cfg.end_token
    t = min(cfg.text_length, 2 * (first[name].shape[1] - 1) + gap + 1)  # words, separators, words, end

    def num_words(text: Batch) -> Tensor:  # (B,): a text that was cut at T has no end token
        lengths = text[f"{piece}_lengths"]
        last = text[name].gather(1, lengths[:, None] - 1)[:, 0]
        return lengths - (last == end_token).long()
    len_a, len_b, room = num_words(first), num_words(second), t - gap - 1
    len_a = len_a.minimum((room - len_b).clamp(min=room // 2))
    len_b = len_b.minimum(room - len_a)

    position = torch.arange(t, device=len_a.device).expand(len(len_a), t)                            # (B, T')
    start_b = (len_a + gap)[:, None]                                                                 # (B, 1)
    end = start_b + len_b[:, None]                                                                   # (B, 1)
    is_first, is_second = position < len_a[:, None], (position >= start_b) & (position < end)
    words_a, words_b = (F.pad(text[name], (0, t - text[name].shape[1])) for text in (first, second))
    tokens = torch.where(is_first, words_a, SEPARATOR)
    tokens = torch.where(is_second, words_b.gather(1, (position - start_b).clamp(min=0)), tokens)
    tokens = torch.where(position >= end, end_token, tokens)
    return tokens, end[:, 0] + 1, is_first, is_second
