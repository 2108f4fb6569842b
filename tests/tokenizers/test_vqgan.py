import pytest
import torch

from nanomagvlt.config import preset
from nanomagvlt.tokenizers.vqgan import VQGAN, Codebook, codebook_use


@pytest.fixture
def vqgan(cfg) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(cfg).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_quantiser_equals_brute_force(vqgan):
    z = torch.randn(200, 4)
    e = vqgan.quantize.embedding.weight
    expected = [min(range(len(e)), key=lambda i: ((row - e[i]) ** 2).sum().item()) for row in z]
    assert vqgan.quantize(z).tolist() == expected


def test_tokens_are_in_raster_order_and_decode_inverts_their_lookup(vqgan, cfg):
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    tokens, z = vqgan.encode(pixels), vqgan.features(pixels)
    assert tokens.shape == (3, 4)
    for row in range(2):
        for column in range(2):
            assert torch.equal(vqgan.quantize(z[:, :, row, column]), tokens[:, 2 * row + column])
            assert torch.equal(
                vqgan.vectors_of(tokens)[:, :, row, column], vqgan.quantize.embedding(tokens[:, 2 * row + column]))
    reconstruction, commitment, _, codes = vqgan(pixels)
    assert torch.equal(codes, tokens) and torch.allclose(reconstruction, vqgan.decode(tokens), atol=1e-5)
    assert torch.allclose(commitment, (z - vqgan.vectors_of(tokens)).square().mean())


def test_patchwise_encoder_sees_one_patch_and_no_more(vqgan):
    pixels = torch.rand(2, 3, 16, 16)
    other = pixels.clone()
    other[:, :, 8:, :8] += 0.5  # the patch of token 2
    changed = (vqgan.features(other) != vqgan.features(pixels)).any(1).flatten(1)
    assert changed.tolist() == [[False, False, True, False]] * 2
    vqgan.cfg.vq_patchwise = False
    assert (vqgan.features(other) != vqgan.features(pixels)).any(1).all()


def test_straight_through(vqgan):
    """The decoder's gradient reaches the features as it is; the codebook gets none; commitment pulls to the codes."""
    pixels = torch.rand(2, 3, 16, 16)
    reconstruction, commitment, z, codes = vqgan(pixels)
    to_z, = torch.autograd.grad(reconstruction.sum(), z, retain_graph=True)
    vectors = vqgan.vectors_of(codes).detach().requires_grad_()
    expected, = torch.autograd.grad(vqgan.paint(vectors).sum(), vectors)
    assert torch.allclose(to_z, expected, rtol=1e-3, atol=1e-3)
    pull, = torch.autograd.grad(commitment, z, retain_graph=True)
    assert torch.allclose(pull, 2 * (z - vectors) / z.numel())
    (reconstruction.sum() + commitment).backward()
    assert vqgan.quantize.embedding.weight.grad is None


def test_kmeans_start_finds_well_separated_clusters():
    centres = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * 20
    z = (centres[:, None] + 0.1 * torch.randn(12, 50, 4)).flatten(0, 1)
    embedding = torch.nn.Embedding(12, 4)
    Codebook(embedding, 0.9).start(z, torch.Generator().manual_seed(0))
    assert torch.cdist(embedding.weight, centres).min(0).values.max() < 0.1


def test_codes_follow_their_features_and_dead_ones_are_revived():
    embedding = torch.nn.Embedding(3, 2)
    embedding.weight.data = torch.tensor([[0.0, 0.0], [10.0, 10.0], [99.0, 99.0]])  # nothing is near the third
    codebook = Codebook(embedding, 0.5)
    codebook.total = embedding.weight.detach().clone()
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [11.0, 11.0], [8.0, 8.0]])
    for step in range(30):
        codes = torch.cdist(z, embedding.weight).argmin(1)
        codebook.update(z, codes, torch.Generator().manual_seed(step))
    weight = embedding.weight.detach()
    assert (torch.cdist(weight, z).min(1).values < 1.5).all()  # none is far from every feature
    assert sorted(torch.cdist(z, weight).argmin(1).unique().tolist()) == [0, 1, 2]


def test_moving_average_by_hand():
    embedding = torch.nn.Embedding(2, 1)
    embedding.weight.data = torch.tensor([[0.0], [10.0]])
    codebook = Codebook(embedding, 0.75)
    codebook.update(torch.tensor([[2.0], [4.0], [12.0]]), torch.tensor([0, 0, 1]), torch.Generator().manual_seed(0))
    # count: 0.75 * 1 + 0.25 * (2, 1); total: 0.75 * (0, 10) + 0.25 * (6, 12)
    assert torch.allclose(embedding.weight, torch.tensor([[1.5 / 1.25], [10.5]]))


def test_codebook_use():
    assert codebook_use(torch.tensor([0, 1, 2, 3]), 8) == (0.5, pytest.approx(4.0))
    assert codebook_use(torch.zeros(2, 3, dtype=torch.long), 8) == (0.125, pytest.approx(1.0))


def test_names_and_size_are_those_of_taming_transformers():
    cfg = preset("tiny", image_size=256, codebook_size=16384, codebook_dim=256, vq_channels=128,
                 vq_multipliers=(1, 1, 2, 2, 4), vq_res_blocks=2, vq_attention=(16, ), vq_latent=256, vq_groups=32,
                 vq_patchwise=False)
    with torch.device("meta"):
        model = VQGAN(cfg)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert (count(model.encoder), count(model.decoder), count(model)) == (29_298_176, 42_449_795, 76_073_859)
    names = {name for name, _ in model.named_parameters()}
    assert {
        "encoder.down.0.block.0.norm1.weight", "encoder.down.2.block.0.nin_shortcut.bias",
        "encoder.down.4.attn.1.proj_out.weight", "encoder.down.3.downsample.conv.weight", "encoder.mid.attn_1.q.weight",
        "decoder.up.4.attn.2.norm.weight", "decoder.up.1.upsample.conv.bias", "decoder.conv_out.weight",
        "quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias"
    } <= names
