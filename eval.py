"""Measures a trained MAGVLT: python eval.py scenes

  scenes    on unseen scenes of the small world: are drawings and captions exactly right? (default)
"""
import json
import time
from pathlib import Path

from nanomagvlt import checkpoint, metrics, shapes
from nanomagvlt.config import Parser
from nanomagvlt.generate import load_generator


def scenes(args) -> None:
    """T2I and I2T exact, single facts, length, and reconstruction (T2I's ceiling), each with its 95% interval."""
    path = args.checkpoint or checkpoint.newest()
    generator = load_generator(path, args.device)
    source = generator.cfg.data
    if not source.startswith("shapes:"):
        raise ValueError(f"{path} was trained on {source}, where right and wrong cannot be told exactly: "
                         "scenes wants shapes")
    print(f"{path} on {generator.device}: {source}")
    started = time.monotonic()
    results = metrics.evaluate_scenes(generator, shapes.get_level(source.removeprefix("shapes:")),
                                      args.num_scenes, args.phrasings, args.seed)
    print(metrics.scene_table(results))
    print(f"{time.monotonic() - started:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(metrics.as_json(results), indent=1) + "\n")
        print(f"-> {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("what", nargs="?", default="scenes", choices=["scenes"],
                        help="what to measure (default scenes)")
    parser.add_argument("--checkpoint", type=Path, help="a last.pt or best.pt (default: the newest runs/*/last.pt)")
    parser.add_argument("--num-scenes", type=int, default=1000, help="at most this many unseen scenes (default 1000)")
    parser.add_argument("--phrasings", type=int, default=3, help="ways each is asked for (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of phrasings and decoding (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse(argv)
    for flag in ("num_scenes", "phrasings"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    try:
        scenes(args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror or error}")


if __name__ == "__main__":
    main()
