"""Appendix - The authors' published weights, and taming-transformers' VQ-GAN, as they are.

`magvlt-it2it-base.ckpt` and `-large.ckpt` hold the transformer and the VQ-GAN under other names than ours: one table,
TRANSFORMER, says which. Their sizes are read off their tensors. Loading is strict: a tensor that is missing, left
over or misshapen is an error that names it.

The files are pickles, and a pickle may run any code. Nothing from them is run: classes of a few known packages
become inert objects, any other is refused by name, and of what remains only the tensors are kept.

`python -m nanomagvlt.published magvlt-it2it-base.ckpt --out base.pt` converts a file once; sample.py takes either.
"""
import hashlib
import math
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from nanomagvlt.training import checkpoint
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training.checkpoint import CheckpointError
from nanomagvlt.config import Config, preset
from nanomagvlt.training.cli import Parser
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN

# Our names -> theirs; several of theirs are stacked, in this order. {i} runs over the blocks.
TRANSFORMER = {
    "tokens.weight": ("tok_emb.weight", "tok_emb_spc.weight"),
    "places.weight": ("pos_emb_img.pos_embed", "pos_emb_txt.pos_embed", "pos_emb_spc.pos_embed"),
    "blocks.{i}.norm1.weight": ("blocks.{i}.ln1.weight",),
    "blocks.{i}.norm1.bias": ("blocks.{i}.ln1.bias",),
    "blocks.{i}.attention.qkv.weight": tuple(f"blocks.{{i}}.attn.{p}.weight" for p in ("query", "key", "value")),
    "blocks.{i}.attention.qkv.bias": tuple(f"blocks.{{i}}.attn.{p}.bias" for p in ("query", "key", "value")),
    "blocks.{i}.attention.proj.weight": ("blocks.{i}.attn.proj.weight",),
    "blocks.{i}.attention.proj.bias": ("blocks.{i}.attn.proj.bias",),
    "blocks.{i}.norm2.weight": ("blocks.{i}.ln2.weight",),
    "blocks.{i}.norm2.bias": ("blocks.{i}.ln2.bias",),
    "blocks.{i}.mlp.0.weight": ("blocks.{i}.mlp.0.weight",),
    "blocks.{i}.mlp.0.bias": ("blocks.{i}.mlp.0.bias",),
    "blocks.{i}.mlp.2.weight": ("blocks.{i}.mlp.2.weight",),
    "blocks.{i}.mlp.2.bias": ("blocks.{i}.mlp.2.bias",),
    "head.0.weight": ("lm_layer.linear.weight",),
    "head.0.bias": ("lm_layer.linear.bias",),
    "head.2.weight": ("lm_layer.ln.weight",),
    "head.2.bias": ("lm_layer.ln.bias",),
    "output_bias": ("lm_layer.output_bias",),
    "length.weight": ("length_predictor.weight",),
}

CLIP_BPE = Path(__file__).parents[2] / "data" / "downloads" / "bpe_simple_vocab_16e6.txt.gz"

KNOWN_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.",
                  "numpy.", "tokenizers.", "transformers.")
# Files in PyTorch's old format cannot be asked which classes they name, so these are what they may.
KNOWN_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "argparse.Namespace",
                 "pytorch_lightning.utilities.parsing.AttributeDict", "tokenizers.Tokenizer", "tokenizers.models.Model",
                 "tokenizers.implementations.char_level_bpe.CharBPETokenizer")


class Inert:
    """Stands for any object of a foreign class: takes whatever it is given and does nothing with it."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def check_digest(path: str | Path, sha256: str) -> None:
    """Raises CheckpointError where a file's SHA-256 is another than sha256; an empty one asks for nothing."""
    if not sha256:
        return
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise CheckpointError(f"{path}: its SHA-256 is {found}, not {sha256}: download it again")


def looks_published(path: str | Path) -> bool:
    """Whether a file holds a "state_dict", as Lightning's do and ours do not. Reads names only, runs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            head = archive.read(pickled[0]) if pickled else b""
    except (zipfile.BadZipFile, OSError):
        head = Path(path).read_bytes()[:1_000_000] if Path(path).is_file() else b""
    return b"state_dict" in head


def read_state_dict(path: str | Path, sha256: str = "") -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint, by their own names, mapped from the file rather than read into memory.

    sha256, if given, is checked before anything else is looked at. Raises CheckpointError, one line, for a file that
    is not there, damaged, names a class of no known package, or holds something else than tensors.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    check_digest(path, sha256)
    is_zip = zipfile.is_zipfile(path)
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else KNOWN_CLASSES
        for name in classes:
            if not (name.startswith(KNOWN_PACKAGES) or name in KNOWN_CLASSES):
                raise CheckpointError(f"{path}: refused, for it names {name}, which no published checkpoint does")
        # Dict-like classes must be dicts, or what they hold is lost on the way.
        inert = [(OrderedDict if name.endswith("AttributeDict") else Inert, name) for name in classes]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file fails in any of a dozen ways inside the unpickler
        refused = re.search(r"(?:GLOBAL|global) (\S+\.\S+)", str(error))
        reason = f"refused, for it names {refused[1]}" if refused else "not a checkpoint, or a damaged one"
        raise CheckpointError(f"{path}: {reason}") from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: its state_dict has the key {name!r}, which is no name")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
    return state


def vqgan_sizes(state: dict[str, Tensor], image_tokens: int = 0) -> dict:
    """Config fields of a VQ-GAN, from its tensors. Without image_tokens, N, images are taken to be 256 pixels."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    channels = state["encoder.conv_in.weight"].shape[0]
    image_size = math.isqrt(image_tokens) * 2 ** (levels - 1) if image_tokens else 256
    wide = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return dict(
        image_size=image_size, vq_channels=channels, vq_groups=32, vq_patchwise=False,
        codebook_size=state["quantize.embedding.weight"].shape[0],
        codebook_dim=state["quantize.embedding.weight"].shape[1],
        vq_latent=state["quant_conv.weight"].shape[1],
        vq_multipliers=tuple(c // channels for c in wide),
        vq_res_blocks=sum(re.fullmatch(r"encoder.down.0.block.\d+.conv1.weight", name) is not None for name in state),
        vq_attention=tuple(image_size // 2 ** i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state))


def transformer_sizes(state: dict[str, Tensor], codebook_size: int, heads: int = 0) -> dict:
    """Config fields of a transformer, from its tensors in their layout. heads 0: width / 128, as published."""
    rows, width = state["tok_emb.weight"].shape
    return dict(width=width, heads=heads or max(1, width // 128), text_vocab=rows - codebook_size,
                layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
                text_length=state["pos_emb_txt.pos_embed"].shape[0],
                length_positions=min(16, state["pos_emb_txt.pos_embed"].shape[0]))


def release_bpe(path: str | Path, cfg: Config) -> BPE:
    """The tokenizer of the authors' release, on CLIP's merges. Raises ValueError where it does not fit the model."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: CLIP's merges are not there: run `python data/download.py clip-bpe`, or name them "
                         "with --bpe")
    bpe = BPE.load(path, words="release")
    if bpe.vocab_size != cfg.text_vocab:
        raise ValueError(f"{path}: has {bpe.vocab_size:,} tokens, but the model has {cfg.text_vocab:,}")
    return bpe


def load_vqgan(path: str | Path, sha256: str = "") -> VQGAN:
    """The VQ-GAN of a taming-transformers file, or that in one of the authors'. Raises CheckpointError."""
    state = {name: tensor for name, tensor in read_state_dict(path, sha256).items() if not name.startswith("loss.")}
    within = {name.removeprefix("model_vqvae."): t for name, t in state.items() if name.startswith("model_vqvae.")}
    state = within or state
    return checkpoint.load_strict(VQGAN, _config(path, vqgan_sizes, state), state, path)


def load_magvlt(path: str | Path, heads: int = 0, sha256: str = "") -> tuple[MAGVLT, VQGAN]:
    """The transformer and the VQ-GAN of one of the authors' files. Raises CheckpointError."""
    state = read_state_dict(path, sha256)
    if left_over := [name for name in state if not name.startswith(("model.", "model_vqvae."))]:
        raise CheckpointError(f"{path}: has a tensor {left_over[0]}, which a MAGVLT has not")
    theirs = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    vq_state = {name.removeprefix("model_vqvae."): t for name, t in state.items() if name.startswith("model_vqvae.")}

    def sizes(theirs: dict[str, Tensor], vq_state: dict[str, Tensor]) -> dict:
        vq = vqgan_sizes(vq_state, theirs["pos_emb_img.pos_embed"].shape[0])
        return {**vq, **transformer_sizes(theirs, vq["codebook_size"], heads)}
    cfg = _config(path, sizes, theirs, vq_state)
    return (checkpoint.load_strict(MAGVLT, cfg, to_ours(theirs, cfg.layers, path), path),
            checkpoint.load_strict(VQGAN, cfg, vq_state, path))


def to_ours(theirs: dict[str, Tensor], layers: int, path: str | Path = "checkpoint") -> dict[str, Tensor]:
    """Their transformer's tensors under our names. Raises CheckpointError for a tensor missing or left over."""
    ours, unused = {}, set(theirs)
    for name, sources in TRANSFORMER.items():
        for i in range(layers if "{i}" in name else 1):
            wanted = [source.replace("{i}", str(i)) for source in sources]
            if missing := [source for source in wanted if source not in theirs]:
                raise CheckpointError(f"{path}: the tensor {missing[0]} is missing")
            parts = [theirs[source] for source in wanted]
            ours[name.replace("{i}", str(i))] = torch.cat(parts) if len(parts) > 1 else parts[0]
            unused -= set(wanted)
    if unused:
        raise CheckpointError(f"{path}: has a tensor {min(unused)}, which a MAGVLT has not")
    return ours


def _config(path: str | Path, sizes, *states: dict[str, Tensor]) -> Config:
    """The base preset with the sizes that the tensors say."""
    try:
        found = sizes(*states)
        n = (found["image_size"] // 2 ** (len(found["vq_multipliers"]) - 1)) ** 2
        return preset("base", **found, image_steps=min(10, n))
    except KeyError as error:
        raise CheckpointError(f"{path}: the tensor {error.args[0]} is missing") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:  # no such tensors, or unfit
        raise CheckpointError(f"{path}: its tensors are not those of a published model ({error})") from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="nanomagvlt.published", description=__doc__)
    parser.add_argument("file", type=Path, help="a published checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, in this project's format")
    parser.add_argument("--bpe", type=Path, default=CLIP_BPE, help=f"CLIP's merges (default {CLIP_BPE})")
    parser.add_argument("--heads", type=int, default=0, help="attention heads (default: width / 128)")
    parser.add_argument("--sha256", default="", help="refuse a file that has another digest")
    parser.add_argument("--only-vqgan", action="store_true",
                        help="a vqgan.pt to train with: of taming-transformers' file, or of one of the authors'")
    args = parser.parse(argv)
    try:
        if args.only_vqgan:
            vqgan = load_vqgan(args.file, args.sha256)
            checkpoint.save(args.out, "vqgan", vqgan.cfg, step=0, vqgan=vqgan.state_dict())
            print(f"the VQ-GAN of {args.file} -> {args.out}")
            return
        model, vqgan = load_magvlt(args.file, args.heads, args.sha256)
        bpe = release_bpe(args.bpe, model.cfg)
        checkpoint.save(args.out, "magvlt", model.cfg, step=0, model=model.state_dict(), bpe=bpe.to_text(),
                        vqgan=vqgan.state_dict())
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror or error}")
    print(f"{args.file} -> {args.out}")


if __name__ == "__main__":
    main()
