"""Appendix - Checkpoints: written whole or not at all, read without running anything in them.

A checkpoint is a plain dict of tensors and simple values. A transformer's holds all that sampling needs: its
configuration, the text merges, the VQ-GAN and the model; and all that going on with training needs: the optimiser's
state and the step. There is no random state in it: randomness is a function of (seed, step), see chance.py.
"""
import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import Config, from_dict
from nanomagvlt.io import first_line, whole
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message is one line that names it."""


def save(path: Path, kind: str, cfg: Config, **content) -> None:
    """Writes a checkpoint of kind "vqgan" or "magvlt", whole or not at all. One process at a time."""
    for half in path.parent.glob(f"{path.name}.*.tmp"):  # what a kill in the middle of an earlier save has left
        half.unlink()
    with whole(path) as file:
        torch.save({"kind": kind, "config": dataclasses.asdict(cfg), **content}, file)


def load(path: str | Path, kind: str) -> dict:
    """The checkpoint's dict, on the CPU, its "config" a Config. Raises CheckpointError."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or foreign file fails in any of a dozen ways inside the unpickler
        raise CheckpointError(f"{path}: not a checkpoint of nanomagvlt, or a damaged one ({first_line(error)})"
                              ) from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else None
        raise CheckpointError(f"{path}: holds {found or 'something else'}, where a {kind} checkpoint is wanted")
    needed = {"vqgan": ("config", "vqgan"), "magvlt": ("config", "model", "vqgan", "bpe")}[kind]
    if missing := [name for name in needed if name not in content]:
        raise CheckpointError(f"{path}: a {kind} checkpoint without its {missing[0]}")
    try:
        content["config"] = from_dict(content["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used ({error})") from None
    return content


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQ-GAN of a "vqgan" checkpoint, in evaluation mode. Raises CheckpointError."""
    content = load(path, "vqgan")
    return load_strict(VQGAN, content["config"], content["vqgan"], path)


def load_magvlt(path: str | Path) -> tuple[MAGVLT, VQGAN, BPE]:
    """The transformer, VQ-GAN and text tokenizer of a "magvlt" checkpoint, ready to sample. Raises CheckpointError."""
    content = load(path, "magvlt")
    cfg = content["config"]
    try:
        bpe = BPE.from_text(content["bpe"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its merges cannot be used ({first_line(error)})") from None
    return load_strict(MAGVLT, cfg, content["model"], path), load_strict(VQGAN, cfg, content["vqgan"], path), bpe


def load_strict(kind: type[nn.Module], cfg: Config, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """A module in evaluation mode that takes the tensors of state, as float32, for its own: nothing is initialised in
    vain, nothing copied. Raises CheckpointError where one has not exactly the right name and shape."""
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor) and
                                              tensor.is_floating_point() and tensor.layout == torch.strided
                                              for name, tensor in state.items()):
        raise CheckpointError(f"{path}: not all of its {kind.__name__} is real numbers with names")
    try:
        with torch.device("meta"):
            module = kind(cfg)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used ({first_line(error)})") from None
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            raise CheckpointError(f"{path}: the tensor {name} is missing")
        if name not in wanted:
            raise CheckpointError(f"{path}: has a tensor {name}, which this model has not")
        if state[name].shape != wanted[name].shape:
            raise CheckpointError(f"{path}: {name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return module.eval()


def weight_hash(module: nn.Module) -> str:
    """A short name for exactly these weights: a hash of every tensor."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def newest(runs: str | Path = "runs") -> Path:
    """The newest runs/*/last.pt. Raises CheckpointError, with the command that trains one, where there is none."""
    files = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckpointError(f"nothing is trained under {runs}/ yet: run `python train.py --preset tiny`")
    return files[-1]
