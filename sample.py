"""Draws prompts and captions images with a trained MAGVLT.

  python sample.py --prompt "a red circle above a blue square"    draws it, several times
  python sample.py --image photo.png                              captions it, several times
"""
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nanomagvlt import checkpoint, published
from nanomagvlt.bpe import clean_written
from nanomagvlt.config import Parser
from nanomagvlt.data import BadSample, keyed_generator, open_image, square
from nanomagvlt.generate import contact_sheet, load_generator


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("--prompt", help="what to draw")
    parser.add_argument("--image", type=Path, help="an image file to caption")
    parser.add_argument("--checkpoint", type=Path, help="a last.pt or best.pt (default: the newest runs/*/last.pt)")
    parser.add_argument("--num-samples", type=int, default=8, help="how many pictures or captions (default 8)")
    parser.add_argument("--steps", type=int, help="decoding steps K (default: the checkpoint's)")
    parser.add_argument("--temperature", type=float,
                        help="sampling temperature at every step (default: the checkpoint's)")
    parser.add_argument("--top-k", type=int,
                        help="sample among this many likeliest tokens; 0: all (default: the checkpoint's)")
    parser.add_argument("--clean", action="store_true",
                        help="captions end at the first full stop and repeat no word, as in the authors' release")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same device, same result (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the PNG to write (default samples.png)")
    group = parser.add_argument_group("for the authors' published checkpoints")
    group.add_argument("--bpe", type=Path, default=published.CLIP_BPE,
                       help="CLIP's merges (default: where data/download.py puts them)")
    group.add_argument("--heads", type=int, default=0, help="attention heads (default: width / 128)")
    group.add_argument("--sha256", default="", help="refuse a file that has another digest")
    args = parser.parse(argv)
    if (args.prompt is None) == (args.image is None):
        parser.error('give either --prompt "..." to draw or --image FILE to caption')
    if args.num_samples < 1:
        parser.error(f"--num-samples {args.num_samples}: must be at least 1")
    try:
        sample(args)
    except BadSample as reason:
        parser.error(f"{args.image}: {reason}; give a JPEG, PNG, WebP, GIF or BMP file")
    except ValueError as error:  # a checkpoint or a setting that cannot be used
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror or error}")


def sample(args) -> None:
    """Does what main() has understood. Raises ValueError, OSError or BadSample before anything is written."""
    path = args.checkpoint or checkpoint.newest()
    generator = load_generator(path, args.device, args.bpe, args.heads, args.sha256)
    given = {"steps": args.steps, "temperature": args.temperature, "top_k": args.top_k}
    if args.prompt is not None and args.temperature is not None:
        given["temperature"] = (args.temperature, args.temperature)
    modality = "text" if args.prompt is None else "image"
    generator = generator.with_settings(**{f"{modality}_{k}": v for k, v in given.items() if v is not None})
    chance = keyed_generator("sample", args.seed)
    print(f"{path} on {generator.device}")

    if args.prompt is not None:
        started, most = time.monotonic(), generator.cfg.text_length
        if len(generator.bpe.encode(args.prompt)) > most:
            print(f"the prompt is longer than {most} tokens: only the first {most} are read")
        pictures = generator.draw([args.prompt] * args.num_samples, chance)
        seconds = (time.monotonic() - started) / args.num_samples
        sheet = contact_sheet(pictures, [""] * len(pictures)) if len(pictures) > 1 else Image.fromarray(pictures[0])
        sheet.save(args.out, format="PNG")
        print(f"{args.num_samples} x {args.prompt!r} -> {args.out} ({seconds:.2f} s a picture)")
    else:
        image = square(open_image(args.image.read_bytes()), generator.cfg.image_size)
        captions, _ = generator.caption(np.stack([image] * args.num_samples), chance)
        for caption in map(clean_written, captions) if args.clean else captions:
            # A model may write any bytes: none of them is to steer the terminal.
            print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in caption))


if __name__ == "__main__":
    main()
