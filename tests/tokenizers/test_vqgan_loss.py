"""Each loss trains one network only, and each term equals its formula."""
import pytest
import torch

from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.tokenizers.vqgan_loss import (Discriminator, Perceptual, adaptive_weight, discriminator_loss,
                                              generator_loss)


def test_each_loss_gives_a_gradient_to_its_own_network_only(cfg):
    torch.manual_seed(0)
    cfg.image_size = 32
    vqgan, discriminator, pixels = VQGAN(cfg), Discriminator(8), torch.rand(4, 3, 32, 32) * 2 - 1
    reconstruction = vqgan(pixels)[0]
    loss, _ = generator_loss(pixels, reconstruction, vqgan.decoder.conv_out.weight, discriminator=discriminator)
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    assert any(p.grad is not None for p in vqgan.parameters())
    vqgan.zero_grad()
    discriminator_loss(discriminator, pixels, reconstruction)[0].backward()
    assert all(p.grad is None for p in vqgan.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


def test_the_hinge_loss_is_zero_if_all_logits_are_beyond_the_margin():
    high, low = torch.full((2, 1, 4, 4), 1.5), torch.full((2, 1, 4, 4), -2.0)     # the images are the logits
    assert discriminator_loss(torch.nn.Identity(), high, low)[0] == 0
    assert discriminator_loss(torch.nn.Identity(), low, high)[0] == (3.0 + 2.5) / 2


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_and_at_most_10_000():
    w = torch.ones(3, requires_grad=True)
    assert torch.isclose(adaptive_weight((6 * w).sum(), (2 * w).sum(), w), torch.tensor(3.0), rtol=1e-3)
    assert adaptive_weight((1e9 * w).sum(), (0 * w).sum(), w) == 1e4
    assert not adaptive_weight(w.square().sum(), w.sum(), w).requires_grad


def test_the_perceptual_distance_equals_lpips_written_out(tmp_path):
    torch.manual_seed(0)
    state = {f"features.{name}": tensor for name, tensor in Perceptual().features.state_dict().items()}
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    vgg, lpips, absent = (tmp_path / name for name in ("vgg.pth", "lpips.pth", "absent.pth"))
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, vgg)
    torch.save(lin, lpips)
    module = Perceptual.load(vgg, lpips)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected = 0.0
    for i, last in enumerate((3, 8, 15, 22, 29)):                        # the ReLUs, as torchvision numbers them
        f, g = ((module.features[:last + 1]((x - module.shift) / module.scale)) for x in (a, b))
        f, g = (h / (h.norm(dim=1, keepdim=True) + 1e-10) for h in (f, g))
        expected += (lin[f"lin{i}.model.1.weight"] * (f - g) ** 2).sum(1).mean()
    assert torch.allclose(module(a, b), expected) and module(a, a) == 0
    assert not any(p.requires_grad for p in module.parameters())
    for culprit, pair in ((absent, (absent, lpips)), (lpips, (lpips, lpips)), (vgg, (vgg, vgg))):
        with pytest.raises(ValueError, match=f"{culprit.name}[^\n]*$"):
            Perceptual.load(*pair)
