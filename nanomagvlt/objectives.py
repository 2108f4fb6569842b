"""Chapter 4 - The objective: hide, guess, compare (sections 3.1 to 3.5).

One task is drawn per update. t2i hides image tokens and shows the caption, i2t hides text tokens and shows the image,
it2it hides some of both. The loss is the cross entropy at the hidden places, and only there (eq. 1-3). Three terms
join it; eq. 6, total_loss(), adds them up:

  length   how long is the caption? (section 3.2)
  unroll   UnrollMask (section 3.3): the model's own guesses are put in, fewer places are hidden again, and the
           ORIGINAL tokens are asked for there. Decoding looks like that: most of what is visible then are earlier
           guesses, some of them wrong, while in the main pass all that is visible is true.
  mixsel   MixSel (section 3.4): two images, or two captions, are put side by side as the context, and a selector token
           says which of them is meant. A model that answers from habit, or looks at the wrong one, is found out.

Everything here is on tokens: no pixel, no string. The model is handed in, and so is the randomness, as
`uniform(purpose, *shape)`, which gives uniform numbers in [0, 1) of shape (B, *shape), always the same for a purpose
in one update: so that a sample's numbers can be made the same however a batch is split. (MixSel's partners and
direction, the means, and how many numbers T text places want are still those of the batch that is handed in.)

Shapes: B batch, N image places on G x G, V_I image and V_T text vocabulary, T text places of this batch: its longest
caption or a little more, at most cfg.text_length. Read on in decode.py.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.masking import gamma, bottom_k_mask, num_masked, sample

MAIN = "mask"  # the term that validation adds up over the tasks
Uniform = Callable[..., Tensor]

# image_tokens (B, N), text_tokens (B, T), text_lengths (B,); and for MixSel the tokens of the image squeezed to half
# its width, tall_tokens (B, N/2) on G x G/2, and to half its height, wide_tokens (B, N/2) on G/2 x G.
Batch = dict[str, Tensor]
Counts = dict[str, Tensor]  # see num_scored()


def total_loss(task: str, cfg, mask: Tensor | float = 0.0, length: Tensor | float = 0.0,
               unroll: Tensor | float = 0.0, mixsel: Tensor | float = 0.0) -> Tensor:
    """Eq. 6, of all terms or of those given: L is a sum, so its parts may be back-propagated one by one."""
    return (mask                                                  # L_mask
            + cfg.length_weight * length * (task != "t2i")        # + lambda_TL L_TL, not in T2I
            + cfg.unroll_weight * unroll * (task != "it2it")      # + lambda_UM L_UM, not in IT2IT
            + cfg.mixsel_weight * mixsel)                         # + lambda_MS L_MS


def loss_terms(model, task: str, batch: Batch, uniform: Uniform,
               counts: Counts | None = None, run: Callable | None = None) -> Iterator[dict[str, Tensor]]:
    """The terms of eq. 6 for one batch of one task, unweighted, pass after pass through the model.

    The terms of one pass are yielded at a time, so that the caller can back-propagate and free them before the next.
    If the batch is one part of an update's, `counts` holds num_scored(), added up over all parts: each term is then
    divided by the whole update's count, and the parts' terms add up to the update's mean. `run` is one_pass(), perhaps
    compiled.
    """
    cfg, with_captions, counts, run = model.cfg, batch, counts or {}, run or one_pass
    if task == "t2i" and cfg.condition_dropout and model.training:
        batch = drop_captions(batch, uniform, cfg)
    text_tokens, lengths = batch["text_tokens"], batch["text_lengths"]
    image_is_masked, text_is_masked = sample_masks(task, *maskable(task, batch), uniform, "main", cfg)

    seq = sequence.build(task, cfg, batch["image_tokens"], image_is_masked, text_tokens, text_is_masked, lengths)
    loss, logits, length_logits = run(model, task, seq, batch, counts.get("mask"))
    terms = {"mask": loss}
    if length_logits is not None:
        terms["length"] = length_loss(length_logits, lengths, counts.get("length"))
    yield terms
    if cfg.unroll_mask and task != "it2it":
        # No gradient flows through a guess: it is a number, drawn from the main pass's logits at temperature 1.
        guessed, _ = sample(logits, uniform("unroll guesses", logits.shape[1]))                      # (B, N) or (B, T)
    del terms, loss, logits, length_logits  # the logits are large, and would be held through the next pass

    if task != "t2i" and cfg.length_pass == "own":
        # In the main pass BOT does not see the text, but the image places do, and BOT sees those: from the second
        # block on it can read off how many text places there are, which is the answer. Decoding does not know it
        # yet. So here the text is what it is there: a fixed number of masked places.
        seq_length = sequence.build_for_length(cfg, batch["image_tokens"], image_is_masked)
        with bfloat16_if_wanted(cfg, seq_length):
            length_logits = model.length_logits(model(seq_length), seq_length.layout)                # (B, T)
        yield {"length": length_loss(length_logits, lengths, counts.get("length"))}
    if cfg.unroll_mask and task != "it2it":
        yield {"unroll": unroll_mask(model, task, batch, image_is_masked, text_is_masked, guessed, uniform,
                                     counts.get("unroll"), run)}
    if cfg.mixsel != "off":
        yield {"mixsel": mixsel(model, task, with_captions, uniform, counts.get("mixsel"), run)}


def num_scored(task: str, batch: Batch, uniform: Uniform, cfg) -> Counts:
    """The denominators of the means, which can be told without running the model.

    Of mask, unroll and mixsel: how many image places and text places are scored, (2,); of length: how many captions,
    (). Captions left out for guidance do not change them: t2i scores no text.
    """
    main = sample_masks(task, *maskable(task, batch), uniform, "main", cfg)
    scored = {"mask": main}
    if cfg.unroll_mask and task != "it2it":
        scored["unroll"] = remask(task, batch, *main, uniform, cfg)
    if cfg.mixsel != "off":
        scored["mixsel"] = mix(task, batch, uniform, cfg).hidden
    counts = {name: torch.stack([is_masked.sum() for is_masked in both]) for name, both in scored.items()}
    return counts | {"length": torch.full_like(counts["mask"][0], len(batch["text_lengths"]))}


# ---------------------------------------------------------------------------------------------- hide, guess, compare

def maskable(task: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the task may hide a token at all: in the image (B, N), and in the text (B, T), padding excepted."""
    return (torch.full_like(batch["image_tokens"], task != "i2t", dtype=torch.bool),
            sequence.valid_mask(batch["text_lengths"], batch["text_tokens"].shape[1]) & (task != "t2i"))


def sample_masks(task: str, image_maskable: Tensor, text_maskable: Tensor, uniform: Uniform, purpose: str, cfg,
         image_rounding: Callable = torch.ceil) -> tuple[Tensor, Tensor]:
    """Which tokens are hidden, of those that may be: image_is_masked (B, N) and text_is_masked (B, T), bool.

    r ~ U[0, 1] stands for a moment of decoding (section 3.1). In each hidden modality ceil(gamma(r) N) of the N places
    that may be, chosen uniformly, are masked: at least 1, if there are any. In it2it both come from one r. In the
    authors' code they run in opposite directions: a fully hidden image comes with a visible caption, and the reverse;
    cfg.it2it_ratio "same" hides much of both or little of both, as the paper has it.
    """
    r = uniform(f"{purpose} r")                                                                      # (B,)
    r_text = 1 - r if task == "it2it" and cfg.it2it_ratio == "opposite" else r
    num_image = num_masked(gamma(r, "cosine"), image_maskable.sum(1), image_rounding)                # (B,)
    num_text = num_masked(gamma(r_text, "linear"), text_maskable.sum(1))                             # (B,)
    return (bottom_k_mask(uniform(f"{purpose} image places", image_maskable.shape[1]), num_image, image_maskable),
            bottom_k_mask(uniform(f"{purpose} text places", text_maskable.shape[1]), num_text, text_maskable))


def drop_captions(batch: Batch, uniform: Uniform, cfg) -> Batch:
    """The batch, a share cfg.condition_dropout of its captions empty: the end token alone. What such an image looks
    like is what guidance goes away from (see draw_image() in decode.py)."""
    drop = uniform("captions left out") < cfg.condition_dropout                                      # (B,)
    return {**batch, "text_tokens": batch["text_tokens"].masked_fill(drop[:, None], cfg.end_token),
            "text_lengths": batch["text_lengths"].masked_fill(drop, 1)}


def one_pass(model, task: str, seq: sequence.Sequence, targets: Batch,
             counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads a sequence and scores it: loss, logits as score() gives them and, if cfg.length_pass is "main" and there is
    a text to be written, length logits (B, T). Compiled it is one graph, so nothing large comes out with a gradient."""
    with bfloat16_if_wanted(model.cfg, seq):
        states = model(seq)                                                                          # (B, L, D)
        loss, logits = score(model, task, states, seq, targets, counts)
        asks_length = model.cfg.length_pass == "main" and task != "t2i"
        return loss, logits.detach(), model.length_logits(states, seq.layout) if asks_length else None


def bfloat16_if_wanted(cfg, seq: sequence.Sequence) -> torch.autocast:
    """With cfg.precision "bf16" matrices are multiplied in bfloat16; weights, residuals and the loss stay float32."""
    return torch.autocast(seq.token_ids.device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def score(model, task: str, states: Tensor, seq: sequence.Sequence, targets: Batch,
          counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss at the masked places of a pass, and the logits of what is hidden (in it2it those of the text).

    The targets are the original tokens, whatever stood in the sequence. A modality that is only shown is not scored.
    it2it adds two means, one over all masked image places, one over all masked text places (eq. 3); the paper writes
    sums. counts (2,) are those numbers of places, if they are not this batch's own.
    """
    smoothing, loss, logits = model.cfg.label_smoothing, 0.0, None
    of_image, of_text = (None, None) if counts is None else counts
    if task != "i2t":
        logits, is_masked = model.image_logits(states, seq.layout), seq.is_masked[:, seq.layout.image]
        loss = loss + masked_cross_entropy(logits, targets["image_tokens"], is_masked, smoothing, of_image)   # eq. 2
    if task != "t2i":
        logits, is_masked = model.text_logits(states, seq.layout), seq.is_masked[:, seq.layout.text]
        loss = loss + masked_cross_entropy(logits, targets["text_tokens"], is_masked, smoothing, of_text)      # eq. 1
    return loss, logits


def masked_cross_entropy(logits: Tensor, targets: Tensor, is_masked: Tensor, smoothing: float,
                         count: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the masked places of the whole batch (eq. 1-3): a scalar, 0 where none is masked.

    logits (B, N, V), targets (B, N) long, is_masked (B, N) bool; count (), if given, is the number of places that the
    mean is over, in place of this batch's own. Label smoothing spreads `smoothing` of the target over the modality's
    own vocabulary. Visible places are ignored, not gathered out, so that no shape depends on the mask.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.masked_fill(~is_masked, -100).flatten(),
                            ignore_index=-100, label_smoothing=smoothing, reduction="sum")
    return total / (is_masked.sum() if count is None else count).clamp(min=1)


def length_loss(logits: Tensor, lengths: Tensor, count: Tensor | None = None) -> Tensor:
    """L_TL (section 3.2): the cross entropy of the captions' lengths (B,), class i of the logits (B, T) for length
    i + 1. A mean over count captions, if not over those of this batch."""
    total = F.cross_entropy(logits.float(), lengths - 1, reduction="sum")
    return total / (len(lengths) if count is None else count)


# ---------------------------------------------------------------------------------------------- UnrollMask

def unroll_mask(model, task: str, batch: Batch, image_is_masked: Tensor, text_is_masked: Tensor, guessed: Tensor,
                uniform: Uniform, counts: Tensor | None = None, run: Callable = one_pass) -> Tensor:
    """L_UM (section 3.3, figure 3; eq. 4): one step of decoding, played in training.

    guessed (B, N) in t2i, (B, T) in i2t: the main pass's guesses. They fill the places that were masked; some of these
    are masked again, at random (decoding takes the least confident); the originals are asked for there, and only
    there. Guesses that stay visible stay as they are, right or wrong: the model learns to go on from its own mistakes.
    """
    cfg, image_tokens, text_tokens = model.cfg, batch["image_tokens"], batch["text_tokens"]
    if task == "t2i":
        image_tokens = torch.where(image_is_masked, guessed, image_tokens)
    else:
        text_tokens = torch.where(text_is_masked, guessed, text_tokens)
    image_again, text_again = remask(task, batch, image_is_masked, text_is_masked, uniform, cfg)
    seq = sequence.build(task, cfg, image_tokens, image_again, text_tokens, text_again, batch["text_lengths"])
    return run(model, task, seq, batch, counts)[0]                                                   # eq. 4


def remask(task: str, batch: Batch, image_is_masked: Tensor, text_is_masked: Tensor, uniform: Uniform,
               cfg) -> tuple[Tensor, Tensor]:
    """Which tokens are masked again, (B, N) and (B, T) bool: with a fresh r', floor(gamma(r') x the number masked
    before), at least 1, of those that were or, for text as an option, of all: decoding may mask any word again."""
    was_masked, schedule = (image_is_masked, "cosine") if task == "t2i" else (text_is_masked, "linear")
    among = was_masked
    if task == "i2t" and cfg.unroll_text == "all":
        among = sequence.valid_mask(batch["text_lengths"], was_masked.shape[1])
    count = num_masked(gamma(uniform("unroll r"), schedule), was_masked.sum(1), torch.floor)         # (B,)
    again = bottom_k_mask(uniform("unroll places", was_masked.shape[1]), count, among)
    return (again, text_is_masked) if task == "t2i" else (image_is_masked, again)


# ---------------------------------------------------------------------------------------------- MixSel

def mixsel(model, task: str, batch: Batch, uniform: Uniform, counts: Tensor | None = None,
           run: Callable = one_pass) -> Tensor:
    """L_MS (section 3.4, figure 5): two contexts side by side; the selector, in BOG's place, says which is meant.

    cfg.mixsel "random" is the paper's control, MixRandom: the same mixes, and no word about which is meant.
    """
    cfg, mixed = model.cfg, mix(task, batch, uniform, model.cfg)
    seq = sequence.build(task, cfg, mixed.shown["image_tokens"], mixed.hidden[0], mixed.shown["text_tokens"],
                         mixed.hidden[1], mixed.shown["text_lengths"],
                         mixed.selector if cfg.mixsel == "select" else None)
    return run(model, task, seq, mixed.shown, counts)[0]


@dataclass
class Mix:
    """A batch of mixes: tokens and lengths, what is hidden of them, and which context is meant."""
    shown: Batch                    # what the model reads and, where it is hidden, the targets
    hidden: tuple[Tensor, Tensor]   # (B, N) and (B, T') bool
    selector: Tensor                # (B,) LEFT, RIGHT, TOP or BOTTOM


def mix(task: str, batch: Batch, uniform: Uniform, cfg) -> Mix:
    """Joins each sample's own context with that of a partner, another sample of the batch, in random order.

    Its own is the one that is meant: only tokens of its own are hidden and scored, the partner's stay visible.
      t2i    two captions, joined as a || b; the own image is drawn                 selector LEFT or RIGHT
      i2t    two images, left|right or top|bottom; the own caption is written       LEFT, RIGHT, TOP or BOTTOM
      it2it  both are joined; the own half of the image and the own caption         LEFT, RIGHT, TOP or BOTTOM
    LEFT and TOP say that the first is meant. The direction, left|right or top|bottom, is drawn once for all of them.
    """
    n = batch["image_tokens"].shape[1]
    own_first = uniform("mix side") < 0.5                                                            # (B,)
    partner = partners(uniform("mix partner"))                                                       # (B,)
    other = {name: tensor[partner] for name, tensor in batch.items()}
    first = {name: choose(own_first, tensor, other[name]) for name, tensor in batch.items()}
    second = {name: choose(own_first, other[name], tensor) for name, tensor in batch.items()}
    stacked = (uniform("mix direction")[:1] < 0.5) & (task != "t2i")                                 # (1,) top|bottom?

    shown = dict(batch)
    image_maskable, text_maskable = maskable(task, batch)                                            # (B, N), (B, T)
    if task != "t2i":
        shown["image_tokens"] = join_images(first, second, stacked)
    if task != "i2t":
        shown["text_tokens"], shown["text_lengths"], is_first, is_second = join_texts(first, second, cfg)
        text_maskable = choose(own_first, is_first, is_second) & (task == "it2it")                   # (B, T)
    if task == "it2it":
        image_maskable = first_half(n, stacked) == own_first[:, None]                                # (B, N)

    rounding = torch.floor if task == "it2it" else torch.ceil  # of the image alone: so the authors' code
    hidden = sample_masks(task, image_maskable, text_maskable, uniform, "mix", cfg, rounding)
    selector = torch.where(own_first, torch.where(stacked, sequence.TOP, sequence.LEFT),
                           torch.where(stacked, sequence.BOTTOM, sequence.RIGHT))                    # (B,)
    return Mix(shown, hidden, selector)


def partners(uniform: Tensor) -> Tensor:
    """Another row for each row, from uniform numbers (B,), B > 1: in a random ring, each takes its neighbour."""
    ring = uniform.argsort()
    return ring.roll(1)[ring.argsort()]


def choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Row by row a where condition (B,), else b."""
    return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)


def join_images(first: Batch, second: Batch, stacked: Tensor) -> Tensor:
    """Two squeezed images as one, (B, N): the tall ones side by side or, where stacked, the wide ones."""
    g = math.isqrt(2 * first["tall_tokens"].shape[1])
    side_by_side = torch.cat([half["tall_tokens"].unflatten(1, (g, g // 2)) for half in (first, second)], dim=2)
    one_above_other = torch.cat([first["wide_tokens"], second["wide_tokens"]], dim=1)                # (B, N)
    return torch.where(stacked[:, None], one_above_other, side_by_side.flatten(1))


def first_half(num_image: int, stacked: Tensor) -> Tensor:
    """True at the image places of the left half or, where stacked (1,), of the top half: (1, N)."""
    g = math.isqrt(num_image)
    place = torch.arange(num_image, device=stacked.device)
    return torch.where(stacked[:, None], place < num_image // 2, place % g < g // 2)


def join_texts(first: Batch, second: Batch, cfg) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two captions as one, `a || b end`: tokens (B, T'), lengths (B,), and where a is and where b is.

    cfg.mixsel_separators of them stand where a's end token stood. T' is what any two of the batch need, or
    cfg.text_length: if both do not fit, the longer is cut first, and none below half. The end token belongs to neither.
    """
    gap, end_token = cfg.mixsel_separators, cfg.end_token
    t = min(cfg.text_length, 2 * (first["text_tokens"].shape[1] - 1) + gap + 1)  # words, separators, words, end

    def num_words(c: Batch) -> Tensor:  # a caption that was cut at T has no end token to leave out
        last = c["text_tokens"].gather(1, c["text_lengths"][:, None] - 1)[:, 0]
        return c["text_lengths"] - (last == end_token).long()
    len_a, len_b = num_words(first), num_words(second)                                               # (B,) each
    room = t - gap - 1                                                                               # for both
    len_a = len_a.minimum((room - len_b).clamp(min=room // 2))
    len_b = len_b.minimum(room - len_a)

    place = torch.arange(t, device=len_a.device).expand(len(len_a), t)                               # (B, T')
    start_b = (len_a + gap)[:, None]
    end = start_b + len_b[:, None]                                                                   # (B, 1)
    is_first, is_second = place < len_a[:, None], (place >= start_b) & (place < end)
    words_a, words_b = (F.pad(side["text_tokens"], (0, t - side["text_tokens"].shape[1])) for side in (first, second))
    tokens = torch.where(is_first, words_a, sequence.SEPARATOR)
    tokens = torch.where(is_second, words_b.gather(1, (place - start_b).clamp(min=0)), tokens)
    tokens = torch.where(place >= end, end_token, tokens)
    return tokens, end[:, 0] + 1, is_first, is_second
