"""Measures a trained MAGVLT: python eval.py scenes

  scenes    unseen scenes of the small world: exact accuracy of drawings and captions (default)
  edit      objects inpainted and noun phrases infilled, with and without the other modality
  sweep     accuracy against decoding steps, for orders, schedules, temperatures, noises, guidance
  bias      a biased world: true colours, or the usual ones? (figure 4)
  table     trains variants of the method, and prints the paper's tables: python eval.py table --updates 4000
  speed     masked against autoregressive decoding, random weights: python eval.py speed --preset base
  coco      the paper's protocols on COCO and NoCaps: python eval.py coco --protocol t2i --captions FILE --images FOLDER
"""
import os
from pathlib import Path

import torch

from nanomagvlt.config import DECODING, PRESETS, nearest, preset
from nanomagvlt.data import shapes
from nanomagvlt.evaluation import ablations, coco, small_world, speed
from nanomagvlt.io import write_json
from nanomagvlt.masking import ORDERS, SCHEDULES
from nanomagvlt.objectives import DTYPE
from nanomagvlt.sampling.pipeline import Pipeline, load_pipeline, pick_device
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint
from nanomagvlt.training.cli import Parser, add_config_flags, check_out, given_settings, positive

EXACT, PAIRS = ("t2i_exact", "i2t_exact"), ("pairs_agree", "pairs_crowded")
SWEEP = {  # kind: the fields that vary, their values, what is measured. Pairs of numbers: first step, last step
    "order": (("image_order", "text_order"), ORDERS, EXACT),
    "schedule": (("image_schedule", "text_schedule"), SCHEDULES, EXACT),
    "temperature": (("image_temperature",), ((0.3, 0.1), (1.0, 0.3), (1.4, 0.6)), EXACT[:1]),
    "noise": (("image_noise",), ((0.0, 0.0), (0.5, 0.1), (2.0, 0.2)), EXACT[:1]),
    "guidance": (("guidance",), (1.0, 1.5, 2.0, 3.0, 5.0), EXACT[:1]),
    "pairs": (("pair_text_order",), ORDERS, PAIRS),
}


def eval_scenes(args) -> dict:
    """T2I and I2T exact, single facts, length, and reconstruction (T2I's ceiling), each with its 95% interval."""
    pipeline, level = load(args)
    results = small_world.evaluate_scenes(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    return small_world.show(results)


def eval_edit(args) -> dict:
    """Inpainting and infilling, the same without the other modality, and T2I and I2T for comparison."""
    pipeline, level = load(args)
    print("inpainting and infilling all scenes takes minutes ...", flush=True)
    results = small_world.evaluate_editing(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    whole = small_world.evaluate_scenes(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    results |= {"t2i": whole["t2i_exact"], "i2t": whole["i2t_exact"]}
    if "it2it" in pipeline.cfg.task_shares:
        results |= small_world.evaluate_pairs(pipeline, level, args.num_pairs, args.seed)
    return small_world.show(results)


def eval_bias(args) -> dict:
    """The colours that a model trained in a biased world gives to objects of unusual colour (figure 4)."""
    pipeline, level = load(args)
    if not level.bias:
        raise ValueError(f"shapes:{level.name} is not biased: bias needs a model trained on shapes:tiny-biased, say")
    results = small_world.evaluate_bias(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    return small_world.show(results)


def eval_sweep(args) -> list[dict]:
    """Exact accuracy against decoding steps K, for the settings in SWEEP that the model can use."""
    pipeline, level = load(args)
    cfg, table = pipeline.cfg, []
    if cfg.model == "argvlt":
        raise ValueError("sweep needs a masked model: an ARGVLT has no decoding steps")
    needs = {"guidance": ("condition_dropout", cfg.condition_dropout), "pairs": ("it2it", "it2it" in cfg.task_shares)}
    if args.vary in needs and not needs[args.vary][1]:
        raise ValueError(f"--vary {args.vary} needs a model trained with {needs[args.vary][0]}")
    kinds = [args.vary] if args.vary else [kind for kind in SWEEP if kind not in needs or needs[kind][1]]
    steps = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= cfg.image_tokens]
    print(f"{'':30}" + "".join(f"K = {k:<11}" for k in steps) + f"\n{'':30}exact, half of a 95% interval")
    for kind, value in [(kind, value) for kind in kinds for value in SWEEP[kind][1]]:
        (fields, _, measures), rows = SWEEP[kind], []
        for k in steps:
            varied = pipeline.with_settings(image_steps=k, text_steps=k, **dict.fromkeys(fields, value))
            rows.append(small_world.evaluate_pairs(varied, level, args.num_pairs, args.seed) if measures is PAIRS else
                        small_world.evaluate_scenes(varied, level, args.num_scenes, args.phrasings, args.seed,
                                                    captions_too="i2t_exact" in measures))
            table.append({kind: value, "steps": k} | small_world.as_json({name: rows[-1][name] for name in measures}))
        label = f"{kind} " + (f"{value[0]:g}, {value[1]:g}" if isinstance(value, tuple) else str(value))
        for name in measures:
            cells = [f"{row[name].value:.3f} +-{(row[name].high - row[name].low) / 2:<6.2f}" for row in rows]
            print(f"{label:22}{name.removesuffix('_exact').removeprefix('pairs_'):8}{''.join(cells)}")
    return table


def eval_table(args) -> None:
    """Trains and measures what the pool lacks of the given variants and seeds, and prints all tables that have runs."""
    failed = ablations.fill(args.pool, args.variants, args.seeds, args.updates, args.workers) if args.updates else []
    print(ablations.tables(args.pool))
    if failed:
        raise ValueError(f"failed, and not in the tables: {', '.join(failed)}; the same command tries again")


def eval_speed(args) -> list[dict]:
    """MAGVLT against ARGVLT with random weights: seconds a batch, and operations."""
    device, cfg, table = pick_device(args.device), preset(args.preset), []
    print(f"{args.preset}, {args.dtype}, {device} ({torch.get_num_threads()} CPU threads)"
          f"{', compiled' * args.compile}; medians of {args.repeats}\n{speed.HEAD}")
    dtype, vqgan = DTYPE[args.dtype], VQGAN(cfg).to(device).eval()
    for found in speed.compare(cfg, vqgan, device, dtype, args.batches, args.repeats, args.compile):
        print(speed.row(found), flush=True)
        table.append(found)
    return table


def load(args) -> tuple[Pipeline, shapes.Level]:
    """The model with the given decoding settings, and its level. Raises ValueError if it was not trained on shapes."""
    path = args.checkpoint or checkpoint.newest()
    pipeline = load_pipeline(path, args.device)
    pipeline = pipeline.with_settings(**given_settings(args, DECODING))
    if not (level := shapes.level_of(pipeline.cfg.data)):
        raise ValueError(f"{path} was trained on {pipeline.cfg.data}: {args.what} needs a model of shapes")
    print(f"{path} on {pipeline.device}: {pipeline.cfg.data}")
    return pipeline, level


# Each prints what it measures; what it returns, if anything, is written to --out.
COMMANDS = {"scenes": eval_scenes, "edit": eval_edit, "sweep": eval_sweep, "bias": eval_bias, "table": eval_table,
            "speed": eval_speed, "coco": coco.run}


def measure(args) -> None:
    """Runs a command, and writes its results to --out."""
    results = COMMANDS[args.what](args)
    if results and args.out:
        write_json(args.out, results)
        print(f"-> {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("what", nargs="?", default="scenes", choices=COMMANDS, help="what to measure (default scenes)")
    parser.add_argument("--checkpoint", type=Path, help="a last.pt or best.pt (default: the newest runs/*/last.pt)")
    parser.add_argument("--num-scenes", type=positive, default=1000, help="unseen scenes, at most (default 1000)")
    parser.add_argument("--phrasings", type=positive, default=2, help="prompts for each scene (default 2)")
    parser.add_argument("--num-pairs", type=positive, default=128, help="pairs that edit and sweep make (default 128)")
    parser.add_argument("--vary", choices=SWEEP, help="what sweep varies (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of phrasings and decoding (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; for coco a folder")
    group = parser.add_argument_group("for table")
    group.add_argument("--pool", type=Path, default=Path("runs/pool"), help="its folder (default runs/pool)")
    group.add_argument("--updates", type=positive, help="of each run (default: only print the tables)")
    group.add_argument("--seeds", type=positive, default=3, help="runs of each variant (default 3)")
    group.add_argument("--variants", type=lambda text: text.split(","), default=list(ablations.VARIANTS), metavar="A,B",
                       help=f"(default all: {', '.join(ablations.VARIANTS)})")
    group.add_argument("--workers", type=positive, default=torch.cuda.device_count() or os.cpu_count(),
                       help="runs at a time, one thread each if several (default: one on each GPU, or CPU core)")
    group = parser.add_argument_group("for speed")
    group.add_argument("--preset", default="tiny", choices=PRESETS, help="the sizes (default tiny)")
    group.add_argument("--dtype", default="fp32", choices=tuple(DTYPE), help="of the weights (default fp32)")
    group.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32],
                       metavar="N,N", help="batch sizes (default 1,8,32)")
    group.add_argument("--repeats", type=positive, default=5, help="timed rounds, after a warm-up (default 5)")
    group.add_argument("--compile", action="store_true", help="torch.compile both, on CUDA with CUDA graphs")
    coco.add_flags(parser)
    add_config_flags(parser, DECODING)
    args = parser.parse(argv)
    for name in args.variants:
        if name not in ablations.VARIANTS:
            parser.error(f"--variants: no {name!r}{nearest(name, ablations.VARIANTS)}")
    if args.out and args.what != "coco":
        parser.run(check_out, args.out)
    parser.run(measure, args)


if __name__ == "__main__":
    main()
