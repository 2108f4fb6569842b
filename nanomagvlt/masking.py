"""Chapter 1 - Masking: how many tokens are hidden, and which.

MAGVLT is trained and sampled by one operation: some tokens are masked, and the model predicts them. This file answers
the four questions that training and decoding share (sections 3.1 and 3.2 of the paper):

  how large a share is masked?     gamma(u): the share STILL MASKED at progress u in [0, 1]. It falls from 1 to 0.
                                   Training draws u at random (r in the paper); decoding takes u = 0, 1/K, 2/K, ...
  how many positions is that?      num_masked() in training, decoding_counts() in decoding
  which positions?                 bottom_k_mask(): those with the lowest scores. In training the score is a random
                                   number; in decoding it is the model's confidence, or another of ORDERS.
  which token is put there?        sample(): a token drawn from the model's logits

`is_masked` is True where a token is hidden from the model: here and in every other file.
Shapes: B batch, N positions of one modality, K decoding steps, V vocabulary.
`python -m nanomagvlt.masking` prints the schedules. Read on in sequence.py.
"""
import math
from functools import cache

import torch
from torch import Tensor

SLACK = 1e-9  # more than float64's rounding error, where gamma x N should be a whole number

SCHEDULES = {  # gamma(u): exactly 1 at u = 0, exactly 0 at u = 1, and falling between
    "cosine": lambda u: torch.sin((1 - u) * (math.pi / 2)),  # images: cos(pi u / 2), as a sine so that 0 is exact
    "linear": lambda u: 1 - u,                               # text
    "square": lambda u: 1 - u * u,                           # not the paper's: masks more than linear
}
ORDERS = ("gumbel", "inverse", "confidence", "random", "halton")


def gamma(u: Tensor, schedule: str) -> Tensor:
    """The share of positions still masked at progress u in [0, 1]: the same shape."""
    return SCHEDULES[schedule](u)


def num_masked(share: Tensor, num_positions: Tensor | int, round_up: bool = True) -> Tensor:
    """ceil(share x N), or floor, at least 1 and at most N (section 3.1). share, in [0, 1], and N broadcast."""
    masked = share.double() * num_positions
    masked = (masked - SLACK).ceil() if round_up else (masked + SLACK).floor()
    return masked.clamp(min=1).long().clamp(max=num_positions)


def decoding_counts(num_to_fill: Tensor, steps: int, schedule: str, can_remask: bool) -> Tensor:
    """How many positions are masked before each of K steps, for each of M totals n to fill: (M,) -> (M, K).

    An image token that is revealed stays: ceil(gamma(k/K) n), and each step reveals at least one. (decode() refuses
    fewer positions than steps.) A text token can be masked again (can_remask): floor(gamma(k/K) n), at least 1. The
    paper writes ceil, the authors' code has floor.
    """
    share = gamma(torch.arange(steps, dtype=torch.float64) / steps, schedule)                        # (K,)
    counts = num_masked(share, num_to_fill[:, None], round_up=not can_remask)                        # (M, K)
    if not can_remask:
        for k in range(1, steps):  # at least one less than before, and at least one for each step that is left
            counts[:, k] = counts[:, k].minimum(counts[:, k - 1] - 1).clamp(min=steps - k)
    return counts


def bottom_k_mask(scores: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """True at the `count` (B,) lowest scores of each row, among the positions that are allowed: (B, N) bool.

    scores (B, N) float; among (B, N) bool, with at least `count` True in each row.
    The argsort of the argsort is the rank of each position: no loop, and no shape that depends on the data.
    """
    rank = scores.masked_fill(~among, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)       # (B, N)
    return (rank < count[:, None]) & among


def order_scores(order: str, confidence: Tensor, noise: float, uniform: Tensor, halton: Tensor) -> Tensor:
    """A score for each position in decoding, (B, N): the positions with the lowest scores are masked again.

    confidence (B, N) is log p of the token at each position, uniform (B, N) are new random numbers, halton (N,) is
    halton_rank() of the positions.
      "gumbel"      confidence + noise x Gumbel noise: the authors' order for images
      "inverse"     positions are drawn for masking in proportion to 1 / p: the authors' order for text. Such a
                    draw is the n highest of -log p + noise (see gumbel()), which are the n lowest of log p - noise
      "confidence"  the least confident positions are masked
      "random"      random positions are masked
      "halton"      the positions of highest rank are masked; those that are kept spread evenly over the grid (Besnier
                    et al., 2025, arXiv 2503.17076)
    """
    if order == "gumbel":
        return confidence + noise * gumbel(uniform)
    if order == "inverse":
        return confidence - gumbel(uniform)
    if order == "confidence":
        return confidence
    if order == "random":
        return uniform
    if order == "halton":
        return -halton.to(uniform.dtype).expand_as(uniform)
    raise ValueError(f"no order {order!r}; there are: {', '.join(ORDERS)}")


@cache
def halton_rank(rows: int, columns: int) -> Tensor:
    """When the Halton sequence of bases 2 and 3 first visits each cell of a grid, 0 is first: (rows x columns,)."""
    rank, i = {}, 0
    while len(rank) < rows * columns:
        i += 1
        cell = int(van_der_corput(i, 3) * rows) * columns + int(van_der_corput(i, 2) * columns)
        rank.setdefault(cell, len(rank))
    return torch.tensor([rank[cell] for cell in range(rows * columns)])


def van_der_corput(i: int, base: int) -> float:
    """The digits of i > 0 in reverse, after the point: 6 = 110 in base 2 gives 0.011 = 3/8. In [0, 1)."""
    value, unit = 0.0, 1.0
    while i:
        unit /= base
        i, digit = divmod(i, base)
        value += digit * unit
    return value


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1): the same shape.

    The n highest of log p + Gumbel noise are n positions drawn without replacement, in proportion to p.
    """
    tiny = torch.finfo(uniform.dtype).tiny
    return -torch.log((-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny))


def sample(logits: Tensor, uniform: Tensor, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """One token for each position and its probability, (B, N) each, from logits (B, N, V) and uniform numbers (B, N).

    The token is where the cumulative distribution passes the uniform number: one random number for each position
    instead of V. With top_k > 0 only the top_k most likely tokens are sampled, and the probability is among these.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    p = logits.float().softmax(dim=-1)                                                               # (B, N, V)
    cumulative = p.cumsum(dim=-1)
    # The target stays below the total: rounding must not select a token of probability 0 at the end.
    target = uniform[..., None] * cumulative[..., -1:] * (1 - 1e-6)                                  # (B, N, 1)
    token = torch.searchsorted(cumulative, target, right=True)                                       # (B, N, 1)
    return token[..., 0], p.gather(-1, token)[..., 0]


if __name__ == "__main__":
    for name, n, steps, schedule in (("image", 256, 10, "cosine"), ("image", 256, 10, "square"),
                                     ("image", 16, 10, "cosine"), ("text", 16, 12, "linear")):
        counts = decoding_counts(torch.tensor([n]), steps, schedule, can_remask=name == "text")[0].tolist()
        print(f"\n{n} {name} tokens in {steps} steps, gamma {schedule}: masked before each step")
        for k, count in enumerate(counts):
            print(f"  k = {k:2}  gamma = {gamma(torch.tensor(k / steps), schedule):.3f}  {count:3}  "
                  + "#" * round(60 * count / n))
    print(f"\nthe Halton order of 4 x 4 positions, from the first (0) on\n{halton_rank(4, 4).view(4, 4).numpy()}")
