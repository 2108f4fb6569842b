"""Inception against pytorch-fid's outputs; FID, the Inception Score and the CLIP score against SciPy and by hand."""
import math
import zlib

import numpy as np
import pytest
import scipy.linalg
import torch
from test_checkpoint import refused

from nanomagvlt.evaluation.fid import (Inception, clip_score, frechet_distance, inception_features, inception_score,
                                       load_inception)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights, each a function of its name: the golden outputs were made with them."""
    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith("running_var") or name.endswith(".bn.weight"):
            return torch.rand(shape, generator=g) + 0.5
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 4 else 0.1 if name.endswith("_mean") else 0.05
        return torch.randn(shape, generator=g) * scale
    with torch.device("meta"):
        names = Inception().state_dict()
    return {name: weight(name, tensor.shape) for name, tensor in names.items()}


@pytest.fixture(scope="module")
def model(state, tmp_path_factory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "old.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)
    return load_inception(path)  # a file from before PyTorch 0.4.1 has no such counters


def test_features_and_logits_are_those_of_pytorch_fid(shared, state, model):
    gold = torch.load(shared / "parity" / "inception.golden.pt", weights_only=True)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: list(shape) for name, shape in gold["keys"].items()}
    with torch.inference_mode():
        features = model(gold["images"])
    assert (features - gold["features"]).abs().max() < 1e-4
    assert (model.logits(features) + state["fc.bias"] - gold["logits_1008"]).abs().max() < 1e-4


def test_large_uint8_images_are_resized_without_antialiasing(model):
    """At a third of the side, bilinear interpolation alone takes the middle of every three pixels."""
    images = np.random.default_rng(0).integers(256, size=(2, 3 * 299, 3 * 299, 3), dtype=np.uint8)
    middle = torch.tensor(images[:, 1::3, 1::3] / 255, dtype=torch.float32).permute(0, 3, 1, 2)
    assert torch.allclose(inception_features(model, images), model(middle), atol=1e-4)


def test_blur_adds_the_variance_of_a_gaussian_with_deviation_k():
    pixels = torch.nn.Identity()
    pixels.fc = torch.nn.Linear(1, 1)
    image = np.zeros((1, 61, 61, 3), np.uint8)
    image[:, 24:37, 24:37] = 255                                               # 8 bits are too few for a single point
    at = torch.arange(61.0) - 30

    def variance(k: float) -> float:
        share = inception_features(pixels, image, blur=k)[0, 0].sum(0)
        return float((share * at ** 2).sum() / share.sum())
    for k in (1, 2, 4):
        assert variance(k) - variance(0) == pytest.approx(k ** 2, rel=0.1)


def test_files_that_are_not_inceptions_weights_are_refused(state, tmp_path):
    for content, word in (([1], "dictionary"), ({**state, "fc.bias": torch.zeros(1000)}, "fc.bias")):  # torchvision's
        torch.save(content, tmp_path / "a.pth")
        refused(load_inception, tmp_path / "a.pth", word)


def correlated(count: int, seed: int, width: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g)
            + 3 * torch.rand(width, generator=g))


def test_distance_is_that_of_the_matrix_root():
    a, b = correlated(3000, 1) + 1e4, correlated(70, 2) + 1e4                  # float32 is not enough here
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_in_closed_form():
    """Of N(0, s^2) and N(m, t^2), independent in each dimension: sum of m^2 + (s - t)^2. Of equals: 0."""
    axes = torch.eye(3, dtype=torch.float64).repeat(2, 1) * torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None]
    a = axes * torch.tensor([1.0, 2.0, 0.0])                                   # no variance in the third dimension
    b = axes * torch.tensor([3.0, 0.5, 0.0]) + torch.tensor([1.0, 0.0, 4.0])
    variance = 2 / 5                                                           # of each dimension of `axes`, unbiased
    assert frechet_distance(a, b) == pytest.approx(17 + variance * (2 ** 2 + 1.5 ** 2))
    assert frechet_distance(a, a) == 0


def test_features_that_are_not_finite_have_no_distance():
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(correlated(50, 1), torch.full((50, 6), math.nan))


def test_inception_score_by_hand():
    certain = 1000 * torch.eye(4).repeat(10, 1)                                # and all classes are equally frequent
    assert inception_score(certain) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(40, 7)) == pytest.approx((1, 0))        # no information about any image
    assert inception_score(certain.sort(0).values, splits=4)[0] == pytest.approx(1)    # one class in each split
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    by_hand = math.exp(sum(0.5 * q * math.log(q / mean) for row in p.tolist() for q, mean in zip(row, (0.7, 0.3))))
    assert inception_score(p.log() + 5, splits=1) == pytest.approx((by_hand, 0), rel=1e-6)
    assert inception_score(certain[:7], splits=2) == pytest.approx((3.5, 0.5))         # of 3 and of 4 images


def test_clip_score_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0 + math.sqrt(0.5)) / 3)
