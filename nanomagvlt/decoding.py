"""Chapter 5 - Decoding: from all hidden to all known, in a few steps (section 3.2, figure 2).

There is one loop, decode(). It knows no model and no task: it is given canvases (tokens, some of them to be filled) and
a function that guesses what may stand in them. Every step guesses all hidden tokens at once, then hides the least
confident again, fewer and fewer. Images and texts differ in a SamplingConfig, no more: an image token that was once kept is
never hidden again, a text token may be.

The tasks are thin, each another canvas:
  draw_image    text given, image to be filled: all of it, or a region (inpainting), or a random share (variations)
  write_text    image given, text to be filled: all of it, its length guessed first, or some words (infilling)
  draw_pair     both to be filled, from nothing or from a part of each (appendix D)
They want a model in eval() mode.

Shapes: B batch, N places, K decoding steps, V vocabulary, T text places. Read on in vqgan.py.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.rng import random_rows
from nanomagvlt.masking import decoding_counts, halton_rank, bottom_k_mask, order_scores, sample


@dataclass(frozen=True)
class SamplingConfig:
    """How one modality is decoded."""
    steps: int                        # K
    schedule: str                     # gamma: one of masking.SCHEDULES
    order: str                        # which places are kept first: one of masking.ORDERS
    can_remask: bool                  # may a token that was revealed be hidden again?
    temperature: tuple[float, float]  # of the sampled tokens, at the first step and at the last; > 0
    noise: tuple[float, float]        # order "gumbel": scale, from the first step to the last; < 0 draws whom to hide
    top_k: int                        # sample among this many likeliest tokens; 0: among all
    floor: float                      # confidence is log max(p, floor), p after temperature and top-k
    rows: int                         # rows of the grid on which the places stand; 1 for a text


@dataclass(frozen=True)
class Step:
    """One step of decoding, for looking at: what was hidden, what was put there, and how surely."""
    is_masked: Tensor   # (B, N) bool, before the step
    tokens: Tensor      # (B, N) after the step
    confidence: Tensor  # (B, N) log p of each token when it was last sampled; 0 where it was given


@dataclass
class DecodeState:
    """One modality on its way from hidden to known. Places that are not to be filled are never touched."""
    tokens: Tensor      # (B, N) long; what stands where it is to be filled does not matter
    to_fill: Tensor     # (B, N) bool
    recipe: SamplingConfig
    is_masked: Tensor = field(init=False)    # (B, N) bool: hidden now
    confidence: Tensor = field(init=False)   # (B, N) log p of each token when it was last sampled
    counts: Tensor = field(init=False)       # (N + 1, K) how many are masked before each step, if 0..N are to be filled
    halton: Tensor = field(init=False)       # (N,) the places' rank in the Halton sequence
    trace: list[Step] = field(init=False)

    def begin(self) -> None:
        """All that is to be filled is hidden. What steps need is worked out here, on the CPU, so that none waits."""
        n, recipe, device = self.tokens.shape[1], self.recipe, self.tokens.device
        self.is_masked, self.trace = self.to_fill, []
        self.confidence = torch.zeros(self.tokens.shape, device=device)
        self.counts = decoding_counts(torch.arange(n + 1), recipe.steps, recipe.schedule, recipe.can_remask).to(device)
        self.halton = halton_rank(recipe.rows, n // recipe.rows).to(device)


def image_recipe(cfg) -> SamplingConfig:
    """The released code's image settings, its floor included, with the numbers of cfg."""
    return SamplingConfig(steps=cfg.image_steps, schedule=cfg.image_schedule, order=cfg.image_order, can_remask=False,
                  temperature=cfg.image_temperature, noise=cfg.image_noise, top_k=cfg.image_top_k, floor=2.0 ** -10,
                  rows=cfg.grid)


def text_recipe(cfg) -> SamplingConfig:
    """The released code's text settings, with the numbers of cfg. In its order, "gumbel", the places to be hidden are
    drawn from softmax(-log p)."""
    return SamplingConfig(steps=cfg.text_steps, schedule=cfg.text_schedule, order=cfg.text_order, can_remask=True,
                  temperature=(cfg.text_temperature,) * 2, noise=(-1.0, -1.0), top_k=cfg.text_top_k,
                  floor=torch.finfo(torch.float32).tiny, rows=1)


@torch.no_grad()
def decode(guess: Callable[[], list[Tensor]], canvases: list[DecodeState], generator: torch.Generator) -> None:
    """Fills the canvases in K steps, the same K for all of them.

    guess() -> logits (B, N, V) for each canvas, from its tokens and is_masked as they are then; that of draw_pair()
    changes a canvas before it looks, when the text's length changes. All randomness is drawn from the generator (a CPU
    one) beforehand, row after row, so the first row of a batch is the single sample of the same seed; or it is an
    iterator that gives each row a generator of its own (chance.random_rows).
    Raises ValueError where an image has fewer places to fill than there are steps, or canvases differ in steps.
    """
    batch, k_steps = len(canvases[0].tokens), canvases[0].recipe.steps
    for canvas in canvases:
        canvas.begin()
        fewest = canvas.to_fill.sum(1).min()
        if canvas.recipe.steps != k_steps:
            raise ValueError(f"canvases that are filled together want one number of steps, not {k_steps} and "
                             f"{canvas.recipe.steps}")
        if not canvas.recipe.can_remask and k_steps > fewest:
            raise ValueError(f"{k_steps} decoding steps, but only {fewest} tokens to reveal: take fewer steps")
    sizes = [k_steps * 2 * canvas.tokens.shape[1] for canvas in canvases]
    uniform = random_rows(generator, batch, sum(sizes)).to(canvases[0].tokens.device).split(sizes, dim=1)
    uniform = [numbers.view(batch, k_steps, 2, -1) for numbers in uniform]                           # (B, K, 2, N)
    for k in range(k_steps):
        for canvas, logits, numbers in zip(canvases, guess(), uniform):
            decode_step(canvas, logits, k, numbers[:, k])


def decode_step(canvas: DecodeState, logits: Tensor, k: int, uniform: Tensor) -> None:
    """Step k = 0 .. K-1 of one canvas: put guesses in, then hide some of them again. uniform (B, 2, N)."""
    recipe, last = canvas.recipe, canvas.recipe.steps - 1
    temperature, noise = (a + (b - a) * k / max(1, last) for a, b in (recipe.temperature, recipe.noise))
    sampled, p = sample(logits / temperature, uniform[:, 0], recipe.top_k)                           # (B, N) each
    canvas.tokens = torch.where(canvas.is_masked, sampled, canvas.tokens)
    canvas.confidence = torch.where(canvas.is_masked, p.clamp(min=recipe.floor).log(), canvas.confidence)
    canvas.trace.append(Step(canvas.is_masked, canvas.tokens, canvas.confidence))
    if k < last:
        scores = order_scores(recipe.order, canvas.confidence, noise, uniform[:, 1], canvas.halton)  # (B, N)
        count = canvas.counts[canvas.to_fill.sum(1), k + 1]                                          # (B,)
        canvas.is_masked = bottom_k_mask(scores, count, canvas.to_fill if recipe.can_remask else canvas.is_masked)


def blank_image(cfg, batch: int, device=None) -> tuple[Tensor, Tensor]:
    """Images of which nothing is known: tokens (B, N), and where to fill them (B, N)."""
    tokens = torch.zeros(batch, cfg.image_tokens, dtype=torch.long, device=device)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def blank_text(cfg, text_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of which nothing but their lengths (B,) is known: tokens (B, T), and where to fill them (B, T)."""
    to_fill = sequence.valid_mask(text_lengths, cfg.text_length)
    return torch.zeros_like(to_fill, dtype=torch.long), to_fill


def draw_image(model, text_tokens: Tensor, text_lengths: Tensor, generator: torch.Generator,
               canvas: DecodeState | None = None, guidance: float = 1.0) -> tuple[Tensor, list[Step]]:
    """Image tokens (B, N) for captions text_tokens (B, T) of text_lengths (B,), and every decoding step.

    A canvas with some places to fill makes only these anew, in view of the others; without one all are made.
    guidance w other than 1 is classifier-free guidance (Ho and Salimans, 2022): logits = null + w (given - null), null
    being those under the empty caption, the end token alone; both in one pass of 2 B rows.
    """
    cfg = model.cfg
    canvas = canvas or DecodeState(*blank_image(cfg, len(text_tokens), text_tokens.device), image_recipe(cfg))
    guided = guidance != 1
    if guided:
        text_tokens = torch.cat([text_tokens, torch.full_like(text_tokens, cfg.end_token)])          # (2 B, T)
        text_lengths = torch.cat([text_lengths, torch.ones_like(text_lengths)])                      # (2 B,)
    nothing = torch.zeros_like(text_tokens, dtype=torch.bool)

    def guess() -> list[Tensor]:
        tokens, is_masked = canvas.tokens, canvas.is_masked
        if guided:
            tokens, is_masked = torch.cat([tokens, tokens]), torch.cat([is_masked, is_masked])       # (2 B, N)
        seq = sequence.build("t2i", cfg, tokens, is_masked, text_tokens, nothing, text_lengths)
        logits = model.image_logits(model(seq), seq.layout)
        if guided:
            given, null = logits.chunk(2)
            logits = null + guidance * (given - null)                                                # (B, N, V_I)
        return [logits]

    decode(guess, [canvas], generator)
    return canvas.tokens, canvas.trace


def write_text(model, image_tokens: Tensor, generator: torch.Generator, text_lengths: Tensor | None = None,
               canvas: DecodeState | None = None) -> tuple[Tensor, Tensor, list[Step]]:
    """Captions (B, T) of image_tokens (B, N), their lengths (B,), predicted if not given, and every decoding step.

    T is cfg.text_length. From a caption's length on there are zeros; its end token is guessed like any other. A canvas
    with some places to fill (infilling) wants its text_lengths: ValueError without.
    """
    cfg = model.cfg
    if canvas and text_lengths is None:
        raise ValueError("a canvas to write on wants text_lengths")
    nothing = torch.zeros_like(image_tokens, dtype=torch.bool)
    if text_lengths is None:
        text_lengths = predict_length(model, image_tokens, nothing)
    canvas = canvas or DecodeState(*blank_text(cfg, text_lengths), text_recipe(cfg))

    def guess() -> list[Tensor]:
        seq = sequence.build("i2t", cfg, image_tokens, nothing, canvas.tokens, canvas.is_masked, text_lengths)
        return [model.text_logits(model(seq), seq.layout)]

    decode(guess, [canvas], generator)
    return canvas.tokens, text_lengths, canvas.trace


def draw_pair(model, image: DecodeState, text: DecodeState, text_lengths: Tensor, generator: torch.Generator,
              keep_length: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text together (appendix D): image tokens (B, N), text tokens (B, T), text lengths (B,).

    text_lengths (B,) is where to begin. It is read again after every step, from the image as far as it is drawn: text
    places that a longer text gains are masked, those that a shorter one loses are dropped. A text of which a part is
    known wants keep_length: else its words might be written over. Both canvases must have the same number of steps;
    these are in their traces.
    """
    cfg = model.cfg

    def guess() -> list[Tensor]:
        nonlocal text_lengths
        if image.trace and not keep_length:
            text_lengths = predict_length(model, image.tokens, image.is_masked)
            is_real = sequence.valid_mask(text_lengths, cfg.text_length)
            text.is_masked = (text.is_masked | ~text.to_fill) & is_real                              # (B, T)
            text.to_fill = is_real
        seq = sequence.build("it2it", cfg, image.tokens, image.is_masked, text.tokens, text.is_masked, text_lengths)
        states = model(seq)
        return [model.image_logits(states, seq.layout), model.text_logits(states, seq.layout)]

    decode(guess, [image, text], generator)
    return image.tokens, text.tokens, text_lengths


@torch.no_grad()
def predict_length(model, image_tokens: Tensor, image_is_masked: Tensor) -> Tensor:
    """The likeliest length (B,) in 1..T, end token included, of a caption for image_tokens (B, N).

    It is read from a pass of its own, which sees nothing of a text but `length_positions` masked places.
    """
    seq = sequence.build_for_length(model.cfg, image_tokens, image_is_masked)
    return model.length_logits(model(seq), seq.layout).argmax(dim=-1) + 1
