"""Training the VQ-GAN: which images it learns from, and how it resumes."""
import json
import signal
from pathlib import Path

import pytest
import torch

from nanomagvlt.config import Config, preset
from nanomagvlt.data.sources import pieces_of, read_examples
from nanomagvlt.training import checkpoint, train_vqgan
from nanomagvlt.training.loop import Stopped

SMALL = dict(vq_images=8, vq_mixed=0.5, vq_steps=6, vq_start=2, vq_batch=4, vq_channels=4, vq_latent=8,
             codebook_size=16, codebook_dim=4, log_every=1, vq_discriminator=True, vq_discriminator_start=3)
CPU = torch.device("cpu")


def examples(cfg: Config) -> list:
    return list(read_examples(cfg.data, pieces_of(cfg.data, num_shapes=8), cfg.image_size, {}))


def train(folder: Path) -> tuple[dict, list[dict]]:
    """The checkpoint and the log of a training run in this folder."""
    cfg = preset("micro", **SMALL)
    folder.mkdir(exist_ok=True)
    train_vqgan.train_vqgan(cfg, examples(cfg), folder / "vqgan.pt", CPU)
    log = (folder / "vqgan_log.jsonl").read_text().splitlines()
    return torch.load(folder / "vqgan.pt", weights_only=True), [json.loads(line) for line in log]


def test_the_discriminator_is_trained_and_resumed_with_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vqgan, "DISCRIMINATOR_RAMP", 2)
    monkeypatch.setattr(train_vqgan, "DISCRIMINATOR_WIDTH", 4)
    straight, log = train(tmp_path / "straight")

    def with_ctrl_c(*args, original=train_vqgan.update_vqgan):
        if args[-1] == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_vqgan, "update_vqgan", with_ctrl_c)
        train(tmp_path / "stopped")
    resumed, log_of_both = train(tmp_path / "stopped")
    assert log_of_both == log and all(torch.equal(resumed[part][name], tensor) for part in (
        "vqgan", "codebook", "discriminator") for name, tensor in straight[part].items())
    for name in ("logits_real", "logits_fake", "adversarial", "adversarial_weight"):
        assert [name in line for line in log] == [False] * 3 + [True] * 3


def test_a_checkpoint_without_optimizer_or_of_other_sizes_is_refused(tmp_path):
    cfg, path = preset("micro", **SMALL), tmp_path / "vqgan.pt"
    vqgan = train_vqgan.VQGANTrainer(cfg, CPU).vqgan.state_dict()
    checkpoint.save(path, "vqgan", cfg, step=1, vqgan=vqgan)
    for other in ({}, {"codebook_size": 32}):
        with pytest.raises(ValueError, match=r"vqgan\.pt.* --vqgan.* --name"):
            train_vqgan.VQGANTrainer(preset("micro", **SMALL | other), CPU).load(path)


def test_the_vqgan_also_learns_from_joined_images():
    cfg = preset("micro", **SMALL)
    images = train_vqgan.vqgan_images(cfg, examples(cfg))  # 8 images, 4 joined
    first, second, third, *_ = examples(cfg)
    assert images.shape == (12, 32, 32, 3) and all((a == b.views[0]).all() for a, b in zip(images, examples(cfg)))
    assert (images[8][:16] == first.wide).all() and (images[8][16:] == second.wide).all()
    assert (images[9][:, :16] == second.tall).all() and (images[9][:, 16:] == third.tall).all()
