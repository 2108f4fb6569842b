"""Appendix - FID's eye: the Inception-v3 by whose features drawings are compared with photographs.

FID (Heusel et al., NeurIPS 2017) and the Inception Score (Salimans et al., NeurIPS 2016) are defined by one network
with one set of weights: Szegedy et al.'s Inception-v3 as TensorFlow published it in 2015, with 1,008 classes.
pytorch-fid carried them over to PyTorch as `pt_inception-2015-12-05-6726825d.pth`; the modules here have its names.
The network is not torchvision's: its average pools leave out the padding, and one of the last pools is a maximum.
Another network, or another way to resize, gives other numbers than everyone's.

Shapes: B images, S their side, C channels. `python data/download.py inception` fetches the weights.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from nanomagvlt.io import first_line

SIDE, FEATURES, CLASSES = 299, 2048, 1008


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. The size stays, but for a stride of 2 or where padding is "valid"."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, padding: str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding if stride == 1 else "valid", bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


# ---- the blocks: branches side by side, each another view of the same thing, joined as channels -------------

class BlockA(nn.Module):
    """35 x 35: views 1, 3 and 5 wide; 5 also as 3 and 3."""

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
                          shrink(x)], 1)


class BlockC(nn.Module):
    """17 x 17: views 7 wide, made of a row and a column."""

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
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(twice)), self.branch_pool(mean_pool(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(before, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(before, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), shrink(x)], 1)


class BlockE(nn.Module):
    """8 x 8: a row and a column side by side. pool is mean_pool in the first and max_pool in the second of the two.

    The papers know the mean alone. The maximum is in the published graph, and by now part of what FID means.
    """

    def __init__(self, before: int, pool: Callable[[Tensor], Tensor]):
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
    """The network without weights: load_inception() gives one with them."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(32, 32, 3, padding="valid"), Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b = BlockB(288), BlockC(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = BlockD(768), BlockE(1280, mean_pool), BlockE(2048, max_pool)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1], of any side -> features (B, 2048)."""
        x = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear")               # no antialiasing: as pytorch-fid does
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))                # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink(x)))                                    # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(shrink(x))))                               # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))         # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                       # (B, 2048, 8, 8)
        return x.mean((2, 3))

    def logits(self, features: Tensor, bias: bool = False) -> Tensor:
        """Features (B, 2048) -> logits (B, 1008). The Inception Score's own code leaves the last layer's bias out."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


@torch.inference_mode()
def inception_features(model: Inception, images: np.ndarray, blur: float = 0) -> Tensor:
    """Images (B, S, S, 3), uint8 -> features (B, 2048), float32, on the CPU.

    blur is FID-k's k (L-Verse, CVPR 2022, table 3; DALL-E before it): the radius of a Gaussian filter in pixels of the
    images as they are, in Pillow's sense of the word, its standard deviation. Reference images are blurred as well.
    """
    if blur:
        images = np.stack([Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)) for image in images])
    pixels = torch.tensor(images, device=model.fc.weight.device).permute(0, 3, 1, 2) / 255       # (B, 3, S, S)
    return model(pixels).cpu()


def load_inception(path: str | Path) -> Inception:
    """The network with pytorch-fid's weights: float32, on the CPU, in evaluation mode, frozen. Nothing in it is run.

    Every tensor of the file must have its place, and every place its tensor. Raises ValueError, one line that names
    the file, where it is not there, damaged or something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: Inception's weights are not there: run `python data/download.py inception`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in any of a dozen ways inside the unpickler
        raise ValueError(f"{path}: no state dict, or a damaged one ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor)
                                              for name, tensor in state.items()):
        raise ValueError(f"{path}: not all of it is tensors with names")
    with torch.device("meta"):                                                 # nothing is initialised in vain
        model = Inception()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # the first line names the class, the second what is wrong
        raise ValueError(f"{path}: no weights of FID's Inception: {str(error).splitlines()[1].strip()[:200]}") from None
    model = model.float().requires_grad_(False).eval()
    return model.to(memory_format=torch.channels_last)                         # 1.5 times as fast
