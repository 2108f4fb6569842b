"""The published weights: the authors' MAGVLT, and the VQ-GAN of taming-transformers.

`magvlt-it2it-base.ckpt` and `-large.ckpt` contain the transformer and the VQ-GAN. The transformer's tensors have other
names than ours: the table TRANSFORMER maps them. All sizes are read from the shapes of the tensors. A tensor that is
missing, unknown or of another shape is an error. The files also contain objects of other packages: they become inert
objects, only the tensors are used, and nothing is run (see io.py).

`python -m nanomagvlt.training.pretrained magvlt-it2it-base.ckpt --out base.pt` converts a file to a checkpoint of this
project. sample.py reads both.
"""
import math
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from nanomagvlt.config import Config, preset
from nanomagvlt.io import one_line_error, read_tensors
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint
from nanomagvlt.training.cli import Parser

# Our names -> theirs. Several of theirs are concatenated in this order. {i} is a block's number, {p} weight or bias.
TRANSFORMER = {
    "token_table.weight": ("tok_emb.weight", "tok_emb_spc.weight"),
    "position_table.weight": ("pos_emb_img.pos_embed", "pos_emb_txt.pos_embed", "pos_emb_spc.pos_embed"),
    "blocks.{i}.norm1.{p}": ("blocks.{i}.ln1.{p}",),
    "blocks.{i}.attention.qkv.{p}": tuple(f"blocks.{{i}}.attn.{part}.{{p}}" for part in ("query", "key", "value")),
    "blocks.{i}.attention.proj.{p}": ("blocks.{i}.attn.proj.{p}",),
    "blocks.{i}.norm2.{p}": ("blocks.{i}.ln2.{p}",),
    "blocks.{i}.mlp.0.{p}": ("blocks.{i}.mlp.0.{p}",),
    "blocks.{i}.mlp.2.{p}": ("blocks.{i}.mlp.2.{p}",),
    "head.0.{p}": ("lm_layer.linear.{p}",),
    "head.2.{p}": ("lm_layer.ln.{p}",),
    "output_bias": ("lm_layer.output_bias",),
    "length.weight": ("length_predictor.weight",),
}
PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.", "numpy.",
            "tokenizers.", "transformers.", "argparse.Namespace")  # objects of these packages become inert
CLIP_BPE = Path(__file__).parents[2] / "data" / "downloads" / "bpe_simple_vocab_16e6.txt.gz"


def looks_published(path: str | Path) -> bool:
    """True if the content is a dictionary with a "state_dict", as PyTorch Lightning saves it; ours has none."""
    content = read_tensors(path, "a checkpoint", inert=PACKAGES)
    return isinstance(content, dict) and "state_dict" in content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a published checkpoint. Raises ValueError, one line, for any other file."""
    content = read_tensors(path, "a checkpoint", inert=PACKAGES)
    with one_line_error(path, "has no state_dict of named tensors"):
        return {str(name): tensor.detach() for name, tensor in content["state_dict"].items()}


def select_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with this prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQ-GAN of taming-transformers' file, or of the authors'. Raises ValueError, one line."""
    state = read_state_dict(path)
    state = select_prefix(state, "model_vqvae.") or {n: t for n, t in state.items() if not n.startswith("loss.")}
    return checkpoint.load_module(VQGAN, read_config(path, state), state, path)


def load_magvlt(path: str | Path, heads: int = 0) -> tuple[MAGVLT, VQGAN]:
    """The transformer and the VQ-GAN of the authors' file. Raises ValueError, one line.

    The number of heads is in no tensor. heads 0: width / 128, as in both published models.
    """
    state = read_state_dict(path)
    vqgan = select_prefix(state, "model_vqvae.")
    theirs = {n.removeprefix("model."): t for n, t in state.items() if not n.startswith("model_vqvae.")}
    cfg = read_config(path, vqgan, theirs, heads)
    return (checkpoint.load_module(MAGVLT, cfg, to_ours(theirs, cfg.layers, path), path),
            checkpoint.load_module(VQGAN, cfg, vqgan, path))


def their_names(layers: int) -> dict[str, list[str]]:
    """For each tensor of our transformer, the names of theirs that make it."""
    return {ours.format(i=i, p=p): [name.format(i=i, p=p) for name in theirs]
            for (ours, theirs), i, p in product(TRANSFORMER.items(), range(layers), ("weight", "bias"))}


def to_ours(theirs: dict[str, Tensor], layers: int, path: str | Path) -> dict[str, Tensor]:
    """The transformer's tensors under our names. Raises ValueError for a missing or an unknown tensor."""
    ours, theirs = {}, dict(theirs)
    with one_line_error(path, "not the tensors of a published MAGVLT"):
        for name, sources in their_names(layers).items():
            parts = [theirs.pop(source) for source in sources]
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if theirs:
        raise ValueError(f"{path}: has an unknown tensor {min(theirs)!r}")
    return ours


def read_config(path: str | Path, vqgan: dict[str, Tensor], theirs: dict[str, Tensor] | None = None,
                heads: int = 0) -> Config:
    """The base preset with the sizes of these tensors. A VQ-GAN alone gets 256 x 256 pixels."""
    with one_line_error(path, "not the tensors of a published model"):
        levels = count_children(vqgan, "encoder.down.")
        side = math.isqrt(len(theirs["pos_emb_img.pos_embed"])) if theirs is not None else 256 // 2 ** (levels - 1)
        channels, size = vqgan["encoder.conv_in.weight"].shape[0], side * 2 ** (levels - 1)
        codebook_size, codebook_dim = vqgan["quantize.embedding.weight"].shape
        widths = [vqgan[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        sizes = dict(
            image_size=size, image_steps=min(10, side ** 2), codebook_size=codebook_size, codebook_dim=codebook_dim,
            vq_channels=channels, vq_multipliers=tuple(width // channels for width in widths), vq_patchwise=False,
            vq_groups=32, vq_latent=vqgan["quant_conv.weight"].shape[1],
            vq_res_blocks=count_children(vqgan, "encoder.down.0.block."),
            vq_attention=tuple(size // 2 ** i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in vqgan))
        if theirs is not None:
            rows, width = theirs["tok_emb.weight"].shape
            text_length = len(theirs["pos_emb_txt.pos_embed"])
            sizes |= dict(width=width, heads=heads or max(1, width // 128), layers=count_children(theirs, "blocks."),
                          text_vocab=rows - codebook_size, text_length=text_length,
                          length_positions=min(16, text_length))
        return preset("base", **sizes)


def count_children(state: dict[str, Tensor], prefix: str) -> int:
    """The number of different names that directly follow a prefix such as "blocks."."""
    return len({name.split(".")[0] for name in select_prefix(state, prefix)})


def load_merges(path: str | Path, words: str, vocab_size: int) -> BPE:
    """CLIP's merges. `words`: how texts are split, "clip" or "release". Raises ValueError if they do not fit a model of
    this vocabulary."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; `python data/download.py clip-bpe` fetches CLIP's merges")
    bpe = BPE.load(path, words)
    if bpe.vocab_size != vocab_size:
        raise ValueError(f"{path}: has {bpe.vocab_size:,} tokens, but the model has {vocab_size:,}")
    return bpe


def convert(args) -> None:
    """Writes a published checkpoint, or the VQ-GAN in it, in this project's format."""
    if args.only_vqgan:
        vqgan = load_vqgan(args.file)
        checkpoint.save(args.out, "vqgan", vqgan.cfg, step=0, vqgan=vqgan.state_dict())
    else:
        model, vqgan = load_magvlt(args.file)
        checkpoint.save(args.out, "magvlt", model.cfg, step=0, model=model.state_dict(), vqgan=vqgan.state_dict(),
                        bpe=load_merges(args.bpe, "release", model.cfg.text_vocab).to_text())
    print(f"{args.file} -> {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="nanomagvlt.training.pretrained", description=__doc__)
    parser.add_argument("file", type=Path, help="a published checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, in this project's format")
    parser.add_argument("--bpe", type=Path, default=CLIP_BPE, help=f"CLIP's merges (default {CLIP_BPE})")
    parser.add_argument("--only-vqgan", action="store_true", help="write a vqgan.pt to train with")
    parser.run(convert, parser.parse(argv))


if __name__ == "__main__":
    main()
