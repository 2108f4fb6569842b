"""Checkpoints: plain dictionaries of tensors and simple values, one per file.

A "magvlt" checkpoint has all that sampling needs (configuration, text merges, VQ-GAN, transformer) and all that is
needed to continue training (optimizer, step). Randomness has no state to save: it is a function of (seed, step).
"""
import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import nn

from nanomagvlt.config import Config, from_dict
from nanomagvlt.io import load_strict, one_line_error, read_tensors, whole
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN


def save(path: Path, kind: str, cfg: Config, **content) -> None:
    """Writes a checkpoint of kind "vqgan" or "magvlt", whole or not at all. Raises OSError with the file's name."""
    with whole(path) as file:
        torch.save({"kind": kind, "config": dataclasses.asdict(cfg), **content}, file)


def load(path: str | Path, kind: str) -> dict:
    """The content of a checkpoint, on the CPU, with "config" as a Config. Raises ValueError, one line."""
    content = read_tensors(path, "a checkpoint")
    needed = {"vqgan": {"config", "vqgan"}, "magvlt": {"config", "vqgan", "model", "bpe"}}[kind]
    if not isinstance(content, dict) or content.get("kind") != kind or not needed <= content.keys():
        raise ValueError(f"{path}: not a {kind} checkpoint with {', '.join(sorted(needed))}")
    with one_line_error(path, "its configuration is invalid"):
        return content | {"config": from_dict(content["config"])}


def load_module(kind: type[nn.Module], cfg: Config, state: object, path: str | Path) -> nn.Module:
    """kind(cfg) with the tensors of `state` as its weights, in evaluation mode. Raises ValueError, one line."""
    with one_line_error(path, "its configuration is invalid"), torch.device("meta"):
        module = kind(cfg)
    return load_strict(module, state, path)


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQ-GAN of a "vqgan" checkpoint. Raises ValueError, one line."""
    content = load(path, "vqgan")
    return load_module(VQGAN, content["config"], content["vqgan"], path)


def load_magvlt(path: str | Path) -> tuple[MAGVLT, VQGAN, BPE]:
    """The transformer and both tokenizers of a "magvlt" checkpoint. Raises ValueError, one line."""
    content = load(path, "magvlt")
    with one_line_error(path, "its merges are invalid"):
        bpe = BPE.from_text(content["bpe"])
    model = load_module(MAGVLT, content["config"], content["model"], path)
    return model, load_module(VQGAN, content["config"], content["vqgan"], path), bpe


def weight_hash(module: nn.Module) -> str:
    """16 hexadecimal digits that identify the weights of a module: a hash of every name and tensor."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def newest(runs: str | Path = "runs") -> Path:
    """The newest runs/*/last.pt. Raises ValueError, with the command that trains a model, where there is none."""
    files = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"there is no checkpoint in {runs}/: run `python train.py --preset tiny`")
    return files[-1]
