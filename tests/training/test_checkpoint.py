import os
import re

import pytest
import torch

from nanomagvlt.training import checkpoint
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training.checkpoint import CheckpointError
from nanomagvlt.tokenizers.vqgan import VQGAN


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("touched",)


def save(path, cfg, model):
    checkpoint.save(path, "magvlt", cfg, step=3, model=model.state_dict(), bpe=BPE([]).to_text(),
                    vqgan=VQGAN(cfg).state_dict())


def test_there_and_back(cfg, model, tmp_path):
    save(tmp_path / "last.pt", cfg, model)
    loaded, _, bpe = checkpoint.load_magvlt(tmp_path / "last.pt")
    assert loaded.cfg == cfg and bpe.merges == [] and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert checkpoint.weight_hash(loaded) == checkpoint.weight_hash(model)
    loaded.output_bias.data[0] += 1
    assert checkpoint.weight_hash(loaded) != checkpoint.weight_hash(model)
    assert checkpoint.weight_hash(loaded.bfloat16()) != checkpoint.weight_hash(model)  # as sampling on a GPU has it


def test_files_that_are_no_checkpoint(cfg, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    save(tmp_path / "good.pt", cfg, model)
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.pt").write_text("text")
    torch.save(Malicious(), tmp_path / "malicious.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    checkpoint.save(tmp_path / "vqgan.pt", "vqgan", cfg, vqgan=VQGAN(cfg).state_dict())
    content = torch.load("good.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "widht": 3}}, tmp_path / "config.pt")
    torch.save({**content, "config": {**content["config"], "width": 32}}, tmp_path / "shape.pt")
    torch.save({**content, "model": {**content["model"], 3: 4}}, tmp_path / "numbers.pt")
    torch.save({**content, "bpe": 3}, tmp_path / "bpe.pt")
    torch.save({**content, "config": {**content["config"], "width": 16.0}}, tmp_path / "width.pt")
    torch.save({**content, "vqgan": {name: x.long() for name, x in content["vqgan"].items()}}, tmp_path / "integers.pt")
    for name, message in {
            "none.pt": "no such file", "cut.pt": "not a checkpoint", "text.pt": "not a checkpoint",
            "malicious.pt": "not a checkpoint", "list.pt": "something else", "vqgan.pt": "holds vqgan, where a magvlt",
            "config.pt": "did you mean 'width'", "shape.pt": r"blocks\.0\.[a-z0-9.]+ is \(.*, not \(32",
            "numbers.pt": "not all of its MAGVLT is real numbers with names",
            "bpe.pt": "its merges cannot be used", "width.pt": "configuration cannot be used",
            "integers.pt": "not all of its VQGAN is real numbers"
    }.items():
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{message}") as error:
            checkpoint.load_magvlt(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()


def test_a_save_is_whole_or_absent(cfg, model, tmp_path, monkeypatch):
    save(tmp_path / "last.pt", cfg, model)
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(content, file):
        file.write(b"half a")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        save(tmp_path / "last.pt", cfg, model)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_newest(cfg, tmp_path):
    with pytest.raises(CheckpointError, match="python train.py --preset tiny"):
        checkpoint.newest(tmp_path)
    for age, name in enumerate(("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        os.utime(tmp_path / name / "last.pt", (1000 - age, 1000 - age))
    assert checkpoint.newest(tmp_path) == tmp_path / "b" / "last.pt"


@pytest.mark.parametrize("kind", ["vqgan", "magvlt"])
def test_a_checkpoint_without_its_weights_is_refused(kind, tmp_path):
    torch.save({"kind": kind, "config": {}}, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError, match=f"a.pt: a {kind} checkpoint without its"):
        checkpoint.load(tmp_path / "a.pt", kind)
