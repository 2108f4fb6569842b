"""Chapter 5 - Decoding: from all hidden to all known, in a few steps (section 3.2, figure 2).

There is one loop, decode(). It knows no model and no task: it is given a canvas (tokens, some of them hidden) and a
function from tokens to logits. Every step guesses all hidden tokens at once, then hides the least confident again,
fewer and fewer. Images and texts differ in a Recipe, no more: an image token that was once kept is never hidden again,
a text token may be.

draw_image() and write_text() are thin: another canvas each, and the caption's length, which is guessed first. They
want a model in eval() mode.

Shapes: B batch, N places, K decoding steps, V vocabulary, T text places. Read on in vqgan.py.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.masking import decoding_counts, gumbel, lowest, sample


@dataclass(frozen=True)
class Recipe:
    """How one modality is decoded."""
    steps: int                        # K
    schedule: str                     # gamma: "cosine" or "linear"
    can_remask: bool                  # may a token that was revealed be hidden again?
    temperature: tuple[float, float]  # of the sampled tokens, at the first step and at the last; > 0
    noise: tuple[float, float]        # of the choice of places, from the first step to the last; 0: confidence alone
    noise_favours: str                # "keeping": Gumbel noise draws the places to keep, "hiding": those to hide
    top_k: int                        # sample among this many likeliest tokens; 0: among all
    floor: float                      # confidence is log max(p, floor), p after temperature and top-k


@dataclass(frozen=True)
class Step:
    """One step of decoding, for looking at: what was hidden, what was put there, and how surely."""
    is_masked: Tensor   # (B, N) bool, before the step
    tokens: Tensor      # (B, N) after the step
    confidence: Tensor  # (B, N) log p of each token when it was last sampled; 0 where it was given


def image_recipe(cfg) -> Recipe:
    """The released code's image settings, its floor included, with the numbers of cfg."""
    return Recipe(steps=cfg.image_steps, schedule="cosine", can_remask=False, temperature=cfg.image_temperature,
                  noise=cfg.image_noise, noise_favours="keeping", top_k=cfg.image_top_k, floor=2.0 ** -10)


def text_recipe(cfg) -> Recipe:
    """The released code's text settings, with the numbers of cfg. text_choice "draw", which is the code's, hides places
    drawn from softmax(-log p), "least" the least confident."""
    noise = 1.0 if cfg.text_choice == "draw" else 0.0
    return Recipe(steps=cfg.text_steps, schedule="linear", can_remask=True, temperature=(cfg.text_temperature,) * 2,
                  noise=(noise,) * 2, noise_favours="hiding", top_k=cfg.text_top_k,
                  floor=torch.finfo(torch.float32).tiny)


def decode(tokens_to_logits: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, to_fill: Tensor, recipe: Recipe,
           generator: torch.Generator) -> tuple[Tensor, list[Step]]:
    """Fills the places of a canvas that are to be filled, in K steps; the others are never touched.

    tokens (B, N) long, to_fill (B, N) bool; tokens_to_logits(tokens, is_masked) -> (B, N, V). Returns the tokens
    (B, N) and every step. All randomness is drawn from the generator (a CPU one) beforehand, row after row, so the
    first row of a batch is the single sample of the same seed.
    Raises ValueError where an image has fewer places to fill than there are steps.
    """
    device, k_steps = tokens.device, recipe.steps
    counts = decoding_counts(to_fill.sum(1), k_steps, recipe.schedule, recipe.can_remask)            # (B, K)
    temperature = torch.linspace(*recipe.temperature, k_steps, device=device)                        # (K,)
    noise_scale = torch.linspace(*recipe.noise, k_steps, device=device)                              # (K,)
    sign = {"keeping": 1, "hiding": -1}[recipe.noise_favours]
    uniform = torch.rand(len(tokens), k_steps, 2, tokens.shape[1], generator=generator).to(device)   # (B, K, 2, N)

    is_masked, confidence, trace = to_fill, torch.zeros(tokens.shape, device=device), []
    for k in range(k_steps):
        logits = tokens_to_logits(tokens, is_masked) / temperature[k]                                # (B, N, V)
        sampled, p = sample(logits, uniform[:, k, 0], recipe.top_k)                                  # (B, N) each
        tokens = torch.where(is_masked, sampled, tokens)
        confidence = torch.where(is_masked, p.clamp(min=recipe.floor).log(), confidence)
        trace.append(Step(is_masked, tokens, confidence))
        if k + 1 < k_steps:
            score = confidence + sign * noise_scale[k] * gumbel(uniform[:, k, 1])                    # (B, N)
            is_masked = lowest(score, counts[:, k + 1], to_fill if recipe.can_remask else is_masked)
    return tokens, trace


@torch.no_grad()
def draw_image(model, text_tokens: Tensor, text_lengths: Tensor, generator: torch.Generator,
               recipe: Recipe | None = None) -> tuple[Tensor, list[Step]]:
    """Image tokens (B, N) for captions text_tokens (B, T) of text_lengths (B,), and every decoding step."""
    cfg, batch, device = model.cfg, len(text_tokens), text_tokens.device
    nothing = torch.zeros_like(text_tokens, dtype=torch.bool)

    def tokens_to_logits(image_tokens: Tensor, is_masked: Tensor) -> Tensor:
        seq = sequence.build("t2i", cfg, image_tokens, is_masked, text_tokens, nothing, text_lengths)
        return model.image_logits(model(seq), seq.layout)

    canvas = torch.zeros(batch, cfg.image_tokens, dtype=torch.long, device=device)
    all_hidden = torch.ones_like(canvas, dtype=torch.bool)
    return decode(tokens_to_logits, canvas, all_hidden, recipe or image_recipe(cfg), generator)


@torch.no_grad()
def write_text(model, image_tokens: Tensor, generator: torch.Generator, text_lengths: Tensor | None = None,
               recipe: Recipe | None = None) -> tuple[Tensor, Tensor, list[Step]]:
    """Captions (B, T) of image_tokens (B, N), their lengths (B,), predicted if not given, and every decoding step.

    T is cfg.text_length. From a caption's length on there are zeros; its end token is guessed like any other.
    """
    cfg, device = model.cfg, image_tokens.device
    nothing = torch.zeros_like(image_tokens, dtype=torch.bool)
    canvas = torch.zeros(len(image_tokens), cfg.text_length, dtype=torch.long, device=device)
    if text_lengths is None:
        text_lengths = predict_length(model, image_tokens)

    def tokens_to_logits(text_tokens: Tensor, is_masked: Tensor) -> Tensor:
        seq = sequence.build("i2t", cfg, image_tokens, nothing, text_tokens, is_masked, text_lengths)
        return model.text_logits(model(seq), seq.layout)

    to_fill = sequence.real_places(text_lengths, cfg.text_length)
    tokens, trace = decode(tokens_to_logits, canvas, to_fill, recipe or text_recipe(cfg), generator)
    return tokens, text_lengths, trace


@torch.no_grad()
def predict_length(model, image_tokens: Tensor) -> Tensor:
    """The likeliest length (B,) in 1..T, end token included, of a caption for image_tokens (B, N).

    It is read once, from a pass that sees nothing of a text but `length_places` masked places.
    """
    seq = sequence.build_for_length(model.cfg, image_tokens, torch.zeros_like(image_tokens, dtype=torch.bool))
    return model.length_logits(model(seq), seq.layout).argmax(dim=-1) + 1
