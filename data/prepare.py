"""Makes a token cache, what training reads, from any source of pairs:

  python data/prepare.py --source 'shards/*.tar' --vqgan runs/mine/vqgan.pt --out caches/mine/train

A source is shapes:LEVEL, a folder of images with a .txt of the same name beside each, tar shards as img2dataset writes
them ('shards/{00000..00331}.tar' too), or coco:CAPTIONS.json:IMAGES/. data/README.md says more of each. Training then
takes it with: python train.py --cache caches/mine --vqgan runs/mine/vqgan.pt
Bad samples are left out, and counted by reason; a source with more than 5% of them is refused.

Stopped or killed, the same command goes on where it was. Many processes share the work with --part 1/8 to --part 8/8,
or under torchrun; then the same command without --part (or torchrun) joins what they made.

  python data/prepare.py --inspect --source 'shards/*.tar'     looks at a source first; no VQ-GAN is needed
"""
import math
import random
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere, without installing

from nanomagvlt.training import checkpoint
from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from nanomagvlt.config import preset
from nanomagvlt.training.cli import Parser
from nanomagvlt.data.cache import (TokenCache, is_made, join_parts, make_batch, part_paths, refuse_foreign, remove_parts,
                             rows_of_step, to_pixels, write_part)
from nanomagvlt.sampling.pipeline import contact_sheet, pick_device
from nanomagvlt.training.distributed import of_many, share_of_work
from nanomagvlt.data.sources import MAX_BAD_SHARE, Pair, as_pairs, left_out, pieces_of, usable

LOOKED_AT = 128   # samples that --inspect keeps, drawn at random
ON_SHEET = 24


def prepare(args) -> None:
    """Makes what is missing of this process's share and, where that is all, joins it."""
    part, device = share_of_work(args.part, args.device)
    vqgan = checkpoint.load_vqgan(args.vqgan).to(pick_device(device))
    pieces = pieces_of(args.source, vqgan.cfg.image_size, args.pairs, args.split, args.seed)
    settings = {"vqgan": checkpoint.weight_hash(vqgan), "image_size": vqgan.cfg.image_size, "crops": args.crops,
                "seed": args.seed, "clean_captions": args.clean_captions}
    paths = part_paths(args.out, pieces, settings)
    if is_made(args.out, paths):
        remove_parts(paths)  # if it was killed in that
        print(f"{args.out} is there, made of the same: nothing to do")
        return
    refuse_foreign(args.out)
    rank, world = part or (0, 1)
    mine = range(rank, len(pieces), world)
    missing = [i for i in mine if not paths[i].exists()]
    if len(missing) < len(mine):
        print(f"going on: {len(mine) - len(missing)} of {len(mine)} pieces are there")
    with tqdm(unit="pair", desc=f"pieces to do: {len(missing)}") as bar:
        for done, i in enumerate(missing, 1):
            write_part(paths[i], pieces[i], vqgan, settings, bar.update)
            bar.total = round(bar.n / done * len(missing))  # so that the bar can tell the time left
    if part:
        print(f"part {rank + 1}/{world} is done; when all are, the same command without --part joins them")
        return
    cache = join_parts(args.out, args.source, paths, settings)
    remove_parts(paths)
    print(f"{len(cache):,} pairs -> {args.out}{left_out(Counter(cache.meta['counts']))}")


# ---------------------------------------------------------------------------------------------- looking first

def inspect(args) -> None:
    """The data set's doctor: reads a source, or a --part of it, as training would, and says what is in it."""
    vqgan = args.vqgan and checkpoint.load_vqgan(args.vqgan)
    side = vqgan.cfg.image_size if vqgan else args.image_size
    bpe = args.bpe and BPE.load(args.bpe)
    rank, world = args.part or (0, 1)
    pieces = pieces_of(args.source, 0, args.pairs, args.split, args.seed)[rank::world]
    counts, sides, lengths, looked_at = Counter(), [], [], []
    chance, started = random.Random(args.seed), time.perf_counter()
    for piece in tqdm(pieces, unit="piece"):
        for i, (key, captions, image) in enumerate(usable(piece, counts), len(sides)):
            captions = [clean_caption(caption) if args.clean_captions else caption for caption in captions]
            lengths += [len(bpe.encode(caption)) + 1 if bpe else len(caption.split()) for caption in captions]
            sides.append(min(image.size))
            place = i if i < LOOKED_AT else chance.randrange(i + 1)  # any sample is kept with the same chance
            if place < LOOKED_AT:
                looked_at[place:place + 1] = as_pairs(key, captions[:1], image, side)
    rate = len(sides) / (time.perf_counter() - started)
    bad = sum(counts.values()) - counts["good"]
    print(f"{args.source}: {len(sides):,} images with {len(lengths):,} captions in {len(pieces):,} "
          f"piece{'s' * (len(pieces) > 1)}, read at {rate:.0f}/s")
    print(f"bad: {bad:,} of {bad + len(sides):,}{left_out(counts)}" + (
        f"; more than {MAX_BAD_SHARE:.0%}, so it would be refused" if bad > MAX_BAD_SHARE * (bad + len(sides)) else ""))
    if not sides:
        return
    unit, cut = ("tokens, the end counted", args.text_length) if bpe else ("words", None)
    print(f"images: shorter side {spread(sides)} pixels; {share(np.array(sides) < side)} are smaller than {side}, and "
          "would be enlarged")
    print(f"captions: {spread(lengths)} {unit}" + (
        f"; {share(np.array(lengths) > cut)} are longer than {cut}, and would be cut" if cut else
        "; with --bpe FILE, in tokens, and how many would be cut"))
    print(f"an epoch: {len(lengths) / args.batch_size:,.1f} updates of {args.batch_size:,} pairs")
    if vqgan and len(looked_at) > 1:
        print(f"MixSel: {joining_changes(vqgan, looked_at):.1%} of the tokens would be others if the two images were "
              f"joined before they are encoded ({len(looked_at)} images)")
    shown = looked_at[:ON_SHEET]
    labels = [textwrap.shorten(pair.caption, 100, placeholder=" ...") for pair in shown]
    contact_sheet(np.stack([pair.image for pair in shown]), labels, columns=6).save(args.sheet)
    print(f"{len(shown)} of them, drawn at random -> {args.sheet}")


def spread(values: list[int]) -> str:
    low, median, high = np.percentile(values, [0, 50, 100]).astype(int)
    return f"{low} to {high} (median {median})"


def share(which: np.ndarray) -> str:
    return f"{which.mean():.1%}"


@torch.inference_mode()
def joining_changes(vqgan, pairs: list[Pair]) -> float:
    """What it costs that the cache holds each image's half alone: the share of a joined image's tokens that differ.

    The encoder sees over the seam unless it is patch-wise, and group norms see the whole picture.
    """
    g, changed = math.isqrt(vqgan.cfg.image_tokens), []
    for name, rows, axis in (("tall", g, 2), ("wide", g // 2, 1)):
        first = np.stack([getattr(pair, name) for pair in pairs])                                    # (B, h, w, 3)
        second = np.roll(first, 1, axis=0)
        joined = vqgan.encode(to_pixels(np.concatenate([first, second], axis)))                      # (B, N)
        apart = [vqgan.encode(to_pixels(half)).unflatten(1, (rows, -1)) for half in (first, second)]
        changed.append(torch.cat(apart, axis).flatten(1) != joined)
    return torch.cat(changed).float().mean().item()


def time_batches(args) -> None:
    """How fast batches come from a cache: tokens read, captions encoded with BPE dropout, as in training."""
    cache, bpe = TokenCache(args.time), BPE.load(args.bpe)
    cfg = preset("base", text_length=args.text_length)
    batches, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < args.seconds:
        rows = rows_of_step(batches, 64, len(cache), args.seed)
        make_batch(cache, bpe, rows, cfg, cfg.bpe_dropout, (args.seed, batches))
        batches += 1
    print(f"{64 * batches / seconds:,.0f} samples/s from {args.time}, BPE dropout {cfg.bpe_dropout} included, "
          "in one process")


# ---------------------------------------------------------------------------------------------- from the command line

def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="data/prepare.py", description=__doc__)
    parser.add_argument("--source", help="shapes:LEVEL, a folder, tar shards (a path, 'pattern*.tar' or "
                        "'{00000..00331}.tar') or coco:CAPTIONS.json:IMAGES/; or several with commas between")
    parser.add_argument("--vqgan", type=Path, help="the vqgan.pt that makes the image tokens")
    parser.add_argument("--out", type=Path, help="the folder to write: caches/NAME/train or .../val")
    parser.add_argument("--crops", type=int, default=0, help="random crops of each image, as DALL-E's augmentation, "
                        "each a pair of its own (default 0: its centre)")
    parser.add_argument("--part", type=of_many, metavar="K/N", help="do only the K-th of N shares (default: all)")
    parser.add_argument("--pairs", type=int, default=40_000, help="pairs to draw of shapes (default 40000)")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"],
                        help="of shapes, or in Karpathy's file; his train includes restval (default train)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes and crops (default 0)")
    parser.add_argument("--clean-captions", action="store_true",
                        help="the MAGVLT release's clean-up: lower case, no - or /, no leading marks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    group = parser.add_argument_group("looking first")
    group.add_argument("--inspect", action="store_true", help="count, measure and show what is in a source")
    group.add_argument("--bpe", type=Path, help="merges: caption lengths in tokens instead of words")
    group.add_argument("--text-length", type=int, default=64, help="text tokens that fit (default 64)")
    group.add_argument("--image-size", type=int, default=256, help="pixels wanted, where no --vqgan says (default 256)")
    group.add_argument("--batch-size", type=int, default=4096, help="pairs an update (default 4096)")
    group.add_argument("--sheet", type=Path, default="inspect.png", help="the picture to write (default inspect.png)")
    group.add_argument("--time", type=Path, metavar="CACHE", help="how fast batches come from a cache, with --bpe")
    group.add_argument("--seconds", type=float, default=5, help="how long --time takes (default 5)")
    args = parser.parse(argv)
    wanted = ["time", "bpe"] if args.time else ["source"] if args.inspect else ["source", "vqgan", "out"]
    if missing := [name for name in wanted if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is wanted, or --inspect to look at a source; see --help")
    for name in ("crops", "pairs", "text_length", "image_size", "batch_size"):
        if getattr(args, name) < (name != "crops"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {int(name != 'crops')}")
    try:
        (time_batches if args.time else inspect if args.inspect else prepare)(args)
    except KeyboardInterrupt:
        parser.exit(130, "stopped; what is finished of a cache stays, and the same command goes on from there\n")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
