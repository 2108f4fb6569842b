"""Trains a MAGVLT.

  python train.py --preset tiny                                    the small world, in minutes on a laptop CPU
  python train.py --preset tiny --name wide --width 192            another run beside it
  python train.py --data 'shards/*.tar' --val-data 'val/*.tar'     your own pairs, as img2dataset writes them

Four stages. A stage whose result is there is reused, and the output says so:
  vqgan    the image tokenizer                       -> runs/NAME/vqgan.pt
  cache    the pairs as tokens                       -> runs/NAME/cache/
  bpe      the captions' byte-pair merges            -> runs/NAME/bpe.txt
  model    the transformer                           -> runs/NAME/last.pt, best.pt, log.jsonl, samples/
Ctrl-C (or SIGTERM) saves and stops. The same command goes on from there: on a CPU the result is the same, bit for bit,
as without the stop.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomagvlt.config import MAY_CHANGE, VQGAN_FIELDS, Config, as_json
from nanomagvlt.data import shapes
from nanomagvlt.data.cache import TokenCache, make_batch, shorten, write_cache
from nanomagvlt.data.sources import Counts, Example, Piece, check_bad_share, left_out, pieces_of, read_examples, usable
from nanomagvlt.evaluation import small_world
from nanomagvlt.io import lock, one_line_error, write_image, write_json
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.rng import batch_uniform, keyed_generator, keyed_seed
from nanomagvlt.sampling.pipeline import Pipeline, contact_sheet, lacks_bf16, pick_device
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN
from nanomagvlt.training import checkpoint, cost, distributed
from nanomagvlt.training.cli import Parser, add_config_flags, config_from_args, explain, positive
from nanomagvlt.training.distributed import print_rank0
from nanomagvlt.training.loop import BAR, Clock, FiniteCheck, Interrupt, Log, Stopped, optimizer_for, scaler_for
from nanomagvlt.training.train_vqgan import train_vqgan
from nanomagvlt.training.update import Parts, compiled_score, method_of, update_ema, update_model

STAGES = ("vqgan", "cache", "bpe", "model")


# ---------------------------------------------------------------------------------------------- the transformer

def train_model(cfg: Config, run: Path, caches: dict[str, TokenCache], pipeline: Pipeline) -> None:
    """Trains the transformer by eq. 6 (chapter 4). pipeline holds the untrained model and the two tokenizers.

    Validation and samples use a moving average of the weights, `averaged`, which is in the pipeline at the end.
    """
    model, bpe, device, is_first = pipeline.model, pipeline.bpe, pipeline.device, distributed.rank() == 0
    pipeline.model = averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, scaler = optimizer_for(model, cfg, cfg.lr), scaler_for(cfg, device)
    step, best, clock, is_finite = resume(run, model, averaged, optimizer, scaler, bpe)
    print_rank0(f"model: {num_parameters(model):,} parameters on {len(caches['train']):,} pairs, "
                f"{cfg.steps:,} updates of {cfg.batch_size}" + (f", going on at step {step:,}" if step else ""))

    def save(name: str) -> None:
        checkpoint.save(run / name, "magvlt", cfg, step=step, best=best, model=averaged.state_dict(),
                        vqgan=pipeline.vqgan.state_dict(), bpe=bpe.to_text(), trained=model.state_dict(),
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        skipped=[is_finite.skipped, is_finite.in_a_row], **clock.read())

    parts, score, recent = Parts(cfg, caches["train"], bpe, device), compiled_score(cfg), {}
    log = Log(run / "log.jsonl" if is_first else Path(os.devnull), step)
    with Interrupt(is_first) as stop, tqdm(total=cfg.steps, initial=step, desc="model", unit="step",
                                           disable=not is_first, **BAR) as bar:
        while step < cfg.steps:
            with clock:  # counts updates only
                task, terms, norm = update_model(model, optimizer, scaler, cfg, parts, score, step)
                step += 1
                if is_finite(norm, step, scaler):
                    update_ema(averaged, model, min(cfg.ema, step / (step + 10)))  # about the last tenth of the updates
            bar.update()
            if step % cfg.log_every == 0:
                values = {name: term.item() for name, term in terms.items()}
                log.write(step=step, **clock.read(), task=task, lr=optimizer.param_groups[0]["lr"], norm=norm,
                          skipped=is_finite.skipped, **values)
                recent[task] = f"{task} " + " ".join(f"{value:.3f}" for value in values.values())
                bar.set_postfix_str(", ".join(sorted(recent.values())), refresh=False)
            is_last = step == cfg.steps
            if (step % cfg.eval_every == 0 or is_last) and "val" in caches and is_first:
                val = validate(averaged, cfg, caches["val"], bpe)
                log.write(step=step, **clock.read(), **{f"val_{name}": value for name, value in val.items()})
                shown = ", ".join(f"{name} {value:.3f}" for name, value in val.items())
                tqdm.write(f"step {step:,}: validation {shown}")
                if val[method_of(cfg).MAIN_TERM] < best:
                    best = val[method_of(cfg).MAIN_TERM]
                    save("best.pt")
            if (step % cfg.sample_every == 0 or is_last) and is_first:
                save_samples(pipeline, caches.get("val", caches["train"]), run / "samples" / f"{step:06d}.png")
            stops = distributed.all_reduce_any(stop.came, device)
            if (step % cfg.save_every == 0 or is_last or stops) and is_first:
                save("last.pt")
            if stops and not is_last:
                distributed.barrier()  # torchrun kills the first process, in its save, if another one ends earlier
                raise Stopped(f"{run / 'last.pt'} at step {step:,}")


def resume(run: Path, model: MAGVLT, averaged: MAGVLT, optimizer: torch.optim.Optimizer,
           scaler: torch.amp.GradScaler, bpe: BPE) -> tuple[int, float, Clock, FiniteCheck]:
    """Restores everything from last.pt, if there is one: its step, the best validation loss, the clock, the check."""
    path = run / "last.pt"
    if not path.exists():
        return 0, math.inf, Clock(), FiniteCheck(run)
    with one_line_error(path, "training cannot go on from it: take another --name"):
        state = checkpoint.load(path, "magvlt")
        if state["bpe"] != bpe.to_text():
            raise ValueError("it has other merges")
        model.load_state_dict(state["trained"])
        averaged.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        clock, check = Clock(state["seconds"], state["cpu_seconds"]), FiniteCheck(run, *state["skipped"])
        return state["step"], state["best"], clock, check


@torch.no_grad()
def validate(model: MAGVLT, cfg: Config, cache: TokenCache, bpe: BPE) -> dict[str, float]:
    """Mean loss terms of each task on up to 512 unseen pairs, always with the same masks. The main term ("mask", or
    "generated" of ARGVLT) is also averaged over the tasks, by their weights."""
    method, size = method_of(cfg), min(64, len(cache))
    sums, batches = defaultdict(float), min(8, len(cache) // size)
    for i in range(batches):
        batch = make_batch(cache, bpe, cache.rows_of_step(i, size, cfg.seed), cfg)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        rng = partial(batch_uniform, model.device, size, slice(size), cfg.seed, f"val {i}")
        for task, share in cfg.task_shares.items():
            for name, term in method.losses(model, task, batch, rng)[1].items():
                sums[task if name == method.MAIN_TERM else f"{task}_{name}"] += term.item() / batches
                if name == method.MAIN_TERM:
                    sums[name] += term.item() / batches * share
    return dict(sums)


def save_samples(pipeline: Pipeline, cache: TokenCache, path: Path) -> None:
    """A PNG: captions of unseen pairs with the pictures drawn for them, then their images with the captions written."""
    rows = np.arange(min(8, len(cache)))
    captions, generator = cache.captions(rows), keyed_generator("samples")
    drawn = pipeline.draw(captions, generator)
    image_tokens = cache.tokens_of(rows)[0]
    written = pipeline.read_texts(*pipeline.write_tokens(image_tokens, generator)[:2])
    images = np.concatenate([drawn, pipeline.tokens_to_image(image_tokens)])
    path.parent.mkdir(exist_ok=True)
    labels = [f"asked: {caption}" for caption in captions] + [f"wrote: {caption}" for caption in written]
    write_image(path, [contact_sheet(images, labels, columns=8)])


# ---------------------------------------------------------------------------------------------- tokenizers and cache

def source_of(cfg: Config, split: str) -> str:
    """The source of the pairs to train or to validate on; "" if there is none. Shapes hold some of theirs back."""
    return cfg.data if split == "train" or shapes.level_of(cfg.data) and not cfg.val_data else cfg.val_data


def pieces_for(cfg: Config, split: str) -> list[Piece]:
    """The pieces of the source of a split."""
    return pieces_of(source_of(cfg, split), cfg.image_size, cfg.pairs if split == "train" else 1000, split, cfg.seed)


def examples_of(cfg: Config, split: str, counts: Counts) -> Iterator[Example]:
    """The examples to train or to validate on."""
    return read_examples(source_of(cfg, split), pieces_for(cfg, split), cfg.image_size, counts, cfg.fit)


def cache_folders(cfg: Config, run: Path) -> dict[str, Path]:
    """The folder of each split's token cache, given or to be made."""
    folders = {split: Path(cfg.cache or run / "cache", split) for split in ("train", "val")}
    return {split: folder for split, folder in folders.items()
            if split == "train" or (folder.exists() if cfg.cache else source_of(cfg, split))}


def has_vqgan(cfg: Config, run: Path) -> bool:
    """Whether there is a trained VQ-GAN, given or in the run's folder."""
    path = run / "vqgan.pt"
    return bool(cfg.vqgan) or path.exists() and checkpoint.load(path, "vqgan").get("step") == cfg.vq_steps


def get_vqgan(cfg: Config, run: Path, device: torch.device) -> VQGAN:
    """The image tokenizer: given, found in the run's folder, or trained."""
    path = Path(cfg.vqgan or run / "vqgan.pt")
    if has_vqgan(cfg, run):
        vqgan = checkpoint.load_vqgan(path)
        if differing := [name for name in VQGAN_FIELDS if getattr(vqgan.cfg, name) != getattr(cfg, name)]:
            raise ValueError(f"{path}: its {differing[0]} differs: give it with --vqgan, or take another --name")
        print(f"vqgan: reusing {path}")
        return vqgan.to(device)
    return train_vqgan(cfg, examples_of(cfg, "train", {}), path, device)


def get_caches(cfg: Config, run: Path, vqgan: VQGAN, hashes: dict[str, str]) -> dict[str, TokenCache]:
    """The token caches of the training pairs and, if there are any, of the validation pairs."""
    caches = {}
    settings = {"vqgan": checkpoint.weight_hash(vqgan), "clean_captions": cfg.clean_captions, "fit": cfg.fit}
    for split, folder in cache_folders(cfg, run).items():
        if cfg.cache or (folder / "meta.json").exists():
            caches[split] = TokenCache(folder)
            print(f"cache: reusing {folder}, {len(caches[split]):,} pairs")
        else:
            counts: Counts = {}
            examples = tqdm(examples_of(cfg, split, counts), desc=f"cache {split}", unit="image", **BAR)
            meta = settings | {"source": source_of(cfg, split), "made_of": hashes[f"{split} pairs"]}
            caches[split] = write_cache(folder, examples, vqgan, meta)
            print(f"cache: {len(caches[split]):,} pairs -> {folder}{left_out(counts)}")
        for name, expected in settings.items():
            if caches[split].meta[name] != expected:
                found, flag = caches[split].meta[name], name.replace("_", "-")
                raise ValueError(f"{folder}: made with {name} {found}, not {expected}: give the right --{flag}")
    return caches


def get_bpe(cfg: Config, run: Path, cache: TokenCache) -> BPE:
    """The text tokenizer: given, found in the run's folder, or trained on the captions (chapter 9)."""
    path = Path(cfg.bpe) if cfg.bpe else run / "bpe.txt"
    if cfg.bpe or path.exists():
        print(f"bpe: reusing {path}")
        bpe = BPE.load(path)
    else:
        bpe = BPE.train((caption for i in range(len(cache)) for caption in cache.captions([i])), cfg.bpe_merges)
        bpe.save(path)
        print(f"bpe: {len(bpe.merges)} merges trained on {len(cache):,} captions -> {path}")
    some = cache.captions(np.linspace(0, len(cache) - 1, min(2000, len(cache))).astype(int))
    lengths = [len(bpe.encode(shorten(caption, cfg.text_length))) for caption in some]
    if cut := sum(length >= cfg.text_length for length in lengths) / len(some):
        print(f"captions: {cut:.1%} do not fit {cfg.text_length} tokens and are cut: see --text-length, --bpe-merges")
    return bpe


def run_stages(cfg: Config, run: Path, device: torch.device, last: str, hashes: dict[str, str]) -> None:
    """All stages in order, up to the last one asked for. hashes: of check_inputs()."""
    started = time.monotonic()
    if distributed.rank() > 0:  # the first process makes the tokenizers and the cache, and the others then find them
        distributed.barrier()
    with contextlib.redirect_stdout(None) if distributed.rank() > 0 else contextlib.nullcontext():
        vqgan = get_vqgan(cfg, run, device).eval().requires_grad_(False)
        caches = get_caches(cfg, run, vqgan, hashes) if last != "vqgan" else {}
        bpe = get_bpe(cfg, run, caches["train"]) if last not in ("vqgan", "cache") else None
    if distributed.rank() == 0:
        distributed.barrier()
    if last != "model":
        return
    cfg = dataclasses.replace(cfg, text_vocab=bpe.vocab_size)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; only now, since tokens need full precision
    torch.manual_seed(keyed_seed(cfg.seed, "weights"))
    pipeline = Pipeline(MAGVLT(cfg).to(device), vqgan, bpe, cfg)
    train_model(cfg, run, caches, pipeline)
    torch.set_float32_matmul_precision("highest")
    if distributed.rank() > 0:
        return
    minutes = (time.monotonic() - started) / 60
    print(f"trained in {minutes:.1f} minutes -> {run / 'last.pt'}; samples in {run / 'samples'}/")
    if cfg.eval_scenes and (level := shapes.level_of(cfg.data)):
        write_json(run / "scenes.json", small_world.show(small_world.evaluate_scenes(pipeline, level, cfg.eval_scenes)))
    print('now try: python sample.py --prompt "..."')


# ---------------------------------------------------------------------------------------------- before work begins

def take_from_inputs(args) -> None:
    """Adds the settings that a given cache, VQ-GAN and merges determine. Raises ValueError if a flag contradicts."""
    given = vars(args)  # only flags that were given are in it
    if given.get("cache") and "data" not in given:  # the data are the cache's, and can be judged if they are shapes
        source = str(TokenCache(Path(args.cache, "train")).meta.get("source", ""))
        args.data = source if source.startswith("shapes:") and "," not in source else ""
    if given.get("vqgan"):
        theirs = checkpoint.load(args.vqgan, "vqgan")["config"]
        given.setdefault("fit", theirs.fit)
        for name in VQGAN_FIELDS:
            if given.setdefault(name, getattr(theirs, name)) != getattr(theirs, name):
                raise ValueError(f"--{name.replace('_', '-')} {given[name]}, but {args.vqgan} has "
                                 f"{getattr(theirs, name)}: leave the flag out")
    if given.get("bpe"):
        args.text_vocab = BPE.load(args.bpe).vocab_size


def check_inputs(cfg: Config, run: Path, args, device: torch.device) -> dict[str, str]:
    """Checks what a run needs before work begins, and returns a hash of each input: of what it holds, not where it is.
    Raises ValueError for an input that is absent, has no good sample, or cannot fit."""
    if not cfg.data and not (cfg.cache and cfg.vqgan):
        raise ValueError(f"preset {args.preset} has no data: give --data, or --cache and --vqgan (see data/README.md)")
    for flag, given, file, stages in (("--vqgan", cfg.vqgan, "vqgan.pt", STAGES[1:]),
                                      ("--bpe", cfg.bpe, "bpe.txt", STAGES[2:])):
        if args.preset in ("base", "large") and args.stage in stages and not (given or (run / file).exists()):
            raise ValueError(f"preset {args.preset} needs {flag}, a tokenizer trained at its scale: see data/README.md")
    if cfg.cache and not has_vqgan(cfg, run):
        raise ValueError(f"--cache {cfg.cache} needs the VQ-GAN that made it: give --vqgan")
    if cfg.compile:
        torch.compile(torch.neg)(torch.zeros(2, device=device))  # fails where there is no compiler
    hashes = {"vqgan": checkpoint.weight_hash(checkpoint.load_vqgan(cfg.vqgan))} if cfg.vqgan else {}
    if cfg.bpe:
        hashes["bpe"] = f"{keyed_seed(BPE.load(cfg.bpe).to_text()):016x}"
    for split, folder in cache_folders(cfg, run).items():
        pieces, counts = [] if cfg.cache else pieces_for(cfg, split), {}
        hashes[f"{split} pairs"] = TokenCache(folder).meta["made_of"] if cfg.cache else (
            f"{keyed_seed([piece.identity for piece in pieces]):016x}")
        if not cfg.cache and not any(True for piece in pieces for _ in usable(piece, counts)):  # until the first good
            check_bad_share(source_of(cfg, split), counts)
    return hashes


def check_run_config(cfg: Config, run: Path, hashes: dict[str, str]) -> None:
    """Checks that the run was begun with the same settings and inputs, or begins it. Raises ValueError."""
    path, settings, before = run / "config.json", as_json(cfg), {}
    if path.exists() and any(file not in (path, run / ".lock") for file in run.iterdir()):  # else nothing is done yet
        with one_line_error(path, "damaged, or of another version"):
            before = as_json(Config()) | {"inputs": {}} | json.loads(path.read_text())  # newer settings: their default
    for name in settings:
        if before and settings[name] != before[name] and name not in MAY_CHANGE:
            raise ValueError(f"{run} was begun with {name} = {before[name]}, now it is {settings[name]}: "
                             "take another --name, or delete the folder")
    for name, found in hashes.items():
        if before and before["inputs"].get(name, found) != found:
            raise ValueError(f"{run} was begun with other {name}, or they have changed since: take another --name, or "
                             f"go on with what it has, by --cache {run}/cache --vqgan {run}/vqgan.pt")
    write_json(path, settings | {"inputs": before.get("inputs", {}) | hashes})


def start(cfg: Config, run: Path, device: torch.device, args) -> None:
    """Checks that the settings fit the processes, prints the plan, and runs what was asked for."""
    num_parts, processes = cfg.batch_size // (cfg.micro_batch or cfg.batch_size), distributed.world_size()
    if num_parts % processes:
        raise ValueError(f"{processes} processes cannot share batches of {num_parts} parts: batch_size / micro_batch "
                         "must be a multiple of the number of processes")
    if lacks_bf16(cfg, device) and not args.dry_run:
        raise ValueError(f"{device} has no bfloat16: give --precision fp16")
    with torch.device("meta"):
        size = num_parameters(MAGVLT(cfg))
    threads = torch.get_num_threads()
    print_rank0(f"{device} ({threads} CPU thread{'s' * (threads > 1)}), {f'{processes} processes, ' * (processes > 1)}"
                f"preset {args.preset}, transformer of at most {size:,} parameters -> {run}/")
    if args.dry_run:
        print_rank0(cost.report(cfg))
    if args.benchmark:
        for line in cost.benchmark(cfg, device, args.benchmark):
            print_rank0(line)
    if not (args.dry_run or args.benchmark):
        hashes = check_inputs(cfg, run, args, device)
        run.mkdir(parents=True, exist_ok=True)
        with lock(run / ".lock") if distributed.rank() == 0 else contextlib.nullcontext():
            if distributed.rank() == 0:
                check_run_config(cfg, run, hashes)
            run_stages(cfg, run, device, args.stage, hashes)


def exit_with_error(line: str, status: int = 2) -> None:
    """Ends this process with one line. An error before all processes have met is in all: the first prints it."""
    if distributed.world_size() > 1 or distributed.rank() == 0:
        process = f" (process {distributed.rank()})" if distributed.rank() else ""
        print(f"train.py: {line}{process}", file=sys.stderr)
    distributed.fail(status)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--name", help="the run: runs/NAME (default: the preset's name)")
    parser.add_argument("--stage", choices=STAGES, default="model", help="stop after this stage (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--dry-run", action="store_true", help="compute the cost of the run, and train nothing")
    parser.add_argument("--benchmark", type=positive, metavar="UPDATES", help="time so many updates of each task on "
                        "random pairs, profile one, and keep nothing")
    add_config_flags(parser)
    args = parser.parse(argv)
    run, device = Path("runs") / (args.name or args.preset), args.device
    try:
        take_from_inputs(args)
        cfg = config_from_args(args)
        device = pick_device(distributed.local_device(args.device))
        distributed.begin(device)
        start(cfg, run, device, args)
    except Stopped as where:
        print_rank0(f"stopped: {where}; the same command goes on from there")
        distributed.fail(130)  # not 0: `train.py && sample.py` must not go on with half a model
    except KeyboardInterrupt:  # between the training loops: the unfinished stage starts again
        exit_with_error("stopped; the same command goes on from the last finished stage", 130)
    except Exception as error:
        if line := explain(error):
            exit_with_error(line)
        traceback.print_exc()
        distributed.fail(1)
    distributed.end()


if __name__ == "__main__":
    main()
