"""Appendix - The paper's comparisons in the small world: trains variants of the method, and prints the paper's tables.

All variants get the same number of updates, as in the paper; the CPU time of an update is printed beside it, since
UnrollMask and MixSel cost one more pass each. Variants of one seed share tokenizers and token cache: their differences
are paired. A pool is a folder of runs, VARIANT-SEED/, and their measurements, VARIANT-SEED.json. A finished run is not
repeated; an interrupted one continues from its last.pt. Unix only: a lock keeps a second driver out of the pool.
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from statistics import mean, median, stdev

import torch

from nanomagvlt.io import lock, one_line_error, write_json

COMMON = {"preset": "tiny", "text_length": 44}  # MixSel joins two captions, which need more positions than tiny has
FULL = {"unroll_mask": True, "mixsel": "select"}
VARIANTS = {
    "full": FULL, "no-mixsel": {"unroll_mask": True}, "no-unrollmask": {"mixsel": "select"}, "plain": {},
    "mixrandom": {"unroll_mask": True, "mixsel": "random"},
    "argvlt": {"model": "argvlt", "task_weights": {"t2i": 1, "i2t": 3, "it2it": 0}},  # t2i : i2t as in the others
    "argvlt-mixsel": {"model": "argvlt", "task_weights": {"t2i": 1, "i2t": 3, "it2it": 0}, "mixsel": "select"},
    "wide": {**FULL, "width": 192, "heads": 6},
    "same-ratio": {"it2it_ratio": "same"}, "unroll-all": {"unroll_mask": True, "unroll_text": "all"},
    "length-main": {"length_pass": "main", "length_positions": 16},  # as the release
    "cosine": {"decay_fraction": 1.0},
    "for-guidance": {"condition_dropout": 0.1},  # then: eval.py sweep --checkpoint .../for-guidance-0/last.pt
    **{weights: {**FULL, "task_weights": dict(zip(("t2i", "i2t", "it2it"), map(int, weights.split(":"))))}
       for weights in ("8:1:1", "1:0:0", "0:1:0", "0:0:1", "8:2:0", "2:1:1")},
}
VARIANTS |= {f"biased-{name}": {**VARIANTS[name], "data": "shapes:tiny-biased"}
             for name in ("full", "no-mixsel", "no-unrollmask", "plain")}

# The paper's measure beside each of ours, and its values. Lower is better for FID; for all others, higher.
PAPER = {
    "t2i_exact": ("FID", {"full": 12.08, "no-mixsel": 12.07, "no-unrollmask": 13.26, "plain": 14.12, "mixrandom": 13.43,
                          "argvlt": 16.93, "wide": 10.14, "8:1:1": 12.08, "1:0:0": 10.74, "0:0:1": 12.06,
                          "8:2:0": 13.09, "2:1:1": 15.17}),
    "i2t_exact": ("CIDEr", {"full": 60.4, "no-mixsel": 58.9, "no-unrollmask": 56.5, "plain": 53.8, "mixrandom": 57.9,
                            "argvlt": 45.5, "wide": 68.1, "8:1:1": 60.4, "0:1:0": 53.5, "0:0:1": 55.3, "8:2:0": 59.7,
                            "2:1:1": 61.7}),
    "object_inpainted": ("FID", {"full": 3.17, "argvlt": 5.62}),
    "object_infilled": ("CIDEr", {"full": 135.3, "argvlt": 119.8}),
}
EXACT = ("t2i_exact", "i2t_exact")
TABLES = [  # title, measures, variants; the others are compared with the first
    ("Tables 1 and 3: masked against autoregressive", EXACT, "full argvlt"),
    ("Tables 2 and 5: inpainting and infilling", ("object_inpainted", "object_infilled"), "full argvlt"),
    ("Table 6: tasks, as T2I:I2T:IT2IT (full: tiny's own)", EXACT, "8:1:1 1:0:0 0:1:0 0:0:1 8:2:0 2:1:1 full"),
    ("Table 7: UnrollMask and MixSel", EXACT, "full no-mixsel no-unrollmask plain"),
    ("Tables 9 and 10: size", EXACT, "full wide"),
    ("Table 13: MixSel and MixRandom", EXACT, "full mixrandom"),
    ("Not in the paper", EXACT, "plain same-ratio length-main cosine for-guidance"),
    ("Section 4.4: MixSel for ARGVLT", EXACT, "argvlt-mixsel argvlt"),
    ("Not in the paper: UnrollMask's text rule", ("i2t_exact",), "no-mixsel unroll-all"),
    ("Figure 4: a biased world; objects in their true colour (seen, asked), or in their shape's usual one (usual)",
     ("i2t_seen", "i2t_usual", "t2i_asked", "t2i_usual"),
     "biased-plain biased-full biased-no-mixsel biased-no-unrollmask"),
]
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by seeds
Job = namedtuple("Job", "name command done needs")  # `done` is the file that it makes, `needs` one that it reads


def fill(pool: Path, variants: list[str], seeds: int, updates: int, workers: int) -> list[str]:
    """Trains and measures what the pool lacks; returns the names of the jobs that failed. Raises ValueError if another
    driver uses the pool, or if a run in it has another number of updates."""
    pool.mkdir(parents=True, exist_ok=True)
    locked, jobs = lock(pool / ".lock"), []  # the jobs inherit the lock: they may outlive a driver that is killed
    for seed in range(seeds):  # the outer loop: a pool that is cut short holds whole comparisons
        for variant in variants:
            config = pool / f"{variant}-{seed}" / "config.json"
            with one_line_error(config, "give another --pool"):
                if config.exists() and (steps := json.loads(config.read_text())["steps"]) != updates:
                    raise ValueError(f"it has {steps} updates, not --updates {updates}")
            jobs += [job for job in jobs_of(pool.resolve(), variant, seed, updates) if job not in jobs]
    return work(jobs, workers, locked)


def jobs_of(pool: Path, variant: str, seed: int, updates: int) -> list[Job]:
    """The tokenizers and the cache that variants of one seed share; training; and a measurement besides scenes.json."""
    own, folder = VARIANTS[variant], pool / f"{variant}-{seed}"
    what, shared = ("bias", pool / f"shared-biased-{seed}") if "data" in own else ("edit", pool / f"shared-{seed}")
    given = {"vqgan": shared / "vqgan.pt", "cache": shared / "cache", "bpe": shared / "bpe.txt"}
    often = {"steps": updates, "eval_every": max(1, updates // 10), "sample_every": updates, "save_every": 500}
    data = {name: value for name, value in own.items() if name == "data"}
    evaluate = ["eval.py", what, "--checkpoint", folder / "last.pt", "--phrasings", 1, "--out", folder / f"{what}.json"]
    return [Job(shared.name, train(shared, seed, data) + ["--stage", "bpe"], shared / "bpe.txt", None),
            Job(folder.name, train(folder, seed, own | often | given), folder / "scenes.json", shared / "bpe.txt"),
            Job(f"{folder.name} ({what})", evaluate, folder / f"{what}.json", folder / "scenes.json")]


def train(folder: Path, seed: int, settings: dict) -> list:
    """The command that trains a run in that folder."""
    command = ["train.py", "--name", folder]
    for name, value in {**COMMON, "seed": seed, **settings}.items():
        if isinstance(value, dict):  # task weights
            value = ",".join(f"{task}={weight}" for task, weight in value.items())
        command += ["--" + name.replace("_", "-"), "true" if value is True else value]
    return command


def launch(job: Job, workers: int, slot: int, locked) -> subprocess.Popen:
    """Starts a job: with one thread if others run beside it, and on the GPU of its slot, if there are GPUs."""
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})
    if gpus := torch.cuda.device_count():
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
    job.done.parent.mkdir(exist_ok=True)
    with open(job.done.with_name("output.txt"), "a") as file:
        # A session of its own: Ctrl-C reaches the driver alone, which stops each job once. Twice, and nothing is saved.
        command = [sys.executable, Path(__file__).parents[2] / job.command[0], *map(str, job.command[1:])]
        return subprocess.Popen(command, stdout=file, stderr=file, env=env, pass_fds=(locked.fileno(),),
                                start_new_session=True)


def work(jobs: list[Job], workers: int, locked) -> list[str]:
    """Runs the jobs that are not done, in order, `workers` at a time; returns the names of those that failed."""
    waiting, running, failed = [job for job in jobs if not job.done.exists()], {}, []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts as Ctrl-C
    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs.exists()]
            for slot, job in zip([slot for slot in range(workers) if slot not in running], ready):
                waiting.remove(job)
                running[slot] = job, launch(job, workers, slot, locked)
            if not running:  # the remaining jobs need something that failed
                return failed + [job.name for job in waiting]
            for slot, (job, process) in [*running.items()]:
                if process.poll() is not None:
                    del running[slot]
                    is_done = process.poll() == 0 and job.done.exists()
                    failed += [] if is_done else [job.name]
                    print(job.name, "is done" if is_done else f"failed, see {job.done.parent}/output.txt", flush=True)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
        for _, process in running.values():  # a run that is stopped saves
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def read_pool(pool: Path) -> dict[str, dict[int, dict]]:
    """{variant: {seed: run}} from the files VARIANT-SEED.json; measurements also stand at the top level of a run. First
    writes these files for all measured runs of the pool: settings, validation losses, measurements."""
    for path in pool.glob("*/scenes.json"):
        with one_line_error(path.parent, "damaged"):
            parts = {name: json.loads(file.read_text()) for name in ("config", "scenes", "edit", "bias")
                     if (file := path.with_name(f"{name}.json")).exists()}
            log = [json.loads(line) for line in path.with_name("log.jsonl").read_text().splitlines() if '"val_' in line]
        write_json(pool / f"{path.parent.name}.json", parts | {"log": log})
    runs = {variant: {} for variant in VARIANTS}
    for variant, by_seed in runs.items():
        for path in sorted(pool.glob(f"{variant}-[0-9]*.json"), key=lambda path: (len(path.name), path.name)):
            with one_line_error(path, "damaged"):
                run = json.loads(path.read_text())
                of_seed = run | run["scenes"] | run.get("edit", {}) | run.get("bias", {})
            by_seed[int(path.stem.rpartition("-")[2])] = of_seed
    return runs


def difference(runs: dict[int, dict], reference: dict[int, dict], measure: str) -> tuple[float, float]:
    """The mean difference over the seeds that both have, and half of its 95% interval (paired, Student's t), which is
    at least as large as the effect of one scene: seeds that agree by chance are no proof."""
    both = [seed for seed in runs.keys() & reference.keys() if measure in runs[seed] and measure in reference[seed]]
    gaps = [runs[seed][measure]["value"] - reference[seed][measure]["value"] for seed in both]
    if len(gaps) < 2:
        return (gaps[0] if gaps else math.nan), math.inf
    half = T_95[min(len(gaps), 10)] * stdev(gaps) / len(gaps) ** 0.5
    return mean(gaps), max(half, 1 / runs[both[0]]["scenes"])


def verdict(measure: str, variant: str, first: str, runs: dict[str, dict[int, dict]]) -> str:
    """Whether the paper's order of this variant and the first one holds here."""
    gap, half = difference(runs[variant], runs[first], measure)
    text = (f"{gap:+.3f} +- {half:.3f}  " if math.isfinite(half) else
            "no seed in common  " if math.isnan(gap) else f"{gap:+.3f}, one seed  ")
    paper, values = PAPER.get(measure, ("", {}))
    task = "t2i" if measure.startswith("t2i") or paper == "FID" else "i2t"
    for name in (variant, first):  # the median seed must be better than a model that ignores its condition
        if (median(run[f"{task}_exact"]["low"] for run in runs[name].values())
                <= median(run[f"{task}_exact_ignoring"]["high"] for run in runs[name].values())):
            return text + "cannot be told: not learnt"
    if not abs(gap) > half:  # NaN is not, either
        return text + "cannot be told"
    if not {variant, first} <= values.keys() or values[variant] == values[first]:
        return text + "differs"
    is_better_there = (values[variant] > values[first]) != (paper == "FID")
    return text + f"the paper's order {'holds' if (gap > 0) == is_better_there else 'does not hold'}"


def tables(pool: Path) -> str:
    """All comparisons with at least two measured variants; the cost of an update, and the last validation losses."""
    runs, lines = read_pool(pool), [
        "Exact accuracies on the same unseen scenes. +- is half a 95% interval of a difference, paired by seed; it",
        "covers other seeds, not other scenes. Of twenty claims about an order, expect one to be chance."]
    for title, measure, variants in [(title, x, variants) for title, measures, variants in TABLES for x in measures]:
        rows = [name for name in variants.split() if any(measure in run for run in runs[name].values())]
        if len(rows) < 2:
            continue
        paper, values = PAPER.get(measure, ("", {}))
        lines += ["", title, f"{'':22}{measure + ', by seed':36}{'mean':8}{paper:8}against {rows[0]}"]
        for name in rows:
            ours = [run[measure]["value"] for run in runs[name].values() if measure in run]
            lines.append(f"{name:22}{' '.join(f'{x:.3f}' for x in ours):36}{mean(ours):<8.3f}{values.get(name, '-'):<8}"
                         + ("" if name == rows[0] else verdict(measure, name, rows[0], runs)))
    lines += ["", "Means over seeds (-: not recorded); ARGVLT's losses and those of biased worlds cannot be compared",
              f"{'':22}{'updates':10}{'CPU ms of one':16}{'T2I loss':10}I2T loss"]
    for variant, by_seed in runs.items():
        if last := [run["log"][-1] for run in by_seed.values()]:
            milliseconds = [1000 * line["cpu_seconds"] / line["step"] for line in last if "cpu_seconds" in line]
            losses = [[line[name] for line in last if name in line] for name in ("val_t2i", "val_i2t")]
            cells = [f"{mean(values):.3f}" if values else "-" for values in (milliseconds, *losses)]
            lines.append(f"{variant:22}{last[0]['step']:<10}{cells[0]:16}{cells[1]:10}{cells[2]}")
    return "\n".join(line.rstrip() for line in lines)
