"""Measures a trained MAGVLT: python eval.py scenes

  scenes    on unseen scenes of the small world: are drawings and captions exactly right? (default)
  edit      whole objects hidden and inpainted, whole noun phrases hidden and infilled
  sweep     how right they are, against decoding steps, orders, schedules, temperatures, guidance
  bias      in a biased world: is it said what is there, or what is usual?
  speed     masked against autoregressive decoding, random weights: python eval.py speed --preset base
  table     trains a pool of variants, and prints the paper's tables from it: python eval.py table --minutes 12
  coco      the paper's protocols on COCO and NoCaps: python eval.py coco --protocol t2i --captions FILE --images FOLDER
  bpe       how fast captions are encoded, beside CLIP's own algorithm: python eval.py bpe --captions FILE
"""
import dataclasses
import html
import os
import random
import re
import time
from functools import lru_cache
from pathlib import Path
from statistics import median

import ftfy
import torch

from nanomagvlt.data import shapes
from nanomagvlt.evaluation import ablations, coco, small_world
from nanomagvlt.training import checkpoint, distributed, pretrained
from nanomagvlt.evaluation import speed as timing
from nanomagvlt.tokenizers.bpe import BPE, BYTE_TO_SYMBOL, CLIP_WORDS, to_symbols
from nanomagvlt.sampling.clip import load_judge
from nanomagvlt.config import PRESETS, nearest, preset
from nanomagvlt.training.cli import Parser
from nanomagvlt.io import write_json
from nanomagvlt.sampling.pipeline import Pipeline, load_pipeline, pick_device
from nanomagvlt.evaluation.inception import load_inception
from nanomagvlt.masking import ORDERS, SCHEDULES
from nanomagvlt.sequence import TASKS
from nanomagvlt.tokenizers.vqgan import VQGAN


def scenes(args) -> None:
    """T2I and I2T exact, single facts, length, and reconstruction (T2I's ceiling), each with its 95% interval."""
    pipeline, level = world_of(args)
    results = small_world.evaluate_scenes(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    print(small_world.scene_table(results))
    save(args, small_world.as_json(results))


def edit(args) -> None:
    """Inpainting and infilling, beside the same without the other modality, and beside T2I and I2T."""
    pipeline, level = world_of(args)
    print("all scenes are hidden in part, filled in and judged: this takes minutes ...", flush=True)
    results = small_world.evaluate_editing(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    whole = small_world.evaluate_scenes(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    results |= {"t2i": whole["t2i_exact"], "i2t": whole["i2t_exact"]}
    if pipeline.cfg.task_weights[2]:
        results |= small_world.evaluate_pairs(pipeline, level, args.num_pairs, args.seed)
    print(f"{results['scenes']} unseen scenes, {results['phrasings']} phrasings each, {args.num_pairs} pairs made from "
          "nothing; exact, 95% intervals over scenes")
    for name, what in (("object_inpainted", "an object inpainted"), ("centre_inpainted", "the centre inpainted"),
                       ("t2i", "all drawn (T2I)"), ("object_infilled", "a noun phrase infilled"),
                       ("centre_infilled", "the middle words infilled"), ("i2t", "all written (I2T)"),
                       ("i2t_true_length", "  in the true one's length"),
                       ("pairs_agree", "made together, in agreement"), ("pairs_crowded", "  of several objects")):
        if name not in results:  # of a model that was not trained in it2it
            continue
        print(f"{what:28}{results[name]}")  # "without": the other half is then made together with it (it2it)
        if f"{name}_without" in results:
            print(f"{'  the other half withheld':28}{results[f'{name}_without']}")
    save(args, small_world.as_json(results))


def sweep(args) -> None:
    """Exact accuracy against decoding steps, for every order and schedule and some temperatures and noises of drawing;
    if the model knows the empty prompt, for some guidance; if it was trained in it2it, pairs by the text's order."""
    pipeline, level = world_of(args)
    cfg, both, drawn = pipeline.cfg, ("t2i_exact", "i2t_exact"), ("t2i_exact",)
    if cfg.model == "argvlt":
        raise ValueError("sweep wants a masked model: an ARGVLT makes one token after the other")
    paired = ("pairs_agree", "pairs_crowded")
    variants = [("order", name, {"image_order": name, "text_order": name}, both) for name in ORDERS]
    variants += [("schedule", name, {"image_schedule": name, "text_schedule": name}, both) for name in SCHEDULES]
    variants += [("temperature", f"{a:g}, {b:g}", {"image_temperature": (a, b)}, drawn)  # first step to last
                 for a, b in ((0.3, 0.1), (1.0, 0.3), (1.4, 0.6))]
    variants += [("noise", f"{a:g}, {b:g}", {"image_noise": (a, b)}, drawn)
                 for a, b in ((0.0, 0.0), (0.5, 0.1), (2.0, 0.2))]
    variants += [("guidance", w, {"guidance": w}, drawn) for w in (1.0, 1.5, 2.0, 3.0, 5.0) if cfg.condition_dropout]
    variants += [("pairs", name, {"pair_text_order": name}, paired) for name in ORDERS if cfg.task_weights[2]]
    variants = [variant for variant in variants if args.vary in (None, variant[0])]
    if not variants:
        wanted = {"guidance": "condition_dropout, that knows the empty caption", "pairs": "it2it"}[args.vary]
        raise ValueError(f"--vary {args.vary} wants a model trained with {wanted}")
    steps, table = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= cfg.image_tokens], []
    print(f"{'':22}{'':8}" + "".join(f"K = {k:<11}" for k in steps) + "\n" + 30 * " " + "exact, half of a 95% interval")
    for kind, name, settings, measures in variants:
        rows = []
        for k in steps:
            chosen = pipeline.with_settings(image_steps=k, text_steps=k, **settings)
            rows.append(small_world.evaluate_pairs(chosen, level, args.num_pairs, args.seed) if measures is paired else
                        small_world.evaluate_scenes(chosen, level, args.num_scenes, args.phrasings, args.seed,
                                                captions_too=measures is both))
            table.append({kind: name, "steps": k} | small_world.as_json({what: rows[-1][what] for what in measures}))
        for what in measures:
            shares = [row[what] for row in rows]
            print(f"{kind} {name:<{21 - len(kind)}}{what.removesuffix('_exact').removeprefix('pairs_'):8}"
                  + "".join(f"{s.value:.3f} +-{(s.high - s.low) / 2:<6.2f}" for s in shares))
    save(args, table)


def bias(args) -> None:
    """What a model trained in a world with habits says and draws of things that are not as usual (figure 4)."""
    pipeline, level = world_of(args)
    if not level.bias:
        raise ValueError(f"shapes:{level.name} has no habits: bias wants a model trained on shapes:tiny-biased, say")
    results = small_world.evaluate_bias(pipeline, level, args.num_scenes, args.phrasings, args.seed)
    print(f"{results['scenes']} unseen scenes in which nothing has its usual colour, {results['phrasings']} phrasings "
          "each; share of the objects, 95% intervals over scenes")
    for name, what in (("i2t_seen", "the caption says what is there"), ("i2t_usual", "the caption says what is usual"),
                       ("t2i_asked", "drawn as asked"), ("t2i_usual", "drawn as usual")):
        print(f"{what:32}{results[name]}")
    save(args, small_world.as_json(results))


def table(args) -> None:
    """Fills the pool with what it lacks of the arms and seeds asked for, and prints all tables there are runs for."""
    failed = []
    if args.minutes:
        failed = ablations.fill(args.pool, args.arms, args.seeds, args.minutes, args.workers)
    print(ablations.tables(args.pool))
    if failed:
        raise ValueError(f"failed, and not in the tables: {', '.join(failed)}; the same command tries again")


def speed(args) -> None:
    """MAGVLT against ARGVLT, random weights: latency, throughput, and what the machine could do."""
    device, dtype, cfg, found = pick_device(args.device), timing.DTYPES[args.dtype], preset(args.preset), []
    machine = {"bandwidth": timing.memory_bandwidth(device), "matmul_flops": timing.matmul_flops(device, dtype)}
    print(f"{args.preset}, {args.dtype}, {device} ({torch.get_num_threads()} CPU threads)"
          f"{', compiled' * args.compile}; medians of {args.repeats}\nmeasured here: memory "
          f"{machine['bandwidth'] / 1e9:.1f} GB/s, matrices {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s")
    print(timing.HEAD)

    def report(comparison: timing.Comparison) -> None:
        print(comparison, flush=True)
        found.append(dataclasses.asdict(comparison))
    vqgan = VQGAN(cfg).to(device).eval()
    timing.compare(cfg, vqgan, device, dtype, args.batches, args.repeats, args.compile, report)
    save(args, machine | {"comparisons": found})


def photographs(args) -> None:
    """One of the paper's protocols, or a share of its work; killed, the same command goes on."""
    if missing := [name for name in ("protocol", "captions", "images", "out") if getattr(args, name) is None]:
        raise ValueError(f"coco wants --{missing[0]}; see --help")
    part, device = distributed.share_of_work(args.part, args.device)
    pipeline = load_pipeline(args.checkpoint or checkpoint.newest(), device, args.bpe)
    if args.steps and pipeline.cfg.model == "argvlt":
        raise ValueError("--steps: an ARGVLT makes one token after the other")
    draws = coco.PROTOCOLS[args.protocol].draws
    settings = {"image_steps" if draws else "text_steps": args.steps, "argvlt_temperature": args.temperature,
                "image_temperature" if draws else "text_temperature":
                    (args.temperature,) * 2 if draws and args.temperature is not None else args.temperature}
    pipeline = pipeline.with_settings(**{name: value for name, value in settings.items() if value is not None})
    judge = load_judge(args.clip, args.bpe, pipeline.device) if args.clip else None
    inception = load_inception(args.inception).to(pipeline.device) if args.inception else None
    run = coco.begin(args.protocol, args.captions, args.images, args.out, pipeline, judge, inception,
                          args.num, args.candidates, args.seed, args.split)
    run.work(part)
    if part:
        print(f"part {part[0] + 1}/{part[1]} is done; when all are, the same command without --part or torchrun "
              "scores them")
    else:
        coco.report(run, run.score())


def world_of(args) -> tuple[Pipeline, shapes.Level]:
    """The checkpoint and the world it was trained in. Raises ValueError where right and wrong cannot be told."""
    path = args.checkpoint or checkpoint.newest()
    pipeline = load_pipeline(path, args.device)
    source = pipeline.cfg.data
    if not (level := shapes.level_of(source)):
        raise ValueError(f"{path} was trained on {source}, where right and wrong cannot be told exactly: "
                         f"{args.what} wants shapes")
    print(f"{path} on {pipeline.device}: {source}")
    return pipeline, level


def save(args, results) -> None:
    """Writes what was measured, if --out says where."""
    if args.out:
        write_json(args.out, results)
        print(f"-> {args.out}")


def bpe(args) -> None:
    """Seconds to encode a file of captions, a line each, by our BPE and by CLIP's algorithm.

    Medians of 5 rounds (1 for a long word). Both remember the words seen; each round starts with no memory.
    """
    if args.captions is None:
        raise ValueError("bpe wants --captions FILE, a caption a line")
    captions = [line for line in args.captions.read_text(encoding="utf-8").split("\n") if line]
    tokenizer = BPE.load(args.bpe)
    special = dict(tokenizer.cache)

    @lru_cache(maxsize=None)
    def clip_word(word: str) -> tuple[int, ...]:
        """CLIP's way: look for the best pair anywhere in the word, merge all of its places, and look again."""
        if word in special:
            return tuple(special[word])
        symbols = to_symbols(word)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: tokenizer.ranks.get(pair, float("inf")))
            if best not in tokenizer.ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                is_best = tuple(symbols[i:i + 2]) == best
                merged.append("".join(symbols[i:i + 2]) if is_best else symbols[i])
                i += 2 if is_best else 1
            symbols = merged
        return tuple(tokenizer.ids[symbol] for symbol in symbols)

    def seconds(encode, texts: list[str], rounds: int) -> tuple[float, list]:
        times = []
        for _ in range(rounds):
            tokenizer.cache = dict(special)
            clip_word.cache_clear()
            started = time.perf_counter()
            ids = [encode(text) for text in texts]
            times.append(time.perf_counter() - started)
        return median(times), ids

    def clip(text: str) -> list[int]:
        text = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()
        words = ("".join(BYTE_TO_SYMBOL[b] for b in word.encode()) for word in CLIP_WORDS.findall(text))
        return [i for word in words for i in clip_word(word)]

    long_word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
    for name, texts in ((f"{len(captions):,} captions", captions), ("a word of 10,000 letters", [long_word])):
        rounds = 5 if texts is captions else 1
        (theirs, expected), (ours, found) = (seconds(encode, texts, rounds) for encode in (clip, tokenizer.encode))
        if found != expected:
            raise ValueError(f"{args.bpe}: our ids differ from CLIP's on {name}")
        print(f"{name}: CLIP's algorithm {theirs:.3f} s, ours {ours:.3f} s, {theirs / ours:.2f} times as fast; "
              "same ids")


WHAT = {"scenes": scenes, "edit": edit, "sweep": sweep, "bias": bias, "speed": speed, "table": table, "coco": photographs,
        "bpe": bpe}


def add_coco_flags(parser: Parser) -> None:
    group = parser.add_argument_group("for coco (--out is then a folder; a run that was killed goes on in it)")
    group.add_argument("--protocol", choices=coco.PROTOCOLS, help=", ".join(coco.PROTOCOLS))
    group.add_argument("--images", type=Path, help="the folder in which --captions, a JSON file, has its images")
    group.add_argument("--split", help="of Karpathy's dataset_coco.json (default test)")
    group.add_argument("--num", type=int, help="how many captions or images (default: the paper's)")
    group.add_argument("--candidates", type=int, help="of which --clip chooses (default: the paper's, or 1)")
    group.add_argument("--clip", type=Path, help="OpenAI's ViT-B-32.pt")
    group.add_argument("--inception", type=Path, help="FID's network: python data/download.py inception")
    group.add_argument("--steps", type=int, help="decoding steps K (default: the checkpoint's)")
    group.add_argument("--temperature", type=float,
                       help="at every step (default: the checkpoint's; the authors' evaluation has 0.5 for captions)")
    group.add_argument("--part", type=distributed.of_many, metavar="K/N",
                       help="do only the K-th of N shares; at last the same command without it merges and scores")
    group = parser.add_argument_group("for bpe and coco")
    group.add_argument("--captions", type=Path, help="a text file, a caption a line; for coco COCO's, Karpathy's or "
                       "NoCaps' JSON file")
    group.add_argument("--bpe", type=Path, default=pretrained.CLIP_BPE,
                       help="merges (default: CLIP's, where data/download.py puts them)")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("what", nargs="?", default="scenes", choices=WHAT,
                        help="what to measure (default scenes)")
    parser.add_argument("--checkpoint", type=Path, help="a last.pt or best.pt (default: the newest runs/*/last.pt)")
    parser.add_argument("--num-scenes", type=int, default=1000, help="at most this many unseen scenes (default 1000)")
    parser.add_argument("--num-pairs", type=int, default=128, help="made from nothing, by edit and sweep (default 128)")
    parser.add_argument("--phrasings", type=int, default=2, help="ways each is asked for (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of phrasings and decoding (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; for coco a folder")
    parser.add_argument("--vary", choices=("order", "schedule", "temperature", "noise", "guidance", "pairs"),
                        help="what sweep varies (default all)")
    group = parser.add_argument_group("for table")
    group.add_argument("--pool", type=Path, default=Path("runs/pool"), help="its folder (default runs/pool)")
    group.add_argument("--minutes", type=float, default=0, help="of training for each run; 0: only print the tables")
    group.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    group.add_argument("--arms", type=lambda text: text.split(","), default=list(ablations.ARMS),
                       help=f"which, with commas between (default all: {', '.join(ablations.ARMS)})")
    group.add_argument("--workers", type=int, default=torch.cuda.device_count() or os.cpu_count(),
                       help="runs at a time, with one thread each if there are several (default: one on each "
                       "GPU, or on each of the CPU's cores)")
    group = parser.add_argument_group("for speed")
    group.add_argument("--preset", default="tiny", choices=PRESETS, help="whose sizes (default tiny)")
    group.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the weights (default fp32)")
    group.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32],
                       help="batch sizes, with commas between (default 1,8,32)")
    group.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not (default 5)")
    group.add_argument("--compile", action="store_true", help="torch.compile both, on CUDA with CUDA graphs")
    add_coco_flags(parser)
    args = parser.parse(argv)
    for flag in ("num_scenes", "num_pairs", "phrasings", "seeds", "workers", "repeats", "num", "candidates", "steps"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if args.out and args.what != "coco" and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    for arm in args.arms:
        if arm not in ablations.ARMS:
            parser.error(f"--arms: no {arm!r}{nearest(arm, ablations.ARMS)}")
    if args.minutes < 0:
        parser.error(f"--minutes {args.minutes:g}: must be at least 0")
    try:
        WHAT[args.what](args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"stopped{'; the same command goes on from there' * (args.what in ('table', 'coco'))}\n")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror or error}")


if __name__ == "__main__":
    main()
