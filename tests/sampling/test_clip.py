"""What OpenAI's code gives on random weights, what goes in, and files that are to be refused, none of them run."""
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.sampling.clip import CLIP, MEAN, STD, load_clip, preprocess, tokenize

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

SIZES = dict(resolution=16, patch=8, image_width=128, image_layers=2, text_width=64, text_layers=1, context_length=7,
             vocab_size=30, features=24)


def scripted(module: nn.Module) -> nn.Module:
    """The same parameters in modules without code, which torch.jit can write."""
    bare = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        bare.register_parameter(name, parameter)
    for name, child in module.named_children():
        bare.add_module(name, scripted(child))
    return bare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A CLIP of half precision, and its archive as OpenAI writes it."""
    g = torch.Generator().manual_seed(0)
    model = CLIP(**SIZES).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_((torch.randn(parameter.shape, generator=g) * 0.3).half())
    archive = scripted(model)
    for name in ("input_resolution", "context_length", "vocab_size"):
        archive.register_buffer(name, torch.tensor(7))
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.jit.save(torch.jit.script(archive.half()), path)
    return model.float(), path


def edited(source, target, edit) -> None:
    """A copy of an archive in which edit(name, data) replaces each entry's data; None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if (data := edit(name.partition("/")[2], old.read(name))) is not None:
                new.writestr(name, data)


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(path.name)}: .*({message})") as error:
        load_clip(path)
    assert "\n" not in str(error.value)


def test_features_are_those_of_openais_code(shared):
    gold = torch.load(shared / "parity" / "clip_a.golden.pt", weights_only=True)
    model = load_clip(shared / "parity" / "clip_a.pt")
    images, texts = model.encode_image(gold["pixels"]), model.encode_text(gold["text"])
    assert (images - gold["image_features"]).abs().max() < 1e-5
    assert (texts - gold["text_features"]).abs().max() < 1e-5
    assert (model.logit_scale.exp() * model.similarity(images, texts) - gold["logits_per_image"]).abs().max() < 1e-5
    state = model.state_dict()
    assert state.keys() == gold["state_dict"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in gold["state_dict"].items())


def test_archive_and_state_dict_give_one_model_of_any_size(made, tmp_path):
    model, path = made
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "plain.pt")
    edited(path, tmp_path / "cuda.pt", lambda entry, data: data.replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0"))
    assert b"cuda:0" in (tmp_path / "cuda.pt").read_bytes()                    # OpenAI saved theirs from a GPU
    for loaded in (load_clip(path), load_clip(tmp_path / "plain.pt"), load_clip(tmp_path / "cuda.pt")):
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor) and state[name].dtype == torch.float32, name
        assert (loaded.resolution, loaded.context_length, loaded.vocab_size) == (16, 7, 30)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_vit_b_32_has_the_published_size():
    with torch.device("meta"):
        model = CLIP(224, 32, 768, 12, 512, 12, 77, 49_408, 512)
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def test_features_depend_neither_on_the_batch_nor_on_what_follows_the_end(made):
    model, g = made[0], torch.Generator().manual_seed(1)
    pixels, tokens = torch.randn(3, 3, 16, 16, generator=g), torch.randint(28, (3, 7), generator=g)
    tokens[:, 4] = 29
    images, texts = model.encode_image(pixels), model.encode_text(tokens)
    assert torch.allclose(images[1:2], model.encode_image(pixels[1:2]), atol=1e-5)
    assert torch.allclose(texts[1:2], model.encode_text(tokens[1:2]), atol=1e-5)
    after, before = tokens.clone(), tokens.clone()
    after[:, 5:], before[:, 3] = 0, (tokens[:, 3] + 1) % 28
    assert torch.allclose(texts, model.encode_text(after), atol=1e-5)
    assert not torch.isclose(texts, model.encode_text(before), atol=1e-2).all(1).any()


def test_similarity_is_the_cosine(made):
    a, b = torch.randn(2, 3, 24)
    expected = torch.cosine_similarity(a[:, None], b[None, :2], dim=-1)
    assert torch.allclose(made[0].similarity(5 * a, b[:2] / 7), expected, atol=1e-6)


@pytest.mark.parametrize("resolution", [7, 24, 50])
def test_preprocess_is_pillows(resolution):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    expected = np.stack([Image.fromarray(i).resize((resolution, resolution), Image.Resampling.BICUBIC) for i in images])
    pixels = preprocess(images, resolution).permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    error = (pixels * 255 - torch.from_numpy(expected)).abs()
    assert error.max() < 1.01 and error.mean() < 0.01                          # Pillow counts in whole numbers


def test_tokens_are_cut_before_the_end_and_padded_with_zeros():
    bpe = BPE([])                                                              # bytes alone: a letter is a token
    a, z, start, end = ord("a") - 33, 256 + ord("z") - 33, 512, 513
    assert tokenize(bpe, ["", "az", "aaaaz", "aaaaaaaaaaz"], 7).tolist() == [
        [start, end, 0, 0, 0, 0, 0], [start, a, z, end, 0, 0, 0], [start, a, a, a, a, z, end],
        [start, a, a, a, a, a, end]]
    assert tokenize(bpe, ["a"]).shape == (1, 77) and tokenize(bpe, []).shape == (0, 77)
    with pytest.raises(ValueError, match="words='release'"):
        tokenize(BPE([], words="release"), ["a"])


def test_tokens_are_clips_own(shared):
    bpe = BPE.load(shared / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz")
    assert tokenize(bpe, ["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("visual.conv1.weight"), "visual.conv1.weight is missing"),
    (lambda s: s.pop("visual.ln_pre.bias"), "Missing.*visual.ln_pre.bias"),
    (lambda s: s.update({"extra": torch.zeros(1)}), "Unexpected.*extra"),
    (lambda s: s.update({"visual.proj": torch.zeros(128, 23)}), "size mismatch for visual.proj"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(128)}), "no weights of CLIP"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(100, 3, 8, 8)}), "no multiples of 64"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(64, 3, 0, 0)}), "patches of 0"),
    (lambda s: s.update({"positional_embedding": torch.tensor(1.0)}), "no weights of CLIP"),
    (lambda s: s.update({"text_projection": "text"}), "not all of it is tensors"),
    (lambda s: s.clear(), "is missing"),
])
def test_a_tensor_missing_left_over_or_misshapen_is_named(change, message, made, tmp_path):
    state = made[0].state_dict()
    change(state)
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


RUNS = b"cposix\nmkdir\n(X\x07\x00\x00\x00touchedtR."               # as a protocol 2 pickle runs os.mkdir("touched")
STACK = b"\x8c\x05posix\x8c\x05mkdir\x93(X\x07\x00\x00\x00touchedtR."      # the same, found by another opcode


@pytest.mark.parametrize("name, data, message", [
    ("data.pkl", b"\x80\x02" + RUNS, r"it names posix\.mkdir"),
    ("data.pkl", b"\x80\x04" + STACK, "damaged"),
    ("data.pkl", b"\x80\x02(X\x07\x00\x00\x00touchediposix\nmkdir\n.", "damaged"),
    ("data.pkl", b"\x80\x02cbuiltins\neval\n.", r"it names builtins\.eval"),
    ("data.pkl", b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "is missing"),     # holds itself
    ("data.pkl", b"\x80\x02]q\x00.", "damaged"),
    ("data.pkl", b"\x80\x02", "damaged"),
    ("data.pkl", None, "damaged"),
    ("data/0", b"1234", "damaged"),                                            # shorter than data.pkl says
    ("data/0", None, "damaged"),
])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_damaged_and_hostile_archives_are_refused_and_never_run(name, data, message, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    edited(made[1], "evil.pt", lambda entry, old: data if entry == name else old)
    refused(tmp_path / "evil.pt", message)
    assert os.listdir() == ["evil.pt"]


def test_code_and_constants_are_not_even_looked_at(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edited(made[1], "evil.pt", lambda entry, old: b"\x80\x02" + RUNS if entry.startswith(("con", "code")) else old)
    assert torch.equal(load_clip("evil.pt").visual.proj, made[0].visual.proj) and os.listdir() == ["evil.pt"]


def test_cut_swollen_and_foreign_files_are_refused(made, tmp_path):
    data = made[1].read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.pt").write_text("no zip at all")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("bomb/data.pkl", bytes(1_000_000))
    for name, message in (("none.pt", "no such file"), ("cut.pt", "damaged"), ("text.pt", "damaged"),
                          ("list.pt", "damaged"), ("bomb.pt", "unpack to far more")):
        refused(tmp_path / name, message)
