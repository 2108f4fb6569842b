"""Makes a token cache, the only format that training reads, from any source of pairs:

  python data/prepare.py --source 'shards/*.tar' --vqgan runs/mine/vqgan.pt --out caches/mine/train

A source is shapes:LEVEL, a folder of images, each with a .txt of the same name, tar shards as img2dataset writes them
('shards/{00000..00331}.tar' too), or coco:CAPTIONS.json:IMAGES/; see data/README.md. Training then reads the cache:
python train.py --cache caches/mine --vqgan runs/mine/vqgan.pt
Bad samples are left out and counted by reason; a source with more than 5% of them is refused.

A run that was stopped or killed goes on with the same command. Many processes share the work with --part 1/8 to
--part 8/8, or under torchrun; then the same command without --part or torchrun joins the parts.

  python data/prepare.py --inspect --source 'shards/*.tar'     describes a source; no VQ-GAN is needed
"""
import random
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere, without installing

from nanomagvlt.config import CHOICES
from nanomagvlt.data import cache
from nanomagvlt.data.sources import MAX_BAD_SHARE, left_out, num_samples, pieces_of, square, usable
from nanomagvlt.io import write_image
from nanomagvlt.sampling.pipeline import contact_sheet, pick_device
from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from nanomagvlt.training import checkpoint
from nanomagvlt.training.cli import Parser, check_out, positive
from nanomagvlt.training.distributed import parse_part, share_of_work

NUM_SHOWN = 24  # samples on the sheet of --inspect, drawn at random


def prepare(args) -> None:
    """Makes the missing parts of this process's share; joins all parts if the share is the whole."""
    part, device = share_of_work(args.part, args.device)
    vqgan = checkpoint.load_vqgan(args.vqgan).to(pick_device(device))
    pieces = pieces_of(args.source, vqgan.cfg.image_size, args.pairs, args.split, args.seed)
    settings = {"vqgan": checkpoint.weight_hash(vqgan), "image_size": vqgan.cfg.image_size, "crops": args.crops,
                "seed": args.seed, "clean_captions": args.clean_captions, "fit": args.fit or vqgan.cfg.fit}
    if args.crops and settings["fit"] != "crop":
        raise ValueError(f"--crops cuts out squares, and does not go with fit {settings['fit']}")
    if args.crops > 255:
        raise ValueError(f"--crops {args.crops}: a cache holds at most 255 crops of an image")
    paths = cache.part_paths(args.out, pieces, settings)
    if cache.is_made(args.out, paths):
        cache.remove_parts(paths)  # of a process that was killed while it removed them
        print(f"{args.out} exists, and was made from the same parts: nothing to do")
        return
    cache.check_replaceable(args.out)
    cache.make_parts(paths, pieces, vqgan, settings, part or (0, 1))
    if part:
        print(f"part {part[0] + 1}/{part[1]} is done; the same command without --part or torchrun joins all parts")
        return
    made = cache.join_parts(args.out, args.source, paths, settings)
    cache.remove_parts(paths)
    print(f"{len(made):,} pairs -> {args.out}{left_out(made.meta['counts'])}")


def inspect(args) -> None:
    """Reads a source, or a --part of it, as training would, and prints what it contains."""
    vqgan = args.vqgan and checkpoint.load_vqgan(args.vqgan)
    check_out(args.sheet, "--sheet")
    side, fit = vqgan.cfg.image_size if vqgan else args.image_size, args.fit or (vqgan.cfg.fit if vqgan else "crop")
    bpe = args.bpe and BPE.load(args.bpe)
    first, step = args.part or (0, 1)
    pieces = pieces_of(args.source, 0, args.pairs, args.split, args.seed)[first::step]
    counts, sizes, lengths, kept = {}, [], [], []
    rng, started = random.Random(args.seed), time.perf_counter()
    for piece in tqdm(pieces, unit="piece"):
        for i, (_, captions, image) in enumerate(usable(piece, counts), len(sizes)):
            captions = [clean_caption(caption) if args.clean_captions else caption for caption in captions]
            lengths += [len(bpe.encode(caption)) + 1 if bpe else len(caption.split()) for caption in captions]
            sizes.append(image.size)
            slot = i if i < NUM_SHOWN else rng.randrange(i + 1)  # reservoir sampling: all samples are equally likely
            if slot < NUM_SHOWN:
                kept[slot:slot + 1] = [(square(image, side, fit), captions[0])]
    total, rate = num_samples(counts), len(sizes) / (time.perf_counter() - started)
    print(f"{args.source}: {len(sizes):,} images with {len(lengths):,} captions in {len(pieces):,} pieces, "
          f"read at {rate:.0f}/s")
    print(f"bad samples: {total - len(sizes):,} of {total:,}; the limit is {MAX_BAD_SHARE:.0%}{left_out(counts)}")
    if not sizes:
        return
    sizes, cut = np.array(sizes), np.mean(np.array(lengths) > args.text_length)
    short, long = sizes.min(1), sizes.max(1)
    print(f"images: shorter side {spread(short)} pixels; {np.mean(short < side):.1%} are smaller than {side} and would "
          f"be enlarged\nwidth / height: {spread(sizes[:, 0] / sizes[:, 1])}; --fit crop leaves out "
          f"{np.mean(1 - short / long):.1%} of an image, on average")
    print(f"captions: {spread(lengths)} " + (
        f"tokens with the end token; {cut:.1%} are longer than {args.text_length} and would be cut" if bpe
        else "words (with --bpe FILE: tokens, and how many are cut)"))
    images, labels = zip(*kept)
    write_image(args.sheet, [contact_sheet(np.stack(images), labels, columns=6)])
    print(f"{len(kept)} random samples -> {args.sheet}")


def spread(values: list[float]) -> str:
    low, median, high = np.percentile(values, [0, 50, 100]).round(2)
    return f"{low:g} to {high:g} (median {median:g})"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="data/prepare.py", description=__doc__)
    parser.add_argument("--source", help="shapes:LEVEL, a folder, tar shards (a path, 'pattern*.tar' or "
                        "'{00000..00331}.tar') or coco:CAPTIONS.json:IMAGES/; several with commas between them")
    parser.add_argument("--vqgan", type=Path, help="the vqgan.pt that makes the image tokens")
    parser.add_argument("--out", type=Path, help="the folder to write: caches/NAME/train or .../val")
    parser.add_argument("--crops", type=positive, default=0, help="random crops of each image, as in DALL-E's "
                        "augmentation, each a pair of its own (default: the centre alone)")
    parser.add_argument("--fit", choices=CHOICES["fit"], help="crop, squeeze or pad (with white) images that are not "
                        "square (default: as the VQ-GAN was trained, or crop)")
    parser.add_argument("--part", type=parse_part, metavar="K/N", help="do only the K-th of N shares (default: all)")
    parser.add_argument("--pairs", type=positive, default=40_000, help="pairs to draw of shapes (default 40000)")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"],
                        help="of shapes, or in Karpathy's file; his train includes restval (default train)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes and crops (default 0)")
    parser.add_argument("--clean-captions", action="store_true",
                        help="the MAGVLT release's clean-up: lower case, no - or /, no leading marks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    group = parser.add_argument_group("looking first")
    group.add_argument("--inspect", action="store_true", help="count, measure and show the samples of a source")
    group.add_argument("--bpe", type=Path, help="merges: caption lengths in tokens instead of words")
    group.add_argument("--text-length", type=positive, default=64, help="text tokens that fit (default 64)")
    group.add_argument("--image-size", type=positive, default=256, help="pixels a side, without --vqgan (default 256)")
    group.add_argument("--sheet", type=Path, default="inspect.png", help="the image to write (default inspect.png)")
    args = parser.parse(argv)
    required = ["source"] if args.inspect else ["source", "vqgan", "out"]
    if missing := [name for name in required if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is required, or --inspect to look at a source; see --help")
    parser.run(inspect if args.inspect else prepare, args)


if __name__ == "__main__":
    main()
