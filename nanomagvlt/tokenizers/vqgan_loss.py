"""Chapter 8 - The loss of the VQ-GAN: reconstruction and a discriminator (Esser et al., CVPR 2021, section 3.1).

The generator of this GAN is the whole VQ-GAN. Its reconstruction must be near the image: in pixels and, if the weights
for it are given, in the features of VGG16 (LPIPS: Zhang et al., CVPR 2018). A loss on pixels alone gives blurred
images, because the average of all plausible images has the smallest expected error. So a discriminator learns to tell
images from reconstructions, patch by patch, and the generator learns to raise the discriminator's logits.

Shapes: B batch, S image side, P*P patches that the discriminator classifies. Pixels are in [-1, 1]. The training loop
is in training/train_vqgan.py. Read on in bpe.py.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.io import load_strict, one_line_error, read_tensors


class Discriminator(nn.Module):
    """PatchGAN: one logit per patch, high for patches of real images (Isola et al., CVPR 2017)."""

    def __init__(self, channels: int):
        super().__init__()
        sizes = [channels * m for m in (1, 2, 4, 8)]
        blocks = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in zip(sizes, sizes[1:], (2, 2, 1)):
            blocks += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> logits (B, 1, P, P)."""
        return self.net(pixels)


VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # per stage: number of 3x3 convolutions, channels
COMPARED = (3, 8, 15, 22, 29)  # the last ReLU of each stage, as torchvision numbers the layers


class Perceptual(nn.Module):
    """LPIPS: a distance between images in the features of VGG16; it agrees with human judgement better than pixels."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for count, c_out in VGG16:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
                c_in = c_out
        self.features = nn.Sequential(*layers)                                # torchvision's vgg16().features
        self.weights = nn.ParameterList(torch.ones(1, c, 1, 1) for _, c in VGG16)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, vgg: str | Path, lpips: str | Path) -> "Perceptual":
        """Reads torchvision's vgg16-397923af.pth and LPIPS's vgg.pth. Raises ValueError, one line, for another file."""
        module, what = cls(), "weights for LPIPS"
        for path, part, name in ((vgg, module.features, "features.{}"),
                                 (lpips, module.weights, "lin{}.model.1.weight")):
            content = read_tensors(path, what)
            with one_line_error(path, f"not {what}"):  # torchvision's file also has a classifier: not used
                state = {ours: content[name.format(ours)] for ours in part.state_dict()}
            load_strict(part, state, path)
        return module

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images a and b (B, 3, S, S) -> their mean distance, a scalar; 0 if they are equal."""
        h, distance = (torch.cat([a, b]) - self.shift) / self.scale, 0.0
        for i, layer in enumerate(self.features):
            h = layer(h)                                                                           # (2B, C, H, W)
            if i in COMPARED:
                unit_a, unit_b = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)   # (B, C, H, W)
                difference = (unit_a - unit_b).square() * self.weights[COMPARED.index(i)]
                distance = distance + difference.sum(1).mean()
        return distance


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The weight of the adversarial loss that gives both losses equal gradient norms at the decoder's last layer
    (Esser et al., eq. 7). It is at most 10,000, and no gradient passes through it."""
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
             for loss in (reconstruction_loss, adversarial_loss)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


def generator_loss(pixels: Tensor, reconstruction: Tensor, last_layer: Tensor, perceptual: Perceptual | None = None,
                   discriminator: Discriminator | None = None, share: float = 1.0) -> tuple[Tensor, dict]:
    """The loss of the VQ-GAN without the commitment loss, and its terms for the log.

    pixels and reconstruction (B, 3, S, S); last_layer: the weights of the decoder's last convolution; share in [0, 1]:
    the weight of the discriminator. It is frozen here: the gradient passes through it, and does not change it.
    """
    error = reconstruction - pixels
    terms = {"l1": error.abs().mean()}
    loss = terms["l1"] + error.square().mean()
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, pixels)
        loss = loss + terms["perceptual"]
    if discriminator is not None:
        discriminator.requires_grad_(False)
        adversarial = -discriminator(reconstruction).mean()
        discriminator.requires_grad_(True)
        weight = adaptive_weight(loss, adversarial, last_layer)
        loss = loss + share * weight * adversarial
        terms |= {"adversarial": adversarial, "adversarial_weight": share * weight}
    return loss, terms


def discriminator_loss(discriminator: Discriminator, pixels: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict]:
    """The hinge loss and, for the log, the mean logits. The loss is 0 if all logits are above 1 on images and below -1
    on reconstructions. The reconstruction is detached: this loss gives the generator no gradient."""
    real, fake = discriminator(pixels), discriminator(reconstruction.detach())
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return loss, {"logits_real": real.mean(), "logits_fake": fake.mean()}
