"""Chapter 7 - What trains the VQ-GAN: a painter and a critic (Esser et al., CVPR 2021, section 3.1).

The painter (the GAN's generator: here the whole VQ-GAN) wants its reconstruction to be near the image: in pixels, and,
where the weights for it are given, in the features of a network that has learnt to see (LPIPS: Zhang et al., CVPR
2018). Pixels alone make blurred pictures, since the average of all that is possible is the safest guess. So a critic
(the GAN's discriminator, a PatchGAN) learns to tell image from reconstruction, patch by patch, and the painter learns
to please it too.

The two players are two functions, generator_loss() and discriminator_loss(). They take turns, and neither is to move the
other: the painter's gradient runs through the critic but changes nothing there, the critic sees reconstructions as
given pictures.

Shapes: B batch, S image side. Pixels are in [-1, 1]. The loop is in vqtrain.py. Read on in bpe.py.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomagvlt.io import first_line


class Discriminator(nn.Module):
    """PatchGAN: one opinion for every patch of a picture, high for real ones (Isola et al., CVPR 2017)."""

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        sizes = [channels * min(2 ** i, 8) for i in range(layers + 1)]
        blocks = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):  # the last of them keeps the resolution
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(sizes[i - 1], sizes[i], 4, stride, padding=1, bias=False), nn.BatchNorm2d(sizes[i]),
                       nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> opinions (B, 1, P, P)."""
        return self.net(pixels)


VGG16 = (2, 2, 3, 3, 3)              # 3x3 convolutions before each of the five places that are compared
VGG16_CHANNELS = (64, 128, 256, 512, 512)


class Perceptual(nn.Module):
    """LPIPS: the distance of two pictures in the features of VGG16, as people judge it."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for i, (count, c_out) in enumerate(zip(VGG16, VGG16_CHANNELS)):
            layers += [nn.MaxPool2d(2)] if i else []
            for _ in range(count):
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
                c_in = c_out
        self.features = nn.Sequential(*layers)                                # numbered as torchvision numbers them
        self.weights = nn.ParameterList(torch.ones(c) for c in VGG16_CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, vgg: str | Path, lpips: str | Path) -> "Perceptual":
        """From torchvision's vgg16-397923af.pth and LPIPS's vgg.pth. Raises ValueError where one is something else."""
        module = cls()
        for path, prefix in ((vgg, "features."), (lpips, "lin")):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
                if prefix == "features.":
                    module.features.load_state_dict({n.removeprefix(prefix): t for n, t in state.items()})
                else:
                    for i, weight in enumerate(module.weights):
                        weight.copy_(state[f"lin{i}.model.1.weight"].view(weight.shape))
            except FileNotFoundError:
                raise ValueError(f"{path}: there is no such file") from None
            except Exception as error:  # a foreign file fails in many ways: in the unpickler, by names, by shapes
                raise ValueError(f"{path}: no weights of VGG16 for LPIPS ({first_line(error)})") from None
        return module

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) twice -> the mean distance, a scalar, 0 for equal ones."""
        h, distance, level = (torch.cat([a, b]) - self.shift) / self.scale, 0.0, 0
        compared = {sum(VGG16[:i + 1]) * 2 + i - 1 for i in range(len(VGG16))}     # after relu1_2, 2_2, 3_3, 4_3, 5_3
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in compared:
                unit = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
                one, other = unit.chunk(2)
                difference = (one - other).square() * self.weights[level][:, None, None]
                distance, level = distance + difference.sum(1).mean(), level + 1
        return distance


def adversary_share(step: int, start: int, ramp: int) -> float:
    """How much the critic counts at an update: nothing before `start`, then rising to 1 over `ramp` updates."""
    return min(1.0, max(0.0, (step - start + 1) / max(1, ramp)))


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """What makes both losses pull equally hard at the decoder's last layer; at most 10,000, and a constant."""
    near = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0].norm()
    far = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0].norm()
    return (near / (far + 1e-4)).clamp(0.0, 1e4).detach()


def generator_loss(pixels: Tensor, reconstruction: Tensor, last_layer: Tensor, critic: Discriminator | None = None,
                 perceptual: Perceptual | None = None, share: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """What the VQ-GAN wants less of, and its parts, for the log. pixels and reconstruction (B, 3, S, S).

    share in [0, 1]: how much the critic counts. The critic gets no gradient: its weights stand still while it judges.
    """
    error = reconstruction - pixels
    terms = {"l1": error.abs().mean()}
    loss = terms["l1"] + error.square().mean()
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, pixels)
        loss = loss + terms["perceptual"]
    if critic is not None and share > 0:
        critic.requires_grad_(False)
        adversarial = -critic(reconstruction).mean()
        critic.requires_grad_(True)
        weight = adaptive_weight(loss, adversarial, last_layer)
        loss = loss + share * weight * adversarial
        terms |= {"adversarial": adversarial, "adversarial_weight": share * weight}
    return loss, {name: term.detach() for name, term in terms.items()}


def discriminator_loss(critic: Discriminator, pixels: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The hinge: opinions above 1 on images and below -1 on reconstructions are good enough.

    The reconstruction is detached: the critic's progress is not to be paid for by the painter.
    """
    real, fake = critic(pixels), critic(reconstruction.detach())
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return loss, {"critic_real": real.mean().detach(), "critic_fake": fake.mean().detach()}
