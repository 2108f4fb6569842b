"""The VQ-GAN against brute force, cases worked by hand, and the names and sizes of taming-transformers."""
import pytest
import torch

from nanomagvlt.config import preset
from nanomagvlt.rng import keyed_generator
from nanomagvlt.tokenizers.vqgan import VQGAN, Codebook, codebook_use


@pytest.fixture
def vqgan(cfg) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(cfg).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_the_quantiser_equals_brute_force(vqgan):
    z, e = torch.randn(2, 4, 100), vqgan.quantize.embedding.weight
    expected = [[min(range(len(e)), key=lambda i: ((vector - e[i]) ** 2).sum()) for vector in one.T] for one in z]
    assert vqgan.quantize(z).tolist() == expected


def test_the_patchwise_encoder_sees_one_patch_only_and_tokens_are_in_raster_order(vqgan):
    pixels = torch.rand(2, 3, 16, 16)
    other = pixels.clone()
    other[:, :, 8:, :8] += 0.5  # the patch of token 2
    changed = (vqgan.features(other) != vqgan.features(pixels)).any(1)
    assert changed.tolist() == [[False, False, True, False]] * 2
    whole, halves = vqgan.encode(pixels), [vqgan.encode(half) for half in pixels.chunk(2, dim=2)]
    assert torch.equal(whole, torch.cat(halves, 1))
    vqgan.cfg.vq_patchwise = False
    assert (vqgan.features(other) != vqgan.features(pixels)).any(1).all()


def test_training_decodes_the_tokens_and_copies_the_gradient_of_their_vectors_to_the_features(vqgan):
    pixels = torch.rand(2, 3, 16, 16)
    reconstruction, commitment, z, codes = vqgan(pixels)
    assert torch.equal(codes, vqgan.encode(pixels))
    assert torch.allclose(reconstruction, vqgan.decode(codes), atol=1e-5)
    to_z, = torch.autograd.grad(reconstruction.sum(), z, retain_graph=True)
    vectors = vqgan.quantize.embedding(codes).mT.detach().requires_grad_()
    expected, = torch.autograd.grad(vqgan.decode_vectors(vectors).sum(), vectors)
    assert torch.allclose(to_z, expected, rtol=1e-3, atol=1e-3)
    pull, = torch.autograd.grad(commitment, z, retain_graph=True)
    assert torch.allclose(pull, 2 * (z - vectors) / z.numel())
    (reconstruction.sum() + commitment).backward()
    assert vqgan.quantize.embedding.weight.grad is None


def codebook(vectors: list[list[float]], decay: float) -> Codebook:
    return Codebook(torch.nn.Embedding.from_pretrained(torch.tensor(vectors)), decay)


def test_kmeans_finds_well_separated_clusters():
    centres = torch.randn(12, 4, generator=keyed_generator(0)) * 20
    z, found = (centres[:, None] + 0.1 * torch.randn(12, 50, 4)).flatten(0, 1), codebook([[0.0] * 4] * 12, 0.9)
    found.start(z, keyed_generator(0))
    assert torch.cdist(found.weight, centres).min(0).values.max() < 0.1


def test_codes_follow_their_features_and_dead_codes_restart():
    trained = codebook([[0.0, 0.0], [10.0, 10.0], [99.0, 99.0]], 0.5)  # no feature is near the third
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [11.0, 11.0], [8.0, 8.0]])
    for step in range(30):
        trained.update(z, torch.cdist(z, trained.weight).argmin(1), keyed_generator(step))
    distance = torch.cdist(trained.weight, z)                          # (V, M)
    assert (distance.min(1).values < 1.5).all() and sorted(distance.argmin(0).unique().tolist()) == [0, 1, 2]


def test_the_moving_average_equals_a_case_worked_by_hand():
    averaged = codebook([[0.0], [10.0]], 0.75)
    averaged.update(torch.tensor([[2.0], [4.0], [12.0]]), torch.tensor([0, 0, 1]), keyed_generator(0))
    # count: 0.75 * 1 + 0.25 * (2, 1); total: 0.75 * (0, 10) + 0.25 * (6, 12)
    assert torch.allclose(averaged.weight, torch.tensor([[1.5 / 1.25], [10.5]]))


def test_codebook_use():
    assert codebook_use(torch.tensor([0, 1, 2, 3]), 8) == (0.5, pytest.approx(4.0))
    assert codebook_use(torch.zeros(2, 3, dtype=torch.long), 8) == (0.125, pytest.approx(1.0))


def test_names_and_sizes_are_those_of_taming_transformers():
    with torch.device("meta"):
        model = VQGAN(preset("base"))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model.encoder, model.decoder, model)]
    assert sizes == [29_298_176, 42_449_795, 76_073_859]
    assert {"encoder.down.0.block.0.norm1.weight", "encoder.down.2.block.0.nin_shortcut.bias",
            "encoder.down.4.attn.1.proj_out.weight", "encoder.down.3.downsample.conv.weight",
            "encoder.mid.attn_1.q.weight", "decoder.up.4.attn.2.norm.weight", "decoder.up.1.upsample.conv.bias",
            "quantize.embedding.weight", "post_quant_conv.bias"} <= model.state_dict().keys()
