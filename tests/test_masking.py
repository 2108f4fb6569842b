import math

import pytest
import torch

from nanomagvlt.masking import (SCHEDULES, bottom_k_mask, decoding_counts, gamma, gumbel, halton_rank, num_masked,
                                order_scores)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_falls_from_exactly_one_to_exactly_zero(schedule, dtype):
    share = gamma(torch.linspace(0, 1, 1001, dtype=dtype), schedule)
    assert share[0] == 1 and share[-1] == 0
    assert (share.diff() < 0).all()


def test_gamma_is_the_papers():
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gamma(u, "cosine"), torch.cos(u * math.pi / 2), atol=1e-15)
    assert torch.equal(gamma(u, "linear"), 1 - u) and torch.allclose(gamma(u, "square") + u ** 2, torch.ones_like(u))


def test_num_masked_is_the_ceiling_between_one_and_all():
    for n in (1, 2, 16, 64, 256):
        for i in range(n + 1):
            for delta in (-0.3, 0.0, 0.3):
                share = min(1.0, max(0.0, (i + delta) / n))
                expected = min(n, max(1, i + (delta > 0)))  # ceil(i - 0.3) = ceil(i) = i, ceil(i + 0.3) = i + 1
                assert num_masked(torch.tensor([share], dtype=torch.float64), n).item() == expected


def kept(counts):
    counts = counts[0].tolist() + [0]
    return [a - b for a, b in zip(counts, counts[1:])]


def test_decoding_counts_are_those_of_the_released_code():
    assert kept(decoding_counts(torch.tensor([256]), 10, "cosine", False)) == [3, 9, 15, 21, 26, 31, 34, 37, 39, 41]
    assert kept(decoding_counts(torch.tensor([64]), 10, "cosine", False)) == [1, 2, 3, 6, 6, 8, 8, 10, 9, 11]
    text = decoding_counts(torch.tensor([16]), 12, "linear", True)[0].tolist()
    assert text == [16, 14, 13, 12, 10, 9, 8, 6, 5, 4, 2, 1]
    for length in range(1, 65):  # in whole numbers: floor(L (K - k) / K), at least 1
        assert (decoding_counts(torch.tensor([length]), 12, "linear", True)[0].tolist()
                == [max(1, length * (12 - k) // 12) for k in range(12)])


def test_every_step_reveals_at_least_one_image_token():
    n = torch.arange(1, 65)
    for schedule in SCHEDULES:
        for steps in range(1, 65):
            enough = n[n >= steps]
            counts = decoding_counts(enough, steps, schedule, False)
            assert (counts[:, 0] == enough).all() and (counts[:, -1] >= 1).all() and (counts.diff(dim=1) < 0).all()


def test_bottom_k_takes_exactly_k_and_only_where_allowed():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 20, generator=g)
    among = torch.rand(500, 20, generator=g) < 0.7
    count = (torch.rand(500, generator=g) * (among.sum(1) + 1)).long()
    chosen = bottom_k_mask(scores, count, among)
    assert torch.equal(chosen.sum(1), count) and not (chosen & ~among).any()
    for row in range(500):  # by sorting, one row at a time
        best = sorted(scores[row][among[row]].tolist())[:count[row]]
        assert sorted(scores[row][chosen[row]].tolist()) == best


def test_bottom_k_of_uniform_scores_is_a_uniform_choice():
    scores = torch.rand(30_000, 4, generator=torch.Generator().manual_seed(0))
    chosen = bottom_k_mask(scores, torch.full((30_000,), 2), torch.ones_like(scores, dtype=torch.bool))
    pairs = (chosen * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    assert (pairs > 0).sum() == 6 and (pairs[pairs > 0] - 5000).abs().max() < 300  # 4.6 sigma


def test_gumbel_top_draws_in_proportion():
    p = torch.tensor([0.5, 0.3, 0.2])
    uniform = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(0))
    first = (p.log() + gumbel(uniform)).argmax(1).bincount(minlength=3) / 40_000
    assert torch.allclose(first, p, atol=0.01)
    assert gumbel(torch.tensor([0.0, 1.0 - 2 ** -24])).isfinite().all()


def test_halton_visits_every_cell_once_and_spreads():
    """The sides of the 4 x 3 cells are powers of the bases: 12 points in a row visit each of them once."""
    for rows, columns in ((4, 4), (3, 4), (16, 16), (1, 24)):
        assert sorted(halton_rank(rows, columns).tolist()) == list(range(rows * columns))
    assert halton_rank(1, 8).tolist() == [7, 3, 1, 5, 0, 4, 2, 6]  # 1/2, 1/4, 3/4, 1/8, ... and 0 (8 / 16) last
    rank = halton_rank(9, 8).view(3, 3, 4, 2)                                                   # cells of 3 x 2
    assert ((rank < 12).sum(dim=(1, 3)) == 1).all()


def test_orders():
    confidence, uniform = torch.randn(3, 16).log_softmax(1), torch.rand(3, 16)
    rank = halton_rank(4, 4)
    assert order_scores("confidence", confidence, 1.0, uniform, rank) is confidence
    assert order_scores("random", confidence, 1.0, uniform, rank) is uniform
    assert torch.equal(order_scores("gumbel", confidence, 0.0, uniform, rank), confidence)
    assert torch.equal(order_scores("inverse", confidence, 1.0, uniform, rank), confidence - gumbel(uniform))
    assert torch.equal(order_scores("halton", confidence, 1.0, uniform, rank)[2], -rank.float())
    with pytest.raises(ValueError, match="alphabetical"):
        order_scores("alphabetical", confidence, 1.0, uniform, rank)
