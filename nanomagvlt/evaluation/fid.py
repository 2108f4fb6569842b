"""The common measures of generated images: FID, the Inception Score and the CLIP score.

A program cannot judge drawings of real scenes exactly, as it can in the small world. So networks compute features of
the images, and these measures compare the features:
  FID               the distance between the features of drawings and of photographs, each taken as a normal
                    distribution (Heusel et al., NeurIPS 2017)
  Inception Score   high if each image clearly has one class, and all classes occur (Salimans et al., NeurIPS 2016)
  CLIP score        how well an image and its text agree by CLIP's features (see sampling/clip.py)

FID and the Inception Score are defined by one network with one set of weights: the Inception-v3 (Szegedy et al., CVPR
2016) that TensorFlow published in 2015, with 1,008 classes. pytorch-fid converted the weights to PyTorch; the modules
here have its names. The network is not torchvision's: its average pools do not count the padding, and one of its last
pools takes the maximum. Another network, or another way to resize, gives numbers that cannot be compared.

Shapes: B images of S x S pixels in a batch, M images in all, D = 2048 features, C = 1008 classes, E CLIP features.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from nanomagvlt.io import load_strict, read_tensors

mean_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
max_pool = nn.MaxPool2d(3, stride=1, padding=1)
halve = nn.MaxPool2d(3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. It keeps the image's size, unless the stride is 2 or the padding "valid"."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding if stride == 1 else "valid", bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


# Each block computes several branches from the same input and concatenates them as channels.

class BlockA(nn.Module):
    """35 x 35. Branches with fields of view of 1, 3 and 5 pixels; 5 also as two convolutions of 3."""

    def __init__(self, before: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(before, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(before, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(mean_pool(x))], 1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3 = Conv(before, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          halve(x)], 1)


class BlockC(nn.Module):
    """17 x 17. A field of view of 7 x 7, as a convolution over the row and one over the column."""

    def __init__(self, before: int, inner: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(before, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(before, inner, 1), Conv(inner, inner, row)
        self.branch7x7_3 = Conv(inner, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(before, inner, 1), Conv(inner, inner, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(inner, inner, row), Conv(inner, inner, column)
        self.branch7x7dbl_5 = Conv(inner, 192, row)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_2(self.branch7x7_1(x))
        twice = self.branch7x7dbl_4(self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x))))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(once), self.branch7x7dbl_5(twice),
                          self.branch_pool(mean_pool(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(before, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(before, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), halve(x)], 1)


class BlockE(nn.Module):
    """8 x 8. A row and a column beside each other. `pool` is mean_pool in the first such block, max_pool in the second.

    The paper has only the mean. The maximum is in the published graph, and so it is a part of what FID means.
    """

    def __init__(self, before: int, pool: nn.Module):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = Conv(before, 320, 1)
        self.branch3x3_1 = Conv(before, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
                          self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The network without weights; load_inception() gives one with weights."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(32, 32, 3, padding="valid"), Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b = BlockB(288), BlockC(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = BlockD(768), BlockE(1280, mean_pool), BlockE(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1], of any size -> features (B, D)."""
        x = F.interpolate(pixels, (299, 299), mode="bilinear")                 # without antialiasing, as pytorch-fid
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))                # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))                                     # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))                                # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))         # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                       # (B, D, 8, 8)
        return x.mean((2, 3))                                                                    # (B, D)

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, C). The Inception Score's own code omits the bias of the last layer."""
        return F.linear(features, self.fc.weight)


def load_inception(path: str | Path) -> Inception:
    """The network with pytorch-fid's weights: float32, on the CPU, in evaluation mode, without gradients.

    `python data/download.py inception` fetches the file. Raises ValueError, one line, for another file.
    """
    state = read_tensors(path, "the weights of FID's Inception")
    with torch.device("meta"):
        model = Inception()
    if isinstance(state, dict):  # PyTorch before 0.4.1 saved no counters of batches, which only training needs
        counters = (name for name in model.state_dict() if name.endswith("num_batches_tracked"))
        state = {**dict.fromkeys(counters, torch.tensor(0)), **state}
    model = load_strict(model, state, path).requires_grad_(False)
    return model.to(memory_format=torch.channels_last)                         # 1.5 times as fast


@torch.inference_mode()
def inception_features(model: Inception, images: np.ndarray, blur: float = 0) -> Tensor:
    """Images (B, S, S, 3), uint8 -> features (B, D), float32, on the CPU.

    blur is the k of FID-k (L-Verse, CVPR 2022, table 3; DALL-E before it): the standard deviation, in pixels, of a
    Gaussian filter on images of this size. The drawings and the photographs are both blurred.
    """
    if blur:
        images = np.stack([Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)) for image in images])
    pixels = torch.tensor(images, device=model.fc.weight.device).permute(0, 3, 1, 2) / 255       # (B, 3, S, S)
    return model(pixels).cpu()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of features (M, D) and (M', D) on the CPU: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    m and S are the means and the covariances. The trace of (S_a S_b)^(1/2) is the sum of the singular values of
    S_a^(1/2) S_b^(1/2). So no root of an asymmetric matrix is needed, and no small number on the diagonals.
    With M <= D images a covariance does not have full rank: the distance has no meaning. Raises ValueError for NaN.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("FID: some features are infinite or NaN; check the images and Inception's weights")
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)                                                    # (D, D) each
    common = torch.linalg.svdvals(root(s_a) @ root(s_b)).sum()                                   # tr (S_a S_b)^(1/2)
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * common
    return max(0.0, float(distance))                                           # rounding may make it just negative


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance (D, D). Eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y | x) || p(y))) from logits (M, C) of Inception.logits(): mean and standard deviation over splits.

    The splits are consecutive images, as in the authors' code: shuffle images that are in the order of their classes.
    """
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, end in zip(edges, edges[1:]):
        log_p = logits[start:end].double().log_softmax(1)                      # (M / splits, C): log p(y | x)
        log_mean = log_p.logsumexp(0) - math.log(end - start)                  # (C,): log p(y)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """100 max(cos, 0), averaged over M pairs: CLIP's features (M, E) of images and, row by row, of their texts.

    Hessel et al. (EMNLP 2021) multiply by 2.5; papers that report 0.32, such as MAGVLT's, report the cosine itself.
    """
    return float(100 * F.cosine_similarity(image_features.double(), text_features.double()).clamp(min=0).mean())
