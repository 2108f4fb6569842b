"""Chapter 5 - Decoding: from all tokens masked to none, in a few steps (section 3.2, figure 2).

There is one loop, decode(). It knows neither model nor task: it gets DecodeStates (tokens, some of them to fill) and a
function that predicts their logits. Each step samples all masked tokens at once, then masks the least confident of them
again, fewer in each step. Images and texts differ only in their SamplingConfig: an image token that was once kept is
never masked again, a text token can be.

generate() connects the loop with the model, by the task's record: t2i fills an image in view of a text, i2t a text in
view of an image, it2it both (appendix D). What is filled decides the rest: all of a piece, a region of an image
(inpainting), some words of a text (infilling). It needs a model in eval() mode.

Shapes: B batch, N positions of one piece, K decoding steps, V vocabulary, T text positions. Read on in argvlt.py.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanomagvlt.masking import bottom_k_mask, decoding_counts, halton_rank, order_scores, sample
from nanomagvlt.rng import random_rows
from nanomagvlt.sequence import KIND, TASKS, build, build_for_length, valid_mask


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one kind are decoded."""
    steps: int                        # K
    schedule: str                     # gamma: one of masking.SCHEDULES
    order: str                        # which positions are kept first: one of masking.ORDERS
    temperature: tuple[float, float]  # of the sampled tokens, at the first step and at the last; > 0
    noise: tuple[float, float]        # scale of the noise of order "gumbel", at the first step and at the last
    top_k: int                        # sample among this many most likely tokens; 0: among all
    can_remask: bool                  # whether a token that was kept can be masked again
    floor: float                      # confidence is log max(p, floor), where p is the probability after top-k
    rows: int                         # rows of the grid of positions, for the Halton order; 1 for a text


def sampling_config(cfg, kind: str, **changes) -> SamplingConfig:
    """The settings in cfg for "image" or "text" tokens, with the release's rules that are no settings, and changes."""
    if kind == "image":
        settings = SamplingConfig(cfg.image_steps, cfg.image_schedule, cfg.image_order, cfg.image_temperature,
                                  cfg.image_noise, cfg.image_top_k, can_remask=False, floor=2.0 ** -10, rows=cfg.grid)
    else:
        settings = SamplingConfig(cfg.text_steps, cfg.text_schedule, cfg.text_order, cfg.text_temperature,
                                  cfg.text_noise, cfg.text_top_k, can_remask=True,
                                  floor=torch.finfo(torch.float32).tiny, rows=1)
    return replace(settings, **changes)


@dataclass(frozen=True)
class Step:
    """One decoding step, for display: what was masked, what was put there, and how likely it was."""
    is_masked: Tensor   # (B, N) bool, before the step
    tokens: Tensor      # (B, N) after the step
    confidence: Tensor  # (B, N) log p of each token when it was last sampled; 0 where it was given


@dataclass
class DecodeState:
    """One piece in decoding. Positions outside to_fill keep their tokens."""
    tokens: Tensor      # (B, N) long; the tokens at to_fill have no influence
    to_fill: Tensor     # (B, N) bool
    config: SamplingConfig
    is_masked: Tensor = field(init=False)    # (B, N) bool: masked now
    confidence: Tensor = field(init=False)   # (B, N) log p of each token when it was last sampled
    counts: Tensor = field(init=False)       # (N + 1, K) how many are masked before each step, if 0..N are to fill
    halton: Tensor = field(init=False)       # (N,) rank of each position in the Halton sequence
    trace: list[Step] = field(init=False)

    def __post_init__(self):
        """Masks all that is to fill. The tables are computed here, on the CPU, so that no step waits for a copy."""
        n, config, device = self.tokens.shape[1], self.config, self.tokens.device
        self.is_masked, self.trace = self.to_fill, []
        self.confidence = torch.zeros(self.tokens.shape, device=device)
        self.counts = decoding_counts(torch.arange(n + 1), config.steps, config.schedule, config.can_remask).to(device)
        self.halton = halton_rank(config.rows, n // config.rows).to(device)


@torch.no_grad()
def decode(predict_logits: Callable[[], list[Tensor]], states: list[DecodeState], generator: torch.Generator) -> None:
    """Fills the states in K steps.

    predict_logits() -> logits (B, N, V) for each state, from its current tokens and is_masked. All random numbers are
    drawn beforehand from the (CPU) generator, row after row: so the first row of a batch equals the single sample of
    the same seed. An iterator of generators gives each row one of its own (see rng.random_rows).
    Raises ValueError if an image has fewer positions to fill than steps, or if the states differ in their steps.
    """
    batch, k_steps = len(states[0].tokens), states[0].config.steps
    for state in states:
        fewest = state.to_fill.sum(1).min()
        if state.config.steps != k_steps:
            raise ValueError(f"states that are filled together need one number of steps, not {k_steps} and "
                             f"{state.config.steps}")
        if not state.config.can_remask and k_steps > fewest:
            raise ValueError(f"{k_steps} decoding steps, but only {fewest} tokens to fill: take fewer steps")
    sizes = [k_steps * 2 * state.tokens.shape[1] for state in states]
    uniform = random_rows(generator, batch, sum(sizes)).to(states[0].tokens.device).split(sizes, dim=1)
    uniform = [numbers.view(batch, k_steps, 2, -1) for numbers in uniform]                           # (B, K, 2, N)
    for k in range(k_steps):
        for state, logits, numbers in zip(states, predict_logits(), uniform):
            step(state, logits, k, numbers[:, k])


def step(state: DecodeState, logits: Tensor, k: int, uniform: Tensor) -> None:
    """Step k = 0 .. K-1 of one state: fills all masked positions, then masks some again. uniform (B, 2, N)."""
    config, last = state.config, state.config.steps - 1
    temperature, noise = (a + (b - a) * k / max(1, last) for a, b in (config.temperature, config.noise))
    sampled, p = sample(logits / temperature, uniform[:, 0], config.top_k)                           # (B, N) each
    state.tokens = torch.where(state.is_masked, sampled, state.tokens)
    state.confidence = torch.where(state.is_masked, p.clamp(min=config.floor).log(), state.confidence)
    state.trace.append(Step(state.is_masked, state.tokens, state.confidence))
    if k < last:
        scores = order_scores(config.order, state.confidence, noise, uniform[:, 1], state.halton)    # (B, N)
        count = state.counts[state.to_fill.sum(1), k + 1]                                            # (B,)
        state.is_masked = bottom_k_mask(scores, count, state.to_fill if config.can_remask else state.is_masked)


# ---------------------------------------------------------------------------------------------- with the model

@torch.no_grad()
def generate(model, task: str, batch: dict[str, Tensor], to_fill: dict[str, Tensor],
             sampling: dict[str, SamplingConfig], generator: torch.Generator, guidance: float = 1.0,
             update_length: bool = False) -> tuple[dict[str, Tensor], dict[str, list[Step]]]:
    """Fills the generated pieces of a task: the batch with its new tokens, and the trace of each piece.

    batch holds tokens (and lengths) of all pieces, to_fill True (B, N) at the positions to fill, and sampling the
    settings, each for the generated pieces. The lengths of texts are those in the batch; with update_length a text's
    length is predicted again before each step but the first: positions that it gains are masked, those that it loses
    are dropped.

    guidance w other than 1 is classifier-free guidance (Ho and Salimans, 2022): logits = null + w (given - null), where
    null are the logits with the given texts empty (their end token alone), from the same pass of 2 B rows.
    """
    cfg, record, batch = model.cfg, TASKS[task], dict(batch)
    states = {piece: DecodeState(batch[f"{piece}_tokens"], to_fill[piece], sampling[piece])
              for piece in record.generates}

    def current() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return ({**batch, **{f"{piece}_tokens": state.tokens for piece, state in states.items()}},
                {piece: state.is_masked for piece, state in states.items()})

    def predict_logits() -> list[Tensor]:
        if update_length and states[record.length_of].trace:
            change_length(model, task, *current(), batch, states[record.length_of])
        shown, masks = current()
        if guidance != 1:
            shown, masks = ({name: torch.cat([x, x]) for name, x in of.items()} for of in (shown, masks))   # 2 B rows
            for piece in record.given:
                if KIND[piece] == "text":
                    shown[f"{piece}_tokens"][len(shown[f"{piece}_tokens"]) // 2:] = cfg.end_token
                    shown[f"{piece}_lengths"][len(shown[f"{piece}_lengths"]) // 2:] = 1
        seq = build(task, cfg, shown, masks)
        hidden = model(seq)                                                                          # (B, L, D)
        logits = [model.logits(hidden[:, seq.slices[piece]], KIND[piece]) for piece in states]       # (B, N, V) each
        if guidance != 1:
            logits = [null + guidance * (given - null) for given, null in (both.chunk(2) for both in logits)]
        return logits
    decode(predict_logits, list(states.values()), generator)
    return current()[0], {piece: state.trace for piece, state in states.items()}


def change_length(model, task: str, shown: dict[str, Tensor], masks: dict[str, Tensor], batch: dict[str, Tensor],
                  text: DecodeState) -> None:
    """Predicts the length of a text that is generated together with its image, and changes batch and text to it."""
    lengths = predict_length(model, task, shown, masks)
    is_valid = valid_mask(lengths, text.tokens.shape[1])                                             # (B, T)
    text.is_masked, text.to_fill = (text.is_masked | ~text.to_fill) & is_valid, is_valid
    batch[f"{TASKS[task].length_of}_lengths"] = lengths


@torch.no_grad()
def predict_length(model, task: str, batch: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> Tensor:
    """The most likely length (B,) of the text to generate, in 1..T with its end token (section 3.2).

    It comes from a pass of its own, which shows of the text only cfg.length_positions masked positions.
    """
    seq = build_for_length(task, model.cfg, batch, masks or {})
    return model.length_logits(model(seq), seq).argmax(dim=-1) + 1


def blank(cfg, kind: str, batch: int, lengths: Tensor | None = None, device=None) -> tuple[Tensor, Tensor]:
    """A piece that is unknown: tokens (B, N), and to_fill (B, N), all of an image or the first `lengths` of a text."""
    count = cfg.image_tokens if kind == "image" else cfg.text_length
    tokens = torch.zeros(batch, count, dtype=torch.long, device=device)
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if lengths is None else valid_mask(lengths, count)
