"""Chapter 5 - Decoding: from all tokens masked to none, in a few steps (section 3.2, figure 2).

There is one loop, decode(). It knows neither model nor task: it gets DecodeStates (tokens, some of them to fill) and a
function that predicts their logits. Each step samples all masked tokens at once, then masks some of them again, fewer
from step to step: the least confident ones, or another of masking.ORDERS. Images and texts differ only in their
SamplingConfig: an image token that was once kept is never masked again, a text token can be.

generate() connects the loop with the model, by the task's record: t2i fills an image in view of a text, i2t a text in
view of an image, it2it both (appendix D). It fills a whole piece, or a part: a region of an image (inpainting), some
words of a text (infilling). It needs a model in eval() mode.

Shapes: B batch, N positions of a piece, K decoding steps, V vocabulary, L sequence, D width. Read on in argvlt.py.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanomagvlt.masking import bottom_k_mask, decoding_counts, halton_rank, order_scores, sample
from nanomagvlt.rng import random_rows
from nanomagvlt.sequence import KIND, TASKS, build, build_for_length, empty_texts, valid_mask

Generators = torch.Generator | Iterator[torch.Generator]  # one for a batch, or one for each row: see rng.random_rows()


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
    p_floor: float                    # confidence is log max(p, p_floor), with p after temperature and top_k
    rows: int                         # rows of the grid of positions, for the Halton order; 1 for a text
    visible_first: bool = False       # ARGVLT alone: it reads all given tokens of a piece before the first hole

    def sample(self, logits: Tensor, temperature: Tensor | float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """masking.sample() by these rules, also for ARGVLT: tokens and their probabilities, (B, N) each."""
        return sample(logits.float() / temperature, uniform, self.top_k)


def sampling_config(cfg, kind: str, **changes) -> SamplingConfig:
    """The settings of "image" or "text" tokens in cfg, with fixed rules of the release; `changes` replace fields."""
    if kind == "image":
        settings = SamplingConfig(cfg.image_steps, cfg.image_schedule, cfg.image_order, cfg.image_temperature,
                                  cfg.image_noise, cfg.image_top_k, can_remask=False, p_floor=2.0 ** -10, rows=cfg.grid)
    else:
        settings = SamplingConfig(cfg.text_steps, cfg.text_schedule, cfg.text_order, cfg.text_temperature,
                                  cfg.text_noise, cfg.text_top_k, can_remask=True,
                                  p_floor=torch.finfo(torch.float32).tiny, rows=1)
    return replace(settings, visible_first=cfg.visible_first, **changes)


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
    confidence: Tensor = field(init=False)   # (B, N) log p of each token when it was last sampled; 0 where it was given
    counts: Tensor = field(init=False)       # (N + 1, K) row n: how many of n positions are masked before each step
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
def decode(predict_logits: Callable[[int], list[Tensor]], states: list[DecodeState], generator: Generators) -> None:
    """Fills the states in K steps.

    predict_logits(k) -> logits (B, N, V) for each state, from its current tokens and is_masked. All random numbers are
    drawn before the first step, on the CPU, row after row: so row 0 equals a batch of one with the same seed.
    Raises ValueError if an image has fewer positions to fill than steps, or if the states differ in their steps.
    """
    rows, k_steps, device = len(states[0].tokens), states[0].config.steps, states[0].tokens.device
    for state in states:
        fewest = state.to_fill.sum(1).min()
        if state.config.steps != k_steps:
            raise ValueError(f"states that are filled together need one number of steps, not {k_steps} and "
                             f"{state.config.steps}")
        if not state.config.can_remask and k_steps > fewest:
            raise ValueError(f"{k_steps} decoding steps, but only {fewest} tokens to fill: take fewer steps")
    sizes = [k_steps * 2 * state.tokens.shape[1] for state in states]    # per token and step: to sample, to order
    uniform = random_rows(generator, rows, sum(sizes)).to(device).split(sizes, dim=1)
    uniform = [numbers.view(rows, k_steps, 2, -1) for numbers in uniform]                            # (B, K, 2, N)
    for k in range(k_steps):
        for state, logits, numbers in zip(states, predict_logits(k), uniform):
            decode_step(state, logits, k, numbers[:, k])


def decode_step(state: DecodeState, logits: Tensor, k: int, uniform: Tensor) -> None:
    """Step k = 0 .. K-1 of one state: fills all masked positions, then masks some again, except in the last step.

    logits (B, N, V), uniform (B, 2, N).
    """
    config, last = state.config, state.config.steps - 1
    temperature, noise = (a + (b - a) * k / max(1, last) for a, b in (config.temperature, config.noise))
    sampled, p = config.sample(logits, temperature, uniform[:, 0])                                   # (B, N) each
    state.tokens = torch.where(state.is_masked, sampled, state.tokens)                               # (B, N)
    state.confidence = torch.where(state.is_masked, p.clamp(min=config.p_floor).log(), state.confidence)
    state.trace.append(Step(state.is_masked, state.tokens, state.confidence))
    if k < last:
        scores = order_scores(config.order, state.confidence, noise, uniform[:, 1], state.halton)    # (B, N)
        count = state.counts[state.to_fill.sum(1), k + 1]                                            # (B,)
        state.is_masked = bottom_k_mask(scores, count, state.to_fill if config.can_remask else state.is_masked)


# ---------------------------------------------------------------------------------------------- with the model

@torch.no_grad()
def generate(model, task: str, batch: dict[str, Tensor], to_fill: dict[str, Tensor],
             sampling: dict[str, SamplingConfig], generator: Generators, guidance: float = 1.0,
             update_length: bool = False) -> tuple[dict[str, Tensor], dict[str, list[Step]]]:
    """Fills the generated pieces of a task: the batch with its new tokens, and the trace of each piece.

    batch has the tokens (and lengths) of all pieces. For each generated piece, to_fill (B, N) is True at the positions
    to fill, and sampling has its settings. With update_length, which needs a text that is to fill as a whole, the
    text's length is predicted again before each step but the first. New positions are masked, lost ones are dropped.

    guidance w other than 1 is classifier-free guidance (Ho and Salimans, 2022): logits = null + w (given - null). null
    are the logits with empty texts in place of the given ones. Both come from one pass of 2 B rows. A task without a
    given text has no guidance.
    """
    cfg, record, batch = model.cfg, TASKS[task], dict(batch)
    is_guided = guidance != 1 and any(KIND[piece] == "text" for piece in record.given)
    states = {piece: DecodeState(batch[f"{piece}_tokens"], to_fill[piece], sampling[piece])
              for piece in record.generates}

    def current() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The batch and the masks as they are now."""
        return ({**batch, **{f"{piece}_tokens": state.tokens for piece, state in states.items()}},
                {piece: state.is_masked for piece, state in states.items()})

    def predict_logits(k: int) -> list[Tensor]:
        if update_length and k > 0:
            text, lengths = states[record.length_of], predict_length(model, task, *current())        # (B,)
            is_valid = valid_mask(lengths, text.tokens.shape[1])                                     # (B, T)
            text.is_masked = (text.is_masked | ~text.to_fill) & is_valid
            text.to_fill = is_valid
            batch[f"{record.length_of}_lengths"] = lengths
        shown, masks = current()
        if is_guided:
            shown, masks = ({name: torch.cat([x, x]) for name, x in tensors.items()} for tensors in (shown, masks))
            rows = len(next(iter(shown.values())))                                                   # 2 B
            is_null = torch.arange(rows, device=model.device) >= rows // 2                           # (2 B,)
            shown = empty_texts(task, shown, is_null, cfg.end_token)
        seq = build(task, cfg, shown, masks)
        last_states = model(seq)                                                                     # (B, L, D)
        logits = [model.logits(last_states[:, seq.slices[piece]], KIND[piece]) for piece in states]  # (B, N, V) each
        if is_guided:
            logits = [null + guidance * (given - null) for given, null in (both.float().chunk(2) for both in logits)]
        return logits
    decode(predict_logits, list(states.values()), generator)
    return current()[0], {piece: state.trace for piece, state in states.items()}


@torch.no_grad()
def predict_length(model, task: str, batch: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> Tensor:
    """The most likely length (B,) of the text to generate, in 1..N_T with its end token (section 3.2).

    It comes from a pass of its own, in which the text is cfg.length_positions masked positions.
    """
    seq = build_for_length(task, model.cfg, batch, masks or {})
    return model.length_logits(model(seq), seq).argmax(dim=-1) + 1


def blank(cfg, batch_size: int, text_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An unknown image or, with text_lengths (B,), an unknown text: its tokens (B, N), and to_fill (B, N)."""
    count = cfg.image_tokens if text_lengths is None else cfg.text_length
    tokens = torch.zeros(batch_size, count, dtype=torch.long)
    to_fill = torch.ones_like(tokens, dtype=torch.bool) if text_lengths is None else valid_mask(text_lengths, count)
    return tokens, to_fill
