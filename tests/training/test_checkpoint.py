"""Checkpoints are written whole or not at all. Hostile, damaged and other files are refused by every loader."""
import dataclasses
import errno
import os
import pickle
import re
import resource
from pathlib import Path

import pytest
import torch

from nanomagvlt.evaluation.fid import load_inception
from nanomagvlt.sampling.clip import load_clip
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint, pretrained


class Evil:
    def __reduce__(self):
        return os.mkdir, ("touched",)


def refused(load, path, word: str) -> None:
    """Checks that load(path) raises one printable line with the file's name and a word."""
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{word}") as error:
        load(path)
    assert str(error.value).isprintable()


def save(path, cfg, model):
    checkpoint.save(path, "magvlt", cfg, model=model.state_dict(), bpe=BPE([]).to_text(), vqgan=VQGAN(cfg).state_dict())


def test_a_loaded_model_has_the_saved_weights(cfg, model, tmp_path):
    cfg = dataclasses.replace(cfg, data="state_dict")          # a word by which published checkpoints are recognised
    save(tmp_path / "last.pt", cfg, model)
    assert not pretrained.looks_published(tmp_path / "last.pt")
    loaded, _, bpe = checkpoint.load_magvlt(tmp_path / "last.pt")
    assert loaded.cfg == cfg and bpe.merges == [] and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert checkpoint.weight_hash(loaded) == checkpoint.weight_hash(model)
    loaded.output_bias.data[0] += 1
    assert checkpoint.weight_hash(loaded) != checkpoint.weight_hash(model)


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("load", [checkpoint.load_vqgan, checkpoint.load_magvlt, pretrained.load_vqgan,
                                  pretrained.load_magvlt, pretrained.looks_published, load_clip, load_inception])
def test_no_loader_runs_what_a_file_contains(load, force, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    content = {"kind": "magvlt", "state_dict": {"a": torch.zeros(1)}, "callbacks": Evil()}
    torch.save(content, "new")
    torch.save(content, "old", _use_new_zipfile_serialization=False)
    Path("raw").write_bytes(pickle.dumps(Evil(), protocol=2))
    Path("red").write_bytes(b"\x80\x02cnumpy\x1b[31m\nmkdir\n.")               # an escape sequence in a name
    Path("cut").write_bytes(Path("new").read_bytes()[:500])
    Path("text").write_text("text")
    for name, word in (("new", r"'\w+\.mkdir'"), ("old", r"'\w+\.mkdir'"), ("raw", r"'\w+\.mkdir'"), ("red", "mkdir"),
                       ("cut", "damaged"), ("text", "damaged"), ("none", "no such file")):
        refused(load, name, word)
    assert not Path("touched").exists()


def test_a_checkpoint_with_wrong_content_is_refused(cfg, model, tmp_path):
    path = tmp_path / "a.pt"
    save(path, cfg, model)
    good = torch.load(path, weights_only=True)
    for content, word in (
            ({"kind": "magvlt", "config": {}}, "magvlt"), (good | {"kind": "vqgan"}, "magvlt"),
            (good | {"config": {"widht": 3}}, "widht"), (good | {"bpe": 3}, "merges"),
            (good | {"config": good["config"] | {"width": 32}}, r"blocks\.0\."),
            (good | {"config": good["config"] | {"width": 16.0}}, "configuration"),
            (good | {"model": good["model"] | {3: 4}}, "MAGVLT"),
            (good | {"vqgan": {name: x.long() for name, x in good["vqgan"].items()}}, "int64")):
        torch.save(content, path)
        refused(checkpoint.load_magvlt, path, word)


def test_a_full_disk_leaves_the_last_save_whole_and_is_an_error_with_number_and_name(cfg, model, tmp_path):
    save(tmp_path / "last.pt", cfg, model)
    before, limits = (tmp_path / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save(tmp_path / "last.pt", cfg, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    with pytest.raises(ValueError, match="train.py"):
        checkpoint.newest(tmp_path)
    paths = [tmp_path / name / "last.pt" for name in "abc"]
    for path, time in zip(paths, (2, 3, 1)):
        path.parent.mkdir()
        path.touch()
        os.utime(path, (time, time))
    assert checkpoint.newest(tmp_path) == paths[1]
