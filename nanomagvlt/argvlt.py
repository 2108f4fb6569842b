"""Chapter 6 - ARGVLT, the autoregressive counterpart: the same transformer, but causal (section 4.1, appendix A).

This is the model to which the paper compares MAGVLT. The sequence has the same layout, no token is masked, and each
position attends only to itself and to the positions before it. The model learns to predict the next token, and
generates one token after the other. There is no it2it, and no predicted length: the end token is one of the tokens. In
a partly given image or text, too, it sees only earlier tokens, or all given ones: see put_visible_first().

The state at a position predicts the token of the next position. next_states() moves all states one position to the
right: then the state at a position predicts the token of this position, and the rest of the code is as in MAGVLT.

losses() and generate() are called like MAGVLT's, in objectives.py and decoding.py.
Shapes: B batch, N positions of a piece, L sequence, V vocabulary, D width. Read on in rng.py.
"""
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nanomagvlt.decoding import SamplingConfig
from nanomagvlt.model import KVCache
from nanomagvlt.objectives import Batch, Logits, Terms, autocast, masked_cross_entropy, mix
from nanomagvlt.rng import Rng, random_rows
from nanomagvlt.sequence import KIND, TASKS, Sequence, build

MAIN_TERM = "generated"  # validations are compared by it


def total_loss(cfg, generated: Tensor | float = 0.0, condition: Tensor | float = 0.0,
               mixsel: Tensor | float = 0.0) -> Tensor:
    """The loss over the whole sequence (appendix A): 0.9 for the generated half, 0.1 for the given half. And MixSel."""
    return 0.9 * generated + 0.1 * condition + cfg.mixsel_weight * mixsel


def losses(model, task: str, batch: Batch, rng: Rng, run: Callable | None = None) -> tuple[Tensor, Terms]:
    """The loss of a batch in one task, and its terms. Nothing is masked: rng is only for MixSel.

    MixSel's gain is "somewhat marginal for ARGVLT" (section 4.4), so it is off by default. The paper does not say what
    it scores. Here it is one more pass like the main one: the generated half, and the joined context.
    """
    cfg, run = model.cfg, run or run_pass
    terms, _ = run(model, "main", build(task, cfg, batch), batch)
    if cfg.mixsel != "off":
        mixed, _, selector = mix(task, batch, rng, cfg)
        terms |= run(model, "mixsel", build(task, cfg, mixed, selector=selector), mixed)[0]
    return total_loss(cfg, **terms), terms


def run_pass(model, name: str, seq: Sequence, targets: Batch, score: Callable | None = None) -> tuple[Terms, Logits]:
    """One pass through the model, "main" or "mixsel": its terms, and no logits."""
    with autocast(model.cfg, seq.token_ids.device):
        generated, condition = (score or score_pass)(model, seq, targets)
    if name == "mixsel":
        return {"mixsel": total_loss(model.cfg, generated, condition)}, {}
    return {"generated": generated, "condition": condition}, {}


def score_pass(model, seq: Sequence, targets: Batch) -> tuple[Tensor, Tensor]:
    """The mean next-token cross entropy of the generated pieces, and of the given pieces, without padding."""
    states = next_states(model(seq))                                                                 # (B, L, D)

    def loss_of(piece: str) -> Tensor:
        where = seq.slices[piece]
        logits = model.logits(states[:, where], KIND[piece])                                         # (B, N, V)
        return masked_cross_entropy(logits, targets[f"{piece}_tokens"], seq.is_valid[:, where],
                                    model.cfg.label_smoothing)
    return sum(map(loss_of, seq.task.generates)), sum(map(loss_of, seq.task.given))


def next_states(states: Tensor) -> Tensor:
    """States (B, L, D), one position to the right. The first position, BOC, is never scored."""
    return states.roll(1, dims=1)


# ---------------------------------------------------------------------------------------------- sampling

def put_visible_first(seq: Sequence, waits: Tensor) -> tuple[Sequence, Tensor]:
    """The sequence with the columns that wait (B, L) behind all others, and the old column of each new one (B, L).

    The authors' code inpaints in this way (sample_1d_fast_it2i): each token keeps its own row of the position table.
    Attention is causal in the new order, so a hole sees all given tokens, and the holes before it. Padding stays last.

    Its limit: the model has learned to predict the position after the one that it reads. So the first hole of each run
    is predicted as if it stood elsewhere: after the previous hole, or after the last given token. In micro, an object
    is then inpainted right 0.00 of the time (0.63 from the left alone). The authors' code has this for images only;
    captions in the paper's figure 13 read as if ARGVLT saw only what is left of a hole.
    """
    order = waits.long().argsort(dim=1, stable=True)                                                 # (B, L)
    return replace(seq, token_ids=seq.token_ids.gather(1, order), position_ids=seq.position_ids[order]), order


def next_token(model, seq: Sequence, columns: Tensor, cache: KVCache | None, kind: str, config: SamplingConfig,
               temperature: Tensor, uniform: Tensor) -> Tensor:
    """Reads the columns (L',), and samples the token (B,) after the last of them, by uniform numbers (B, 1)."""
    states = model(seq, columns, cache)                                                              # (B, L', D)
    logits = model.logits(states[:, -1:], kind)                                                      # (B, 1, V)
    return config.sample(logits, temperature, uniform)[0][:, 0]


@torch.no_grad()
def generate(model, task: str, batch: Batch, to_fill: dict[str, Tensor], sampling: dict[str, SamplingConfig],
             generator: torch.Generator | Iterator[torch.Generator], guidance: float = 1.0, update_length: bool = False,
             use_cache: bool = True, cache: KVCache | None = None, step: Callable = next_token) -> tuple[Batch, dict]:
    """Fills the generated piece of a task, token after token: the batch with its new tokens, and no trace.

    The arguments are those of decoding.generate(). Of sampling, only visible_first, temperature (linear from the first
    token read to the last) and the rules of sample() are used; guidance and update_length are not. A text is at most as
    long as in the batch; what is filled after its first end token are end tokens.

    use_cache keeps the keys and values of the columns that were read, in tensors as long as the sequence. Without it
    everything is read again for each token; the tokens are the same. `step` replaces next_token(), to compile it: with
    use_cache all calls but the first have the same shapes. `cache` can be the cache of an earlier call.
    """
    (piece,) = TASKS[task].generates
    kind, config = KIND[piece], sampling[piece]
    seq, first_id = build(task, model.cfg, batch), model.vocab.tokens[kind].start
    span, waits = seq.slices[piece], torch.zeros_like(seq.is_valid)                                  # waits: (B, L)
    end = model.cfg.end_token if kind == "text" else -1                # an image has no end token: -1 is never equal
    if config.visible_first:  # end tokens and padding wait too: nothing is learned after them
        waits[:, span] = to_fill[piece] | (batch[f"{piece}_tokens"] == end) | ~seq.is_valid[:, span]
    seq, order = put_visible_first(seq, waits)
    fill = to_fill[piece].gather(1, order[:, span] - span.start)                                     # (B, N)
    rows, count = fill.shape
    uniform = random_rows(generator, rows, count).to(fill.device)                                    # (B, N)
    temperature = torch.linspace(*config.temperature, count).to(fill.device)                         # (N,)
    is_over = torch.zeros(rows, dtype=torch.bool, device=fill.device)                                # (B,)
    columns = torch.arange(seq.token_ids.shape[1], device=fill.device)                               # (L,)
    cache = (cache or model.new_cache(rows, len(columns))) if use_cache else None
    num_read = 0
    for i, j in enumerate(range(span.start, span.stop)):
        token = step(model, seq, columns[num_read:j], cache, kind, config, temperature[i], uniform[:, i:i + 1])
        num_read = j if use_cache else 0
        token = token.masked_fill(is_over, end)                                                      # (B,)
        seq.token_ids[:, j] = torch.where(fill[:, i], token + first_id, seq.token_ids[:, j])         # (B,)
        is_over = is_over | (seq.token_ids[:, j] == first_id + end)                                  # (B,)
    tokens = seq.token_ids.gather(1, order.argsort(dim=1))[:, span] - first_id                       # (B, N)
    return {**batch, f"{piece}_tokens": tokens}, {}
