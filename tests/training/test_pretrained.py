"""What the authors' code gives on random weights, and files that are to be refused."""
import pickle
import os
import re
from collections import OrderedDict

import pytest
import torch

from nanomagvlt import sequence
from nanomagvlt.training import checkpoint, pretrained
from nanomagvlt.training.checkpoint import CheckpointError
from nanomagvlt.config import preset
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.tokenizers.vqgan import VQGAN

SIZES = dict(image_size=16, text_length=5, length_positions=5, text_vocab=30, codebook_size=20, codebook_dim=8,
             vq_channels=32, vq_multipliers=(1, 2, 2), vq_res_blocks=1, vq_attention=(4, 8), vq_latent=16, layers=3,
             width=24, heads=3)


@pytest.fixture(scope="module")
def golden():
    from conftest import SHARED
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent") if os.environ.get("CI") != "true" else pytest.fail(f"{folder} is absent")
    return folder, torch.load(folder / "kakao_a.golden.pt", weights_only=True)


@pytest.fixture(scope="module")
def loaded(golden):
    folder, gold = golden
    return pretrained.load_magvlt(folder / "kakao_a.ckpt", heads=gold["config"]["heads"])


@torch.inference_mode()
@pytest.mark.parametrize("select", ["none", "first_v", "first_h"])
@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it-mask"])
def test_logits_are_those_of_the_authors_code(task, select, golden, loaded):
    gold, (model, _) = golden[1], loaded
    case, lengths = gold[f"{task}/{select}"], gold["text_length"]
    selector = None
    if case["selector"] is not None:
        first, second = ((sequence.TOP, sequence.BOTTOM) if case["vertical"] and task != "t2i"
                         else (sequence.LEFT, sequence.RIGHT))
        selector = torch.where(case["selector"], first, second)
    seq = sequence.build(task.removesuffix("-mask"), model.cfg, gold["image_tokens"], case["image_mask"],
                         gold["text_tokens"], case["text_mask"], lengths, selector)
    states = model(seq)
    real = sequence.valid_mask(lengths, model.cfg.text_length)
    assert (model.image_logits(states, seq.layout) - case["image_logits"]).abs().max() < 1e-5
    assert (model.text_logits(states, seq.layout) - case["text_logits"])[real].abs().max() < 1e-5
    if case["length_logits"] is not None:
        assert (model.length_logits(states, seq.layout) - case["length_logits"]).abs().max() < 1e-5


def test_codes_and_pixels_are_those_of_the_authors_code(golden, loaded):
    folder, gold = golden
    for vqgan in (loaded[1], pretrained.load_vqgan(folder / "taming_a.ckpt")):
        with torch.inference_mode():
            assert torch.equal(vqgan.encode(gold["vq"]["pixels"]), gold["vq"]["codes"])
            assert (vqgan.decode(gold["vq"]["codes"]) - gold["vq"]["decoded"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["taming_a.ckpt", "kakao_a.ckpt"])
def test_a_vqgan_is_taken_out_to_train_with(name, golden, tmp_path):
    folder, gold = golden
    pretrained.main([str(folder / name), "--only-vqgan", "--out", str(tmp_path / "vqgan.pt")])
    with torch.inference_mode():
        codes = checkpoint.load_vqgan(tmp_path / "vqgan.pt").encode(gold["vq"]["pixels"])
    assert torch.equal(codes, gold["vq"]["codes"])


def in_their_layout(model: MAGVLT, vqgan: VQGAN) -> dict:
    """The inverse of the import: stacked tensors cut apart, by the table of names."""
    ours, n, t = model.state_dict(), model.cfg.image_tokens, model.cfg.text_length
    cuts = {"tokens.weight": [model.cfg.codebook_size + model.cfg.text_vocab, 10], "places.weight": [n, t, n + t + 4]}
    theirs = {}
    for name, sources in pretrained.TRANSFORMER.items():
        for i in range(model.cfg.layers if "{i}" in name else 1):
            tensor = ours[name.replace("{i}", str(i))]
            parts = tensor.split(cuts.get(name, len(tensor) // len(sources)))
            for source, part in zip(sources, parts, strict=True):
                theirs["model." + source.replace("{i}", str(i))] = part.clone()
    return theirs | {f"model_vqvae.{name}": tensor for name, tensor in vqgan.state_dict().items()}


@pytest.fixture(scope="module")
def made():
    """A second set of sizes: ours, and the same in the published layout."""
    torch.manual_seed(0)
    cfg = preset("base", **SIZES)
    model, vqgan = MAGVLT(cfg).eval(), VQGAN(cfg).eval()
    return model, vqgan, in_their_layout(model, vqgan)


def test_any_size_is_read_off_the_tensors(made, tmp_path):
    model, vqgan, theirs = made
    torch.save({"state_dict": theirs}, tmp_path / "a.ckpt")
    model_2, vqgan_2 = pretrained.load_magvlt(tmp_path / "a.ckpt", heads=3)
    for name, value in SIZES.items():
        if name != "vq_attention":
            assert getattr(model_2.cfg, name) == value, name
    assert set(model_2.cfg.vq_attention) == {4, 8}
    for a, b in ((model, model_2), (vqgan, vqgan_2)):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.blocks.1.attn.key.bias"), "the tensor blocks.1.attn.key.bias is missing"),
    (lambda s: s.pop("model.tok_emb.weight"), "the tensor tok_emb.weight is missing"),
    (lambda s: s.pop("model_vqvae.decoder.conv_out.bias"), "the tensor decoder.conv_out.bias is missing"),
    (lambda s: s.update({"model.extra.weight": torch.zeros(1)}), "has a tensor extra.weight"),
    (lambda s: s.update({"elsewhere": torch.zeros(1)}), "has a tensor elsewhere"),
    (lambda s: s.update({"model.length_predictor.weight": torch.zeros(5, 23)}),
     r"length.weight is \(5, 23\), not \(5, 24\)"),
    (lambda s: s.update({"model.tok_emb.weight": "text"}), "model.tok_emb.weight is a str, not a tensor"),
    (lambda s: s.update({5: torch.zeros(1)}), "has the key 5, which is no name"),
    (lambda s: s.update({"model.pos_emb_img.pos_embed": torch.tensor(1.0)}), "not those of a published model"),
    (lambda s: s.clear(), "not those of a published model|is missing"),
])
def test_a_tensor_missing_left_over_or_misshapen_is_named(change, message, made, tmp_path):
    state = dict(made[2])
    change(state)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=f"a.ckpt: .*({message})") as error:
        pretrained.load_magvlt(tmp_path / "a.ckpt", heads=3)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("touched",)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(zipped, force, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": made[2], "callbacks": Evil()}, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with open("evil.pkl", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file, protocol=2)
    assert pretrained.looks_published("evil.ckpt")
    for name, message in (("evil.ckpt", r"refused, for it names (posix|os|nt)\.mkdir"),
                          ("evil.pkl", "not a checkpoint|refused")):
        with pytest.raises(CheckpointError, match=message) as error:
            pretrained.load_magvlt(name)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.ckpt", "evil.pkl"]


def test_old_format_truncated_and_wrong_digest(made, tmp_path):
    torch.save({"state_dict": OrderedDict(made[2])}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    model, _ = pretrained.load_magvlt(tmp_path / "old.ckpt", heads=3)
    assert torch.equal(model.output_bias, made[0].output_bias)
    torch.save({"state_dict": made[2]}, tmp_path / "new.ckpt")
    data = (tmp_path / "new.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[:len(data) // 2])
    torch.save([1], tmp_path / "list.ckpt")
    for name, digest, message in (("cut.ckpt", "", "damaged"), ("none.ckpt", "", "no such file"),
                                  ("list.ckpt", "", "no state_dict"), ("new.ckpt", "0" * 64, f"not {'0' * 64}")):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{message}"):
            pretrained.load_magvlt(tmp_path / name, heads=3, sha256=digest)


@pytest.mark.parametrize("name, count", [("base", 371_533_056), ("large", 795_228_672)])
def test_presets_have_the_published_sizes(name, count):
    cfg = preset(name)
    with torch.device("meta"):
        assert num_parameters(MAGVLT(cfg)) == count
        assert num_parameters(VQGAN(cfg)) == 76_073_859
    assert (cfg.image_tokens, cfg.text_length, cfg.text_vocab, cfg.codebook_size) == (256, 64, 49_408, 16_384)
