"""CLIP against OpenAI's outputs on random weights; its inputs; damaged and hostile files are refused, and not run."""
import copy
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import refused
from torch import nn

from nanomagvlt.sampling.clip import CLIP, MEAN, STD, load_clip, preprocess, tokenize
from nanomagvlt.tokenizers.bpe import BPE

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A CLIP with weights of half precision, and its archive in OpenAI's format."""
    g = torch.Generator().manual_seed(0)
    model = CLIP(16, 8, 128, 2, 64, 1, context_length=7, vocab_size=30, features=24).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_((torch.randn(parameter.shape, generator=g) * 0.3).half())
    archive = copy.deepcopy(model).half()
    for module in archive.modules():
        module.__class__ = nn.Module                                           # without code, which torch.jit compiles
    for name in ("input_resolution", "context_length", "vocab_size"):
        archive.__dict__.pop(name, None)
        archive.register_buffer(name, torch.tensor(7))
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.jit.save(torch.jit.script(archive), path)
    return model, path


def edit_archive(source, target, changes: dict) -> None:
    """Writes a copy of an archive with changed and new entries, new ones compressed; None omits an entry."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        entries = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, data in (entries | changes).items():
            if data is not None:
                new.writestr(f"clip/{name}", data, zipfile.ZIP_STORED if name in entries else zipfile.ZIP_DEFLATED)


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


def test_an_archive_and_a_state_dict_give_the_same_model(made, tmp_path):
    model, path = made
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "plain.pt")
    data = zipfile.ZipFile(path).read("clip/data.pkl").replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0")
    assert b"cuda:0" in data                                                   # OpenAI saved its models from a GPU
    edit_archive(path, tmp_path / "cuda.pt", {"data.pkl": data})
    for loaded in (load_clip(path), load_clip(tmp_path / "plain.pt"), load_clip(tmp_path / "cuda.pt")):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) and a.dtype == torch.float32
                   for a, b in zip(loaded.parameters(), model.parameters()))
        assert (loaded.resolution, loaded.context_length, loaded.vocab_size) == (16, 7, 30)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_vit_b_32_has_the_published_size():
    with torch.device("meta"):
        model = CLIP(224, 32, 768, 12, 512, 12, 77, 49_408, 512)
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


def test_text_features_depend_on_the_tokens_up_to_the_end_token_only(made):
    tokens = torch.randint(28, (3, 7), generator=torch.Generator().manual_seed(1))
    tokens[:, 4] = 29
    after, before = tokens.clone(), tokens.clone()
    after[:, 5:], before[:, 3] = 0, (tokens[:, 3] + 1) % 28
    texts = made[0].encode_text(tokens)
    assert torch.allclose(texts, made[0].encode_text(after), atol=1e-5)
    assert not torch.isclose(texts, made[0].encode_text(before), atol=1e-2).all(1).any()


@pytest.mark.parametrize("resolution", [7, 24, 50])
def test_images_are_resized_as_by_pillow(resolution):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    expected = np.stack([Image.fromarray(i).resize((resolution, resolution), Image.Resampling.BICUBIC) for i in images])
    pixels = preprocess(images, resolution).permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    error = (pixels * 255 - torch.from_numpy(expected)).abs()
    assert error.max() < 1.01 and error.mean() < 0.01                          # Pillow computes with integers


def test_tokens_are_truncated_before_the_end_token_and_padded_with_zeros():
    bpe = BPE([])                                                              # without merges: a letter is a token
    a, z, start, end = ord("a") - 33, 256 + ord("z") - 33, 512, 513
    assert tokenize(bpe, ["", "az", "aaaaz", "aaaaaaaaaaz"], 7).tolist() == [
        [start, end, 0, 0, 0, 0, 0], [start, a, z, end, 0, 0, 0], [start, a, a, a, a, z, end],
        [start, a, a, a, a, a, end]]


def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_refused(made, tmp_path):
    path = tmp_path / "a.pt"
    for name, tensor, word in (
            ("visual.conv1.weight", None, "conv1"), ("visual.ln_pre.bias", None, "ln_pre"),
            ("extra", torch.zeros(1), "extra"), ("visual.proj", torch.zeros(128, 23), "visual.proj"),
            (3, torch.zeros(1), "CLIP"), ("positional_embedding", torch.tensor(1.0), "CLIP"),
            ("text_projection", "text", "CLIP"), ("visual.conv1.weight", torch.zeros(128), "CLIP")):
        state = {**made[0].state_dict(), name: tensor}
        torch.save({key: value for key, value in state.items() if value is not None}, path)
        refused(load_clip, path, word)


RUNS = b"\x80\x02cposix\nmkdir\n(X\x07\x00\x00\x00touchedtR."                # pickle.loads() runs os.mkdir("touched")


@pytest.mark.parametrize("name, data, word", [
    ("data.pkl", RUNS, r"posix\.mkdir"),
    ("data.pkl", b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "missing"),     # contains itself
    ("data.pkl", b"\x80\x02c__torch__\nA\n)\x81]b.", "CLIP"),                  # its attributes are a list
    ("data.pkl", b"\x80\x02].", "CLIP"), ("data.pkl", None, "damaged"),
    ("data/0", b"1234", "damaged"), ("data/0", None, "damaged"),               # data.pkl declares more than 4 bytes
    ("data/9999", bytes(10_000_000), "damaged"),                               # much larger than the file
])
def test_damaged_and_hostile_archives_are_refused_and_not_run(name, data, word, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_archive(made[1], "evil.pt", {name: data})
    refused(load_clip, "evil.pt", word)
    assert os.listdir() == ["evil.pt"]


def test_code_and_constants_are_not_read(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_archive(made[1], "evil.pt", {"constants.pkl": RUNS, "code/__torch__.py": RUNS})
    assert torch.equal(load_clip("evil.pt").visual.proj, made[0].visual.proj) and os.listdir() == ["evil.pt"]
