"""What pytorch-fid's network gives on random weights, what goes in, and files that are to be refused."""
import math
import pickle
import zlib

import numpy as np
import pytest
import torch

from nanomagvlt.evaluation.inception import Inception, inception_features, load_inception


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights, each a function of its name: those that the golden values were made with."""
    def made(name: str, shape: torch.Size) -> torch.Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if name.endswith("running_var") or name.endswith(".bn.weight"):
            return torch.rand(shape, generator=g) + 0.5
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 4 else 0.1 if name.endswith("_mean") else 0.05
        return torch.randn(shape, generator=g) * scale
    with torch.device("meta"):
        names = Inception().state_dict()
    return {name: made(name, tensor.shape) for name, tensor in names.items()}


@pytest.fixture(scope="module")
def model(state, tmp_path_factory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "half.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)
    return load_inception(path)  # files from before PyTorch 0.4.1 have no such counters


def test_features_are_those_of_pytorch_fid(shared, state, model):
    gold = torch.load(shared / "parity" / "inception.golden.pt", weights_only=True)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: list(shape) for name, shape in gold["keys"].items()}
    with torch.inference_mode():
        features = model(gold["images"])
    assert (features - gold["features"]).abs().max() < 1e-4
    assert (model.logits(features, bias=True) - gold["logits_1008"]).abs().max() < 1e-4
    without = model.logits(features)
    assert torch.allclose(without + state["fc.bias"], gold["logits_1008"], atol=1e-4)


def test_images_in_features_out(model):
    images = np.random.default_rng(0).integers(256, size=(2, 20, 20, 3), dtype=np.uint8)
    features = inception_features(model, images)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    pixels = torch.tensor(images / 255, dtype=torch.float32).permute(0, 3, 1, 2)
    assert torch.allclose(features, model(pixels), atol=1e-4)
    blurred = inception_features(model, images, blur=2)
    assert (blurred - features).abs().max() > 0.1
    flat = np.full((1, 20, 20, 3), 77, np.uint8)                               # a flat image has nothing to blur
    assert torch.equal(inception_features(model, flat, blur=2), inception_features(model, flat))


def test_large_images_are_resized_without_antialiasing(model):
    """At a third of the side, bilinear interpolation alone sees the middle of every three pixels."""
    pixels = torch.rand(1, 3, 3 * 299, 3 * 299, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(pixels), model(pixels[..., 1::3, 1::3]), atol=1e-4)


def test_blur_is_a_gaussian_whose_deviation_is_k():
    """A white point on black becomes a spot of that variance along each axis."""
    class Pixels(torch.nn.Module):
        fc = torch.nn.Linear(1, 1)

        def forward(self, pixels):
            return pixels
    image = np.zeros((1, 61, 61, 3), np.uint8)
    image[:, 24:37, 24:37] = 255                                               # a square, as 8 bits lose a point
    at = torch.arange(61.0) - 30

    def variance(k: float) -> float:
        share = inception_features(Pixels(), image, blur=k)[0, 0].sum(0)
        return float((share * at ** 2).sum() / share.sum())
    for k in (1, 2, 4):
        assert variance(k) - variance(0) == pytest.approx(k ** 2, rel=0.1)


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_inception(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_what_is_no_inception_is_refused(state, tmp_path):
    path = tmp_path / "weights.pth"
    refused(path, "not there: run `python data/download.py inception`")
    path.write_bytes(b"<html>404</html>")
    refused(path, "no state dict, or a damaged one")
    path.write_bytes(pickle.dumps(print, protocol=2))
    refused(path, "no state dict, or a damaged one")
    for content in ([1], {"state": {}}, {1: torch.zeros(1)}):
        torch.save(content, path)
        refused(path, "not all of it is tensors with names")
    small = {name: tensor for name, tensor in state.items() if name.startswith("Conv2d_1a")}
    torch.save(small, path)
    refused(path, "no weights of FID's Inception: Missing key")
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(1)}, path)
    refused(path, "no weights of FID's Inception: Unexpected key.*AuxLogits.fc.weight")
    torch.save({**state, "fc.bias": torch.zeros(1000)}, path)                  # torchvision's has 1,000 classes
    refused(path, "no weights of FID's Inception: size mismatch for fc.bias")
