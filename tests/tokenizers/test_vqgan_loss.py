"""The painter and the critic: neither moves the other, and each term is what its formula says."""
import pytest
import torch

from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.tokenizers.vqgan_loss import Discriminator, Perceptual, adaptive_weight, adversary_share, discriminator_loss, generator_loss


@pytest.fixture
def players(cfg):
    torch.manual_seed(0)
    cfg.image_size = 32
    return VQGAN(cfg), Discriminator(8), torch.rand(4, 3, 32, 32) * 2 - 1


def test_neither_player_leaves_a_gradient_in_the_other(players):
    vqgan, critic, pixels = players
    reconstruction = vqgan(pixels)[0]
    generator_loss(pixels, reconstruction, vqgan.decoder.conv_out.weight, critic, share=1.0)[0].backward()
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert any(p.grad is not None for p in vqgan.parameters())
    vqgan.zero_grad()
    discriminator_loss(critic, pixels, reconstruction)[0].backward()
    assert all(p.grad is None for p in vqgan.parameters())
    assert all(p.grad is not None for p in critic.parameters())


def test_the_critic_pleases_and_is_pleased():
    """Hinge: no loss where opinions are beyond the margin; the painter wants high opinions."""
    class Says(torch.nn.Module):
        def forward(self, pixels):
            return pixels
    good, bad = torch.full((2, 3, 4, 4), 1.5), torch.full((2, 3, 4, 4), -2.0)
    assert discriminator_loss(Says(), good, bad)[0] == 0
    assert discriminator_loss(Says(), bad, good)[0] == (3.0 + 2.5) / 2


def test_adaptive_weight_balances_the_pull_and_is_clamped():
    w = torch.ones(3, requires_grad=True)
    assert torch.isclose(adaptive_weight((6 * w).sum(), (2 * w).sum(), w), torch.tensor(3.0), rtol=1e-3)
    assert adaptive_weight((1e9 * w).sum(), (0 * w).sum(), w) == 1e4
    assert not adaptive_weight(w.square().sum(), w.sum(), w).requires_grad


def test_the_critic_comes_late_and_slowly():
    assert [adversary_share(step, 10, 5) for step in (0, 9, 10, 12, 14, 15, 99)] == [0, 0, 0.2, 0.6, 1, 1, 1]


def test_perceptual_distance(tmp_path):
    """Against LPIPS written out with the features taken one by one."""
    torch.manual_seed(0)
    module = Perceptual()
    state = {f"features.{name}": tensor for name, tensor in module.features.state_dict().items()}
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    torch.save(lin, tmp_path / "lpips.pth")
    module = Perceptual.load(tmp_path / "vgg.pth", tmp_path / "lpips.pth")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected = 0.0
    for i, last in enumerate((3, 8, 15, 22, 29)):                        # the ReLUs, as torchvision numbers them
        f, g = ((module.features[:last + 1]((x - module.shift) / module.scale)) for x in (a, b))
        f, g = (h / (h.norm(dim=1, keepdim=True) + 1e-10) for h in (f, g))
        expected += (lin[f"lin{i}.model.1.weight"] * (f - g) ** 2).sum(1).mean()
    assert torch.allclose(module(a, b), expected) and module(a, a) == 0
    assert not any(p.requires_grad for p in module.parameters())
    for vgg, lpips, message in (("no.pth", "lpips.pth", "no such file"), ("lpips.pth", "lpips.pth", "no weights of"),
                                ("vgg.pth", "vgg.pth", "no weights of")):
        with pytest.raises(ValueError, match=message) as error:
            Perceptual.load(tmp_path / vgg, tmp_path / lpips)
        assert "\n" not in str(error.value)
