"""Makes a token cache, what training reads, from any source of pairs:

  python data/prepare.py --source 'shards/*.tar' --vqgan runs/tiny/vqgan.pt --out caches/mine/train

A source is shapes:LEVEL, a folder of images with a .txt of the same name beside each, or tar shards as img2dataset
writes them. Training then takes it with: python train.py --cache caches/mine --vqgan runs/tiny/vqgan.pt
Bad samples are left out, and counted by reason; a source with more than 5% of them is refused.
"""
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere, without installing

from nanomagvlt import checkpoint
from nanomagvlt.config import Parser
from nanomagvlt.data import left_out, read_pairs, write_cache
from nanomagvlt.generate import pick_device


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="data/prepare.py", description=__doc__)
    parser.add_argument("--source", required=True,
                        help="shapes:LEVEL, a folder, or tar shards (a path or 'pattern*.tar')")
    parser.add_argument("--vqgan", required=True, type=Path, help="the vqgan.pt that makes the image tokens")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write: caches/NAME/train or .../val")
    parser.add_argument("--pairs", type=int, default=40_000, help="pairs to draw of shapes (default 40000)")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help="of shapes (default train)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes (default 0)")
    parser.add_argument("--clean-captions", action="store_true",
                        help="the MAGVLT release's clean-up: lower case, no - or /, no leading marks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    args = parser.parse(argv)
    counts = Counter()
    try:
        vqgan = checkpoint.load_vqgan(args.vqgan).to(pick_device(args.device))
        pairs = read_pairs(args.source, vqgan.cfg.image_size, counts, args.pairs, args.split, args.seed)
        cache = write_cache(args.out, tqdm(pairs, unit="pair"), vqgan,
                            {"vqgan": checkpoint.digest(vqgan), "source": args.source}, args.clean_captions)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror or error}")
    print(f"{len(cache):,} pairs -> {args.out}{left_out(counts)}")


if __name__ == "__main__":
    main()
