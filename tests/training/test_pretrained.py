"""The published layout against the authors' outputs on random weights; hostile and damaged files are refused."""
import sys
from collections import OrderedDict

import pytest
import torch
from test_checkpoint import refused

from nanomagvlt.sequence import build, valid_mask
from nanomagvlt.config import preset
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint, pretrained

SIZES = dict(image_size=16, text_length=5, length_positions=5, text_vocab=30, codebook_size=20, codebook_dim=8,
             vq_channels=32, vq_multipliers=(1, 2, 2), vq_res_blocks=1, vq_attention=(4, 8), vq_latent=16, layers=3,
             width=24, heads=3)


@pytest.fixture(scope="module")
def golden(shared):
    return torch.load(shared / "parity" / "kakao_a.golden.pt", weights_only=True)


@pytest.fixture(scope="module")
def loaded(shared, golden):
    return pretrained.load_magvlt(shared / "parity" / "kakao_a.ckpt", heads=golden["config"]["heads"])


@torch.inference_mode()
@pytest.mark.parametrize("select", ["none", "first_v", "first_h"])
@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it-mask"])
def test_logits_are_those_of_the_authors_code(task, select, golden, loaded):
    model, case, lengths = loaded[0], golden[f"{task}/{select}"], golden["text_length"]
    selector = None
    if case["selector"] is not None:
        names = ("TOP", "BOTTOM") if case["vertical"] and task != "t2i" else ("LEFT", "RIGHT")
        selector = torch.where(case["selector"], *map(model.vocab.special, names))
    batch = {"image_tokens": golden["image_tokens"], "text_tokens": golden["text_tokens"], "text_lengths": lengths}
    batch = {name: golden[name] for name in ("image_tokens", "text_tokens")} | {"text_lengths": lengths}
    seq = build(task.removesuffix("-mask"), model.cfg, batch, {"image": case["image_mask"], "text": case["text_mask"]},
                selector)
    states, real = model(seq), valid_mask(lengths, model.cfg.text_length)
    image, text = (model.logits(states[:, seq.slices[piece]], piece) for piece in ("image", "text"))
    assert (image - case["image_logits"]).abs().max() < 1e-5
    assert (text - case["text_logits"])[real].abs().max() < 1e-5
    if case["length_logits"] is not None:
        assert (model.length_logits(states, seq) - case["length_logits"]).abs().max() < 1e-5


@torch.inference_mode()
def test_codes_and_pixels_are_those_of_the_authors_code(shared, golden, loaded, tmp_path):
    vqgans = [loaded[1]]
    for name in ("taming_a.ckpt", "kakao_a.ckpt"):
        pretrained.main([str(shared / "parity" / name), "--only-vqgan", "--out", str(tmp_path / "vqgan.pt")])
        vqgans.append(checkpoint.load_vqgan(tmp_path / "vqgan.pt"))
    for vqgan in vqgans:
        assert torch.equal(vqgan.encode(golden["vq"]["pixels"]), golden["vq"]["codes"])
        assert (vqgan.decode(golden["vq"]["codes"]) - golden["vq"]["decoded"]).abs().max() < 1e-4


def in_their_layout(model: MAGVLT, vqgan: VQGAN) -> dict:
    """The inverse of the import: concatenated tensors are split, by the table of names."""
    cfg, ours, theirs = model.cfg, model.state_dict(), {}
    cuts = {"token_table.weight": [cfg.codebook_size + cfg.text_vocab, 10],
            "position_table.weight": [cfg.image_tokens, cfg.text_length, cfg.image_tokens + cfg.text_length + 4]}
    for name, sources in pretrained.their_names(cfg.layers).items():
        parts = ours[name].split(cuts.get(name, len(ours[name]) // len(sources)))
        theirs |= {f"model.{source}": part.clone() for source, part in zip(sources, parts, strict=True)}
    return theirs | {f"model_vqvae.{name}": tensor for name, tensor in vqgan.state_dict().items()}


@pytest.fixture(scope="module")
def made():
    """Networks of other sizes, and their weights in the published layout."""
    cfg = preset("base", **SIZES)
    model, vqgan = MAGVLT(cfg), VQGAN(cfg)
    return model, vqgan, in_their_layout(model, vqgan)


class AttributeDict(dict):
    """As a class of Lightning, which is not installed."""
    __module__ = "pytorch_lightning"


@pytest.mark.parametrize("zipped", [True, False])
def test_sizes_are_read_from_the_tensors_and_objects_of_known_packages_ignored(zipped, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", sys.modules[__name__])
    content = {"hyper_parameters": AttributeDict(lr=1), "state_dict": OrderedDict(made[2])}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert pretrained.looks_published(tmp_path / "a.ckpt")
    loaded = pretrained.load_magvlt(tmp_path / "a.ckpt", heads=3)
    assert {name: getattr(loaded[0].cfg, name) for name in SIZES} == {**SIZES, "vq_attention": (8, 4)}
    for ours, theirs in zip(made, loaded):
        assert checkpoint.weight_hash(ours) == checkpoint.weight_hash(theirs)


@pytest.mark.parametrize("name, tensor, word", [
    ("model.blocks.1.attn.key.bias", None, "blocks.1.attn.key.bias"), ("model.tok_emb.weight", None, "tok_emb.weight"),
    ("model_vqvae.decoder.conv_out.bias", None, "decoder.conv_out.bias"), ("elsewhere", torch.zeros(1), "elsewhere"),
    ("model.extra.weight", torch.zeros(1), "extra.weight"), ("model.tok_emb.weight", "text", "state_dict"),
    ("model.length_predictor.weight", torch.zeros(5, 23), "length.weight"), (5, torch.zeros(1), "'5'"),
    ("model.pos_emb_img.pos_embed", torch.tensor(1.0), "published"),
])
def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_refused(name, tensor, word, made, tmp_path):
    state = {key: x for key, x in {**made[2], name: tensor}.items() if x is not None}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    refused(pretrained.load_magvlt, tmp_path / "a.ckpt", word)


def test_a_file_with_another_digest_or_without_a_state_dict_is_refused(tmp_path):
    torch.save([1], path := tmp_path / "a.ckpt")
    refused(pretrained.load_magvlt, path, "state_dict")


def test_presets_have_the_published_sizes():
    with torch.device("meta"):
        assert num_parameters(MAGVLT(preset("base"))) == 371_533_056
        assert num_parameters(MAGVLT(preset("large"))) == 795_228_672
