"""Chapter 1 - What is hidden, and when.

MAGVLT learns and draws by one act: some tokens are hidden, the model guesses them. This file holds the four
questions that training and decoding share (sections 3.1 and 3.2 of the paper):

  how large a share is hidden?   gamma(u): the share STILL MASKED at progress u in [0, 1]. It falls from 1 to 0.
                                 Training draws u at random (the paper's r); decoding walks u = 0, 1/K, 2/K, ...
  how many places is that?       num_masked() in training, decoding_counts() in decoding
  which places?                  bottom_k_mask(): those with the lowest score. In training the score is a random number,
                                 in decoding it is the model's confidence, with some Gumbel noise, or another
                                 order: ORDERS.
  what is put there?             sample(): a token drawn from the model's logits

`is_masked` is True where a token is hidden from the model and is to be predicted: here and everywhere.
Shapes: B batch, N places of one modality, K decoding steps. `python -m nanomagvlt.masking` prints the schedules.
Read on in sequence.py.
"""
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

SLACK = 1e-9  # keeps float64's rounding of gamma * N from adding or losing a place where the product is a whole number


SCHEDULES = ("cosine", "linear", "square")
ORDERS = ("gumbel", "confidence", "random", "halton")


def gamma(u: Tensor, schedule: str) -> Tensor:
    """The share still masked at progress u in [0, 1]: exactly 1 at u = 0, exactly 0 at u = 1, falling between.

    "cosine" for images: cos(pi u / 2), written as a sine so that the ends are exact; "linear" for text: 1 - u;
    "square", for trying out: 1 - u^2, which reveals even less at first.
    """
    if schedule == "cosine":
        return torch.sin((1 - u) * (math.pi / 2))
    if schedule == "linear":
        return 1 - u
    if schedule == "square":
        return 1 - u * u
    raise ValueError(f"no schedule {schedule!r}; there are: {', '.join(SCHEDULES)}")


def num_masked(share: Tensor, num_places: Tensor | int, rounding: Callable[[Tensor], Tensor] = torch.ceil) -> Tensor:
    """ceil(share x N) places, at least 1 and at most N (section 3.1). share in [0, 1]: (B,) -> (B,) long.

    N may be 0, of a modality that is only shown: then 0. rounding is torch.ceil or, in UnrollMask and for MixSel's
    halves of images, torch.floor.
    """
    slack = SLACK if rounding is torch.floor else -SLACK
    return rounding(share.double() * num_places + slack).clamp(min=1).long().clamp(max=num_places)


def decoding_counts(num_hidden: Tensor, steps: int, schedule: str, can_remask: bool) -> Tensor:
    """How many places are masked before each of the K decoding steps, of num_hidden (B,) to fill: (B, K) long.

    Images keep what they once kept: ceil(gamma(k/K) N), and each step keeps at least one place more; rows with fewer
    places than steps then have no meaning (decode() refuses them). Text may be masked again (can_remask):
    floor(gamma(k/K) N), at least 1 (the paper writes ceil, the authors' code has floor).
    """
    share = gamma(torch.arange(steps, dtype=torch.float64) / steps, schedule).to(num_hidden.device)  # (K,)
    places = share * num_hidden[:, None]                                                             # (B, K)
    if can_remask:
        return (places + SLACK).floor().clamp(min=1).long()
    k = torch.arange(steps, device=num_hidden.device)
    counts = (places - SLACK).ceil().long()                                                          # (B, K)
    falling = (counts + k).cummin(dim=1).values - k     # below the step before by at least one, ...
    return falling.maximum(steps - k)                   # ... and never so low that a later step has none to reveal


def bottom_k_mask(scores: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """True at the `count` (B,) lowest scores of each row, only among the places that may be chosen.

    scores (B, N) float, among (B, N) bool with at least `count` True in each row -> (B, N) bool.
    The rank of every place is the argsort of the argsort: no loop, no data-dependent shape.
    """
    rank = scores.masked_fill(~among, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)       # (B, N)
    return (rank < count[:, None]) & among


def order_scores(order: str, confidence: Tensor, noise: float, uniform: Tensor, halton: Tensor) -> Tensor:
    """Scores of the places in decoding, (B, N): the lowest are hidden again.

    confidence (B, N) is log p of what stands there, uniform (B, N) fresh random numbers, halton (N,) the halton_rank()
    of the places.
      "gumbel"      confidence + noise x Gumbel noise, the paper's. noise > 0, for images: the highest, noisily, are
                    kept. noise = -1, for text: the n lowest of log p - Gumbel are the n highest of -log p + Gumbel,
                    so n places to hide are drawn, one after the other, from softmax(-log p)
      "confidence"  the least confident, outright
      "random"      any
      "halton"      spread evenly over the grid, the same in every picture (Besnier et al., 2025, arXiv 2503.17076)
    """
    if order == "gumbel":
        return confidence + noise * gumbel(uniform)
    if order == "confidence":
        return confidence
    if order == "random":
        return uniform
    if order == "halton":
        return -halton.to(uniform.dtype).expand_as(uniform)
    raise ValueError(f"no order {order!r}; there are: {', '.join(ORDERS)}")


@cache
def halton_rank(rows: int, columns: int) -> Tensor:
    """When each place of a grid is first met by the Halton sequence of bases 2 and 3: (rows x columns,), 0 is first."""
    rank, i = {}, 0
    while len(rank) < rows * columns:
        i += 1
        rank.setdefault(int(van_der_corput(i, 3) * rows) * columns + int(van_der_corput(i, 2) * columns), len(rank))
    return torch.tensor([rank[place] for place in range(rows * columns)])


def van_der_corput(i: int, base: int) -> float:
    """The digits of i > 0 mirrored at the point: 6 = 110 in base 2 -> 0.011 = 3/8. In [0, 1)."""
    value, unit = 0.0, 1.0
    while i:
        unit /= base
        i, digit = divmod(i, base)
        value += digit * unit
    return value


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1): the same shape.

    Adding it to log p and taking the n highest draws n places one after the other, each in proportion to its p.
    """
    tiny = torch.finfo(uniform.dtype).tiny
    return -torch.log((-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny))


def sample(logits: Tensor, uniform: Tensor, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """One token per place and its probability, each (B, N), from logits (B, N, V) and uniform numbers (B, N).

    The token is where the cumulative distribution passes the uniform number: one random number a place instead of V.
    top_k > 0 samples among the top_k likeliest tokens only; the probability is the one among these.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    p = logits.float().softmax(dim=-1)                                                               # (B, N, V)
    cumulative = p.cumsum(dim=-1)
    # Slightly below the total, so that rounding never steps past the last token that is possible at all.
    target = uniform[..., None] * cumulative[..., -1:] * (1 - 1e-6)
    token = torch.searchsorted(cumulative, target, right=True)                                       # (B, N, 1)
    return token[..., 0], p.gather(-1, token)[..., 0]


if __name__ == "__main__":
    for name, n, steps, schedule in (("image", 256, 10, "cosine"), ("image", 256, 10, "square"),
                                     ("image", 16, 10, "cosine"), ("text", 16, 12, "linear")):
        can_remask = name == "text"
        counts = decoding_counts(torch.tensor([n]), steps, schedule, can_remask)[0].tolist()
        print(f"\n{n} {name} tokens in {steps} steps, gamma {schedule}: masked before each step")
        for k, count in enumerate(counts):
            print(f"  k = {k:2}  gamma = {gamma(torch.tensor(k / steps), schedule):.3f}  {count:3}  "
                  + "#" * round(60 * count / n))
    print(f"\nthe Halton order of 4 x 4 places, from the first (0) on\n{halton_rank(4, 4).view(4, 4).numpy()}")
