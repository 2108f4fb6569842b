"""FID, the Inception Score and the CLIP score against closed forms, SciPy and cases by hand."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from nanomagvlt.evaluation.fid import Moments, clip_score, frechet_distance, inception_score


def moments(features: torch.Tensor, batch: int = 10_000) -> Moments:
    seen = Moments()
    for part in features.split(batch):
        seen.update(part)
    return seen


def correlated(count: int, seed: int, width: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g)
            + 3 * torch.rand(width, generator=g))


def test_moments_are_numpys_however_the_batches_fall():
    features = correlated(3000, 1) + 1e4                                       # float32 sums of squares fail here
    whole, bits, merged = moments(features), moments(features, 7), moments(features[:11])
    merged.merge(Moments())
    merged.merge(moments(features[11:]))
    merged.update(features[:0])
    for seen in (whole, bits, merged):
        assert seen.count == 3000
        assert np.allclose(seen.mean, features.double().numpy().mean(0), rtol=1e-14)
        assert np.allclose(seen.covariance, np.cov(features.double().numpy().T), rtol=1e-10, atol=1e-10)


def test_distance_is_that_of_the_matrix_root():
    a, b = moments(correlated(50, 1)), moments(correlated(70, 2))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-10)


def test_distance_in_closed_form():
    """Of N(0, s^2) and N(m, t^2), independent in each of D: sum of m^2 + (s - t)^2. Of equals: 0."""
    axes = torch.eye(3, dtype=torch.float64).repeat(2, 1) * torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None]
    a = moments(axes * torch.tensor([1.0, 2.0, 0.0]))                          # one of them has no spread at all
    b = moments(axes * torch.tensor([3.0, 0.5, 0.0]) + torch.tensor([1.0, 0.0, 4.0]))
    spread = a.covariance[0, 0].sqrt()                                         # of what is 1 in `axes`
    assert frechet_distance(a, b) == pytest.approx(17 + float(spread ** 2) * (2 ** 2 + 1.5 ** 2))
    assert frechet_distance(a, a) == 0
    same = moments(correlated(50, 1))
    assert 0 <= frechet_distance(same, same) < 1e-12


def test_distance_does_not_care_how_features_are_turned():
    turn = torch.linalg.qr(correlated(6, 3).double())[0]                       # orthogonal
    a, b = correlated(50, 1).double(), correlated(70, 2).double()
    plain = frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(a @ turn + 5), moments(b @ turn + 5)) == pytest.approx(plain, rel=1e-9)


def test_distance_refuses():
    six = moments(correlated(50, 1))
    with pytest.raises(ValueError, match="over 6 features wants more images than that on both sides, not 6 and 50"):
        frechet_distance(moments(correlated(6, 2)), six)
    for other in (Moments(), moments(correlated(50, 1, width=5))):
        with pytest.raises(ValueError, match="features of one kind"):
            frechet_distance(six, other)
    with pytest.raises(ValueError, match="5 features an image, after images with 6"):
        six.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="infinite or not a number"):
        six.update(torch.full((2, 6), math.nan))
    with pytest.raises(ValueError, match="two images or more, not 1"):
        moments(torch.zeros(1, 6)).covariance


def test_inception_score_by_hand():
    sure = 1000 * torch.eye(4).repeat(10, 1)                                   # certain, and all classes alike
    assert inception_score(sure) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(40, 7)) == pytest.approx((1, 0))        # nothing known of any
    assert inception_score(sure.sort(0).values, splits=4)[0] == pytest.approx(1)       # one class alone in each split
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    by_hand = math.exp(sum(0.5 * q * math.log(q / mean) for row in p.tolist() for q, mean in zip(row, (0.7, 0.3))))
    assert inception_score(p.log() + 5, splits=1) == pytest.approx((by_hand, 0), rel=1e-6)
    scores = [inception_score(part, splits=1)[0] for part in (sure[:3], sure[3:7])]
    assert inception_score(sure[:7], splits=2) == pytest.approx((np.mean(scores), np.std(scores)))
    with pytest.raises(ValueError, match="over 10 splits wants as many images, not 9"):
        inception_score(sure[:9])


def test_clip_score_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0 + math.sqrt(0.5)) / 3)
    for wrong in (texts[:2], texts[:, :1]):
        with pytest.raises(ValueError, match="no pairs"):
            clip_score(images, wrong)
    with pytest.raises(ValueError, match="no pairs"):
        clip_score(images[:0], texts[:0])
