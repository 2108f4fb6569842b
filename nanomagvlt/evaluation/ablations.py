"""Appendix - The paper's comparisons in miniature: one pool of runs in the small world, and its tables from them.

The paper compares by training again and again: without MixSel, without UnrollMask, with other tasks, autoregressively.
An arm is such a variant, a few settings that differ. Every arm is trained with several seeds; arms of one seed share
the image tokenizer, the captions and the text tokenizer, so that their differences are paired.

Every arm gets the same minutes of training, not the same updates (the paper's have the same updates): a second pass has
to pay for its time. How many updates that is is measured once, by short runs of all arms, and kept in plan.json:
from then on nothing depends on how busy the machine is.

A pool is a folder with a folder a run. A run that has its results is never trained again; one that was interrupted goes
on from its last.pt. Unix only: a lock that all processes hold keeps two drivers from one pool.
"""
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import torch

from nanomagvlt.io import write_json

ROOT = Path(__file__).parents[2]

# What all arms share; joined captions of two scenes, in MixSel, want more text places than the tiny preset has.
COMMON = {"preset": "tiny", "text_length": 44}
FULL = {"unroll_mask": True, "mixsel": "select"}
ARMS = {
    "full": FULL,
    "no-mixsel": {"unroll_mask": True},
    "no-unrollmask": {"mixsel": "select"},
    "plain": {},
    "mixrandom": {"unroll_mask": True, "mixsel": "random"},
    "argvlt": {"model": "argvlt", "task_weights": (1, 1, 0)},  # as many captions as drawings, as in the other arms
    "biased-full": {**FULL, "data": "shapes:tiny-biased"},
    "biased-no-mixsel": {"unroll_mask": True, "data": "shapes:tiny-biased"},
    "biased-no-unrollmask": {"mixsel": "select", "data": "shapes:tiny-biased"},
    "biased-plain": {"data": "shapes:tiny-biased"},
    "t2i-only": {**FULL, "task_weights": (1, 0, 0)},
    "i2t-only": {**FULL, "task_weights": (0, 1, 0)},
    "it2it-only": {**FULL, "task_weights": (0, 0, 1)},
    "8:2:0": {**FULL, "task_weights": (8, 2, 0)},
    "2:1:1": {**FULL, "task_weights": (2, 1, 1)},
    "8:1:1": {**FULL, "task_weights": (8, 1, 1)},
    "wide": {**FULL, "width": 192, "heads": 6},
    "same-ratio": {"it2it_ratio": "same"},
    "unroll-all": {"unroll_mask": True, "unroll_text": "all"},
    "length-main": {"length_pass": "main", "length_positions": 16},  # as the release
    "cosine": {"decay_fraction": 1.0},
    "for-guidance": {"condition_dropout": 0.1},  # then: eval.py sweep --checkpoint .../for-guidance-0/last.pt
}
SHORT = 30, 150        # of a short run: the updates that are not timed, and all of them
YARDSTICK = "plain"    # the arm whose updates fill the minutes; the others' follow from what one costs beside it


@dataclass
class Table:
    """A comparison of the paper: arms, the first of them the one that the others are held against."""
    title: str
    ours: str                 # what is measured here; higher is better
    paper: str                # what the paper measured
    is_less_better: bool      # of the paper's measure
    rows: dict[str, float | None]


DRAWN, WRITTEN = ("t2i_exact", "FID", True), ("i2t_exact", "CIDEr", False)
TABLES = [
    Table("Table 1: masked against autoregressive, drawings", *DRAWN, {"full": 12.08, "argvlt": 16.93}),
    Table("Table 2: inpainting", "object_inpainted", "FID", True, {"full": 3.17, "argvlt": 5.62}),
    Table("Table 3: masked against autoregressive, captions", *WRITTEN, {"full": 60.4, "argvlt": 45.5}),
    Table("Table 5: infilling", "object_infilled", "CIDEr", False, {"full": 135.3, "argvlt": 119.8}),
    Table("Table 6: tasks, drawings", *DRAWN, {
        "8:1:1": 12.08, "t2i-only": 10.74, "it2it-only": 12.06, "8:2:0": 13.09, "2:1:1": 15.17, "full": None}),
    Table("Table 6: tasks, captions", *WRITTEN, {
        "8:1:1": 60.4, "i2t-only": 53.5, "it2it-only": 55.3, "8:2:0": 59.7, "2:1:1": 61.7, "full": None}),
    Table("Table 7: additional training tasks, drawings", *DRAWN, {
        "full": 12.08, "no-mixsel": 12.07, "no-unrollmask": 13.26, "plain": 14.12}),
    Table("Table 7: additional training tasks, captions", *WRITTEN, {
        "full": 60.4, "no-mixsel": 58.9, "no-unrollmask": 56.5, "plain": 53.8}),
    Table("Table 9: size, drawings", *DRAWN, {"full": 12.08, "wide": 10.14}),
    Table("Table 10: size, captions", *WRITTEN, {"full": 60.4, "wide": 68.1}),
    Table("Table 13: MixSel and MixRandom, drawings", *DRAWN, {"full": 12.08, "mixrandom": 13.43}),
    Table("Table 13: MixSel and MixRandom, captions", *WRITTEN, {"full": 60.4, "mixrandom": 57.9}),
    Table("What the paper leaves open, drawings", *DRAWN, {
        "plain": None, "same-ratio": None, "length-main": None, "cosine": None, "for-guidance": None}),
    Table("What the paper leaves open, captions", *WRITTEN, {
        "plain": None, "same-ratio": None, "length-main": None, "cosine": None, "for-guidance": None}),
    Table("UnrollMask's text rule, captions", *WRITTEN, {"no-mixsel": None, "unroll-all": None}),
]
BIASED = [arm for arm, settings in ARMS.items() if "data" in settings]
# Which the paper shows by examples: there are no numbers to hold ours against.
TABLES += [Table(f"Figure 4: a world with habits, share of the objects that are not as usual and {what}", measure, "",
                 False, dict.fromkeys(["biased-plain", *BIASED]))
           for what, measure in (("said as they are", "i2t_seen"), ("said as usual", "i2t_usual"),
                                 ("drawn as asked", "t2i_asked"), ("drawn as usual", "t2i_usual"))]


# ---------------------------------------------------------------------------------------------- the pool

@dataclass
class Job:
    """A command, the file that says that it is done, and a file that must be there before it may begin."""
    name: str
    command: list[str]
    done: Path
    needs: Path | None = None


def fill(pool: Path, arms: list[str], seeds: int, minutes: float, workers: int) -> list[str]:
    """Trains and measures what the pool lacks; the names of what failed.

    Raises ValueError if the pool is in use, or was begun with other minutes.
    """
    pool.mkdir(parents=True, exist_ok=True)
    lock = open(pool / ".lock", "w")  # the commands hold it too: an orphan of a killed driver is not overtaken
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{pool} is in use by another `eval.py table`, or by a run that one left behind: "
                         "wait for it, or stop it") from None
    worlds = {world(pool, arm, seed): make_world(pool, arm, seed) for seed in range(seeds) for arm in arms}
    failed = work([*worlds.values()], workers, lock)
    updates, more = plan(pool, arms, minutes, workers, lock)
    jobs = [job for seed in range(seeds) for arm in arms if arm in updates
            for job in run(pool, arm, seed, updates[arm])]
    missing = sum(not job.done.exists() for job in jobs if job.needs in {home / "bpe.txt" for home in worlds})
    if missing:
        hours = math.ceil(missing / workers) * minutes / 60
        print(f"{missing} runs of {minutes:g} minutes to come, {workers} at a time: {hours:.1f} hours, and what "
              "measuring takes", flush=True)
    return failed + more + work(jobs, workers, lock)


def world(pool: Path, arm: str, seed: int) -> Path:
    """The folder with the tokenizers and the pairs of an arm's world."""
    return pool / f"world{'-biased' * (arm in BIASED)}-{seed}"


def make_world(pool: Path, arm: str, seed: int) -> Job:
    folder = world(pool, arm, seed)
    settings = {**COMMON, "seed": seed} | {name: value for name, value in ARMS[arm].items() if name == "data"}
    return Job(folder.name, train(folder, settings, "--stage", "bpe"), folder / "bpe.txt")


def train(folder: Path, settings: dict, *flags: str) -> list[str]:
    """The command that trains a run in that folder. A tuple is written 1,2,0 and True true, as the flags want it."""
    words = {name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
             if isinstance(value, bool) else str(value) for name, value in settings.items()}
    given = [word for name, value in words.items() for word in ("--" + name.replace("_", "-"), value)]
    return ["train.py", "--name", str(folder.resolve()), *given, *flags]


def of_an_arm(pool: Path, arm: str, seed: int, steps: int) -> dict:
    home = world(pool, arm, seed).resolve()
    return {**COMMON, **ARMS[arm], "seed": seed, "steps": steps, "vqgan": home / "vqgan.pt", "cache": home / "cache",
            "bpe": home / "bpe.txt"}


def plan(pool: Path, arms: list[str], minutes: float, workers: int, lock) -> tuple[dict[str, int], list[str]]:
    """How many updates each arm gets, and what failed. An arm that comes later is measured beside the yardstick."""
    path, (warm, short) = pool / "plan.json", SHORT
    kept = json.loads(path.read_text()) if path.exists() else {"minutes": minutes, "updates": {}, "milliseconds": {}}
    if kept["minutes"] != minutes:
        raise ValueError(f"--minutes {minutes:g}, but {pool} was begun with {kept['minutes']:g}: take another --pool")
    new = [arm for arm in arms if arm not in kept["updates"]]
    if not new:
        return kept["updates"], []
    often = {"log_every": warm, "eval_every": 10 ** 6, "sample_every": 10 ** 6, "eval_scenes": 1}
    arm_of = {pool / f"cost-{arm}-{again}": arm for again in range(2) for arm in dict.fromkeys([YARDSTICK, *new])}
    failed = work([Job(folder.name, train(folder, of_an_arm(pool, arm, 0, short) | often), folder / "scenes.json",
                       world(pool, arm, 0) / "bpe.txt")
                   for folder, arm in arm_of.items()], workers, lock)
    # Processor time, on a CPU: what else goes on there makes a run wait, but does not count. And the quicker of two.
    cost, timed = {}, "seconds" if torch.cuda.is_available() else "cpu_seconds"
    for folder, arm in arm_of.items():
        if (folder / "scenes.json").exists():
            clock = {line["step"]: line[timed] for line in read_log(folder / "log.jsonl")}
            cost[arm] = min(1000 * (clock[short] - clock[warm]) / (short - warm), cost.get(arm, math.inf))
            shutil.rmtree(folder)
    if YARDSTICK in cost:
        base = kept["updates"].get(YARDSTICK, minutes * 60_000 / cost[YARDSTICK])
        for arm in {YARDSTICK, *new} & set(cost) - set(kept["updates"]):
            kept["updates"][arm] = max(short, round(base * cost[YARDSTICK] / cost[arm] / 10) * 10)
            kept["milliseconds"][arm] = round(cost[arm], 1)
        write_json(path, kept)
    return kept["updates"], failed


def run(pool: Path, arm: str, seed: int, steps: int) -> list[Job]:
    """One arm with one seed: trained and measured on scenes, then editing, then, in a biased world, its habits."""
    folder = pool / f"{arm}-{seed}"
    scenes, last = folder / "scenes.json", str((folder / "last.pt").resolve())
    often = {"eval_every": max(50, steps // 10), "sample_every": steps, "save_every": 500}
    jobs = [Job(folder.name, train(folder, of_an_arm(pool, arm, seed, steps) | often), scenes,
                world(pool, arm, seed) / "bpe.txt")]
    for what in ("bias",) if arm in BIASED else ("edit",):
        out = folder / f"{what}.json"
        jobs.append(Job(f"{folder.name} ({what})", ["eval.py", what, "--checkpoint", last, "--phrasings", "1", "--out",
                                                   str(out.resolve())], out, scenes))
    return jobs


def launch(command: list[str], output: Path, workers: int, slot: int, lock) -> subprocess.Popen:
    """Starts a script of ours. Beside others it gets one thread, since two that share a core wait for each other; and,
    where there are GPUs, the one of its slot."""
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})
    if gpus := torch.cuda.device_count():
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
    with open(output, "a") as file:
        # In a session of its own Ctrl-C does not reach it: work() tells it to stop, once. Twice would be at once.
        return subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file,
                                env=env, pass_fds=(lock.fileno(),), start_new_session=True)


def work(jobs: list[Job], workers: int, lock) -> list[str]:
    """Runs the jobs that are not done, `workers` at a time, in order; the names of those that failed."""
    waiting, running, failed = [job for job in jobs if not job.done.exists()], {}, []
    total, started = len(waiting), time.monotonic()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs.exists()]
            for job in ready[:workers - len(running)]:
                waiting.remove(job)
                job.done.parent.mkdir(parents=True, exist_ok=True)
                slot = min(set(range(workers)) - {slot for _, slot, _ in running.values()})
                running[job.name] = job, slot, launch(job.command, job.done.parent / "output.txt", workers, slot, lock)
            if not running:  # what is left waits for something that failed
                return failed + [job.name for job in waiting]
            for name, (job, _, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                is_done = process.poll() == 0 and job.done.exists()
                failed += [] if is_done else [name]
                print(f"{name}: " + (f"done ({total - len(waiting) - len(running)} of {total}, "
                                     f"{(time.monotonic() - started) / 60:.0f} minutes)" if is_done else
                                     f"failed, see {job.done.parent / 'output.txt'}"), flush=True)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)  # what still runs saves and stops
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()
    return failed


# ---------------------------------------------------------------------------------------------- the tables

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by seeds


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results_of(pool: Path, arm: str) -> dict[int, dict]:
    """All that was measured of an arm, by seed."""
    found = {}
    for path in pool.glob(f"{arm}-[0-9]*/scenes.json"):
        found[int(path.parent.name.rpartition("-")[2])] = {
            name: value for file in path.parent.glob("*.json") if file.name in ("scenes.json", "edit.json", "bias.json")
            for name, value in json.loads(file.read_text()).items()}
    return dict(sorted(found.items()))


def has_learnt(results: dict[int, dict], task: str) -> bool:
    """Is the median seed better than what ignoring the condition gives, beyond both intervals over scenes?"""
    return (median(r[f"{task}_exact"]["low"] for r in results.values())
            > median(r[f"{task}_exact_ignoring"]["high"] for r in results.values()))


def difference(ours: dict[int, dict], reference: dict[int, dict], name: str) -> tuple[float, float]:
    """Mean and half the 95% interval of what the arm has more than the reference, over the seeds that both have.

    The interval is never less than what one scene makes: seeds that agree by chance are no proof.
    """
    both = [seed for seed in ours.keys() & reference.keys() if name in ours[seed] and name in reference[seed]]
    gaps = [ours[seed][name]["value"] - reference[seed][name]["value"] for seed in both]
    if len(gaps) < 2:
        return (gaps[0] if gaps else math.nan), math.inf
    half = T_95[min(len(gaps), 10)] * stdev(gaps) / len(gaps) ** 0.5
    return mean(gaps), max(half, 1 / ours[both[0]]["scenes"])


def verdict(table: Table, arm: str, first: str, results: dict[str, dict]) -> str:
    """Does the paper's order of this arm and the first hold here?"""
    gap, half = difference(results[arm], results[first], table.ours)
    text = (f"{gap:+.3f} +- {half:.3f}  " if math.isfinite(half) else
            "no seed in common  " if math.isnan(gap) else f"{gap:+.3f}, one seed  ")
    shows = abs(gap) > half  # which no NaN does
    task = "t2i" if table.ours.startswith("t2i") or table.ours == "object_inpainted" else "i2t"
    if not (has_learnt(results[arm], task) and has_learnt(results[first], task)):
        return text + "cannot be told: not learnt"
    if table.rows[arm] is None or table.rows[first] is None:
        return text + ("differs" if shows else "cannot be told")
    is_better_there = (table.rows[arm] > table.rows[first]) != table.is_less_better
    return text + ("cannot be told" if not shows else
                   "the paper's order holds" if (gap > 0) == is_better_there else "the paper's order does not hold")


def tables(pool: Path) -> str:
    """All comparisons of which at least two arms have been measured."""
    results, text = {arm: results_of(pool, arm) for arm in ARMS}, [
        "Exact accuracies on unseen scenes, the same for all. +- is half a 95% interval of the difference, paired by "
        "seed\n(Student's t): it says how much seeds vary, not how much other scenes would. Of twenty orders claimed, "
        "expect one\nto be chance."]
    for table in TABLES:
        rows = [arm for arm in table.rows if any(table.ours in r for r in results[arm].values())]
        if len(rows) < 2:
            continue
        text += ["", table.title, f"{'':22}{table.ours + ', by seed':36}{'mean':8}{table.paper:8}against {rows[0]}"]
        for arm in rows:
            values = [r[table.ours]["value"] for r in results[arm].values() if table.ours in r]
            paper = "-" if table.rows[arm] is None else table.rows[arm]
            holds = "" if arm == rows[0] else verdict(table, arm, rows[0], results)
            by_seed = " ".join(f"{value:.3f}" for value in values)
            text.append(f"{arm:22}{by_seed:36}{mean(values):<8.3f}{paper:<8}{holds}")
    text += curves(pool) + cost_table(pool)
    return "\n".join(text).strip()


def curves(pool: Path) -> list[str]:
    """The loss per masked place on unseen pairs at each tenth of the minutes, the mean over seeds. The learning rate
    falls over the last three of them."""
    text = []
    for task in ("t2i", "i2t"):
        rows = []
        for arm in ARMS:
            logs = [[line[f"val_{task}"] for line in read_log(path) if f"val_{task}" in line]
                    for path in sorted(pool.glob(f"{arm}-[0-9]*/log.jsonl"))]
            logs = [losses for losses in logs if len(losses) >= 10]
            if logs and arm not in BIASED and ARMS[arm].get("model") != "argvlt":  # whose losses are of other things
                rows.append(f"{arm:22}" + "".join(f"{mean(tenth):<7.3f}" for tenth in list(zip(*logs))[:10]))
        if rows:
            text += ["", f"Validation loss, {task}, by the share of the minutes",
                     f"{'':22}" + "".join(f"{f'{share}0%':7}" for share in range(1, 11)), *rows]
    return text


def cost_table(pool: Path) -> list[str]:
    """What each arm's minutes bought."""
    if not (pool / "plan.json").exists():
        return []
    kept = json.loads((pool / "plan.json").read_text())
    text = ["", f"Updates in {kept['minutes']:g} minutes, and milliseconds an update, as measured for that"]
    return text + [f"{arm:22}{kept['updates'][arm]:<8}{kept['milliseconds'][arm]}" for arm in ARMS
                   if arm in kept["updates"]]
