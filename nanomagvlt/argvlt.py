"""Chapter 6 - ARGVLT, the autoregressive counterpart: the same transformer, but causal (section 4.1, appendix A).

This is the model to which the paper compares MAGVLT. The sequence has the same layout, no token is masked, and each
position attends only to itself and to the positions before it. The model learns to predict the next token, and
generates one token after the other. There is no it2it, and no predicted length: the end token is one of the tokens. Of
an image that is partly given, it can use only what stands before the token to generate.

The state at a position predicts the token of the next position. So that logits() can be used unchanged, next_states()
moves all states one position to the right: next_states[j] is the state at j - 1, which predicts the token at j.

losses() and generate() have the same signature as MAGVLT's, in objectives.py and decoding.py.
Shapes: B batch, N image positions, T text positions, L sequence, V vocabulary, D width.
Read on in tokenizers/vqgan.py.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from nanomagvlt.decoding import SamplingConfig
from nanomagvlt.masking import sample
from nanomagvlt.objectives import Batch, Terms, autocast, masked_cross_entropy
from nanomagvlt.rng import Rng, random_rows
from nanomagvlt.sequence import KIND, TASKS, Sequence, build

MAIN = "generated"  # the term by which validations are compared


def total_loss(cfg, generated: Tensor, condition: Tensor) -> Tensor:
    """The loss over the whole sequence (appendix A): 0.9 for the generated half, 0.1 for the given half."""
    return 0.9 * generated + 0.1 * condition


def losses(model, task: str, batch: Batch, rng: Rng, run: Callable | None = None) -> tuple[Tensor, Terms]:
    """The loss of one batch of one task, and its two terms. rng is not needed: nothing is masked."""
    terms, _ = (run or run_pass)(model, "", build(task, model.cfg, batch), batch)
    return total_loss(model.cfg, **terms), terms


def run_pass(model, name: str, seq: Sequence, targets: Batch, score: Callable | None = None) -> tuple[Terms, Batch]:
    """The one pass through the model: its terms. `name` is that of objectives.run_pass(), and not needed."""
    with autocast(model.cfg, seq.token_ids.device):
        generated, condition = (score or score_pass)(model, seq, targets)
    return {"generated": generated, "condition": condition}, {}


def score_pass(model, seq: Sequence, targets: Batch) -> tuple[Tensor, Tensor]:
    """The mean next-token cross entropy over the generated half, and over the given half, padding excepted."""
    states, found = next_states(model(seq)), {}                                                      # (B, L, D)
    for piece in (*seq.task.generates, *seq.task.given):
        where = seq.slices[piece]
        found[piece] = masked_cross_entropy(model.logits(states[:, where], KIND[piece]), targets[f"{piece}_tokens"],
                                            seq.is_valid[:, where], model.cfg.label_smoothing)       # all are scored
    return tuple(sum(found[piece] for piece in half) for half in (seq.task.generates, seq.task.given))


def next_states(states: Tensor) -> Tensor:
    """States (B, L, D), one position to the right. The first position, BOC, is never scored."""
    return states.roll(1, dims=1)


# ---------------------------------------------------------------------------------------------- sampling

def next_token(model, seq: Sequence, positions: Tensor, cache, kind: str, temperature: Tensor, top_k: int,
               uniform: Tensor) -> Tensor:
    """Reads the positions (L',), and samples the token (B,) behind the last of them, by uniform numbers (B, 1)."""
    states = model(seq, positions, cache)                                                            # (B, L', D)
    logits = model.logits(states[:, -1:], kind) / temperature                                        # (B, 1, V)
    return sample(logits, uniform, top_k)[0][:, 0]


@torch.no_grad()
def generate(model, task: str, batch: Batch, to_fill: dict[str, Tensor], sampling: dict[str, SamplingConfig],
             generator: torch.Generator, guidance: float = 1.0, update_length: bool = False, use_cache: bool = True,
             cache=None, step: Callable = next_token) -> tuple[Batch, dict]:
    """Fills the generated piece of a task, token after token: the batch with its new tokens, and no trace.

    The arguments are those of decoding.generate(); temperature and top_k are used, temperature from the first token to
    the last. A text may be as long as the batch says; it ends with its first end token, and end tokens follow.

    use_cache keeps the keys and values of all that was read, in tensors as long as the sequence; without it everything
    is read again for each token (the tokens are the same). `step` is next_token(), possibly compiled: all calls but the
    first have the same shapes, and none waits for the device. `cache` may be one of an earlier call.
    """
    cfg, (piece,) = model.cfg, TASKS[task].generates
    kind, config, to_fill = KIND[piece], sampling[piece], to_fill[piece]
    seq, first_id = build(task, cfg, batch), model.vocab.tokens[kind].start
    end = cfg.end_token if kind == "text" else -1                                                    # images have none
    (rows, count), device = to_fill.shape, to_fill.device
    uniform = random_rows(generator, rows, count).to(device)                                         # (B, N)
    temperature = torch.linspace(*config.temperature, count).to(device)                              # (N,)
    is_over = torch.zeros(rows, dtype=torch.bool, device=device)                                     # (B,)
    positions = torch.arange(seq.token_ids.shape[1], device=device)                                  # (L,)
    cache = (cache or model.new_cache(rows, len(positions))) if use_cache else None
    read, where = 0, seq.slices[piece]
    for i in range(count):
        j = where.start + i
        token = step(model, seq, positions[read:j], cache, kind, temperature[i], config.top_k, uniform[:, i:i + 1])
        read = j if use_cache else 0
        token = token.masked_fill(is_over, end)                                                      # (B,)
        seq.token_ids[:, j] = torch.where(to_fill[:, i], token + first_id, seq.token_ids[:, j])
        is_over = is_over | (seq.token_ids[:, j] == first_id + end)
    return {**batch, f"{piece}_tokens": seq.token_ids[:, where] - first_id}, {}
