"""The pool of runs: what is done is not done again, what failed is said, orders are only claimed where they show."""
import fcntl
import json
import math

import pytest

import eval
import train
from nanomagvlt.evaluation import ablations
from nanomagvlt.config import MAY_CHANGE
from test_train import SMALL

SMALL_SETTINGS = {flag.removeprefix("--"): value for flag, value in zip(SMALL[::2], SMALL[1::2])} | {"text-length": 60}


class Finished:
    """A process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self):
        pass

    wait = terminate


@pytest.fixture
def launched(tmp_path, monkeypatch) -> list[str]:
    """Commands run in this process, made small; their names in order. A plan is made of two updates."""
    monkeypatch.chdir(tmp_path)
    names = []

    def launch(command, output, workers, slot, lock):
        names.append(f"{command[0]} {output.parent.name}")
        try:
            {"train.py": train, "eval.py": eval}[command[0]].main(command[1:])
        except SystemExit as stop:
            return Finished(stop.code)
        return Finished(0)
    monkeypatch.setattr(ablations, "COMMON", SMALL_SETTINGS)
    monkeypatch.setattr(ablations, "SHORT", (2, 6))
    monkeypatch.setattr(ablations, "launch", launch)
    return names


ARGS = ["table", "--minutes", "0.001", "--seeds", "1", "--arms", "plain,no-mixsel", "--workers", "1"]


def test_a_pool_that_is_killed_goes_on_and_a_finished_one_does_nothing(launched, tmp_path, monkeypatch, capsys):
    original = ablations.launch

    def killed(command, output, *rest):
        if output.parent.name == "no-mixsel-0":
            raise SystemExit(9)
        return original(command, output, *rest)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ablations, "launch", killed)
        eval.main(ARGS)
    before, planned = list(launched), (tmp_path / "runs/pool/plan.json").read_text()
    assert before == ["train.py world-0", "train.py cost-plain-0", "train.py cost-no-mixsel-0",
                      "train.py cost-plain-1", "train.py cost-no-mixsel-1", "train.py plain-0", "eval.py plain-0"]
    eval.main(ARGS)
    assert launched[len(before):] == ["train.py no-mixsel-0", "eval.py no-mixsel-0"]
    assert (tmp_path / "runs/pool/plan.json").read_text() == planned
    count, _ = len(launched), capsys.readouterr()
    eval.main(ARGS)
    out = capsys.readouterr().out
    assert len(launched) == count and "Table 7" in out and "cannot be told: not learnt" in out
    plan = json.loads(planned)
    assert f"{'no-mixsel':22}{plan['updates']['no-mixsel']}" in out
    a, b = (json.loads((tmp_path / f"runs/pool/{name}/config.json").read_text()) for name in ("plain-0", "no-mixsel-0"))
    assert {name for name in a if a[name] != b[name]} - {*MAY_CHANGE} == {"unroll_mask"}
    assert a["vqgan"].endswith("world-0/vqgan.pt")


def test_what_failed_is_named_and_the_rest_goes_on(launched, monkeypatch, capsys):
    original = ablations.launch
    monkeypatch.setattr(ablations, "launch", lambda command, output, *rest: Finished(1) if "plain-0" == output.parent.name
                        else original(command, output, *rest))
    with pytest.raises(SystemExit):
        eval.main(ARGS)
    out, error = capsys.readouterr()
    assert "failed, and not in the tables: plain-0, plain-0 (edit); the same command" in error
    assert "plain-0: failed, see runs/pool/plain-0/output.txt" in out and "no-mixsel-0 (edit): done" in out


def test_seeds_are_the_outer_loop_and_arms_of_a_seed_share_its_world(tmp_path, monkeypatch):
    """So that a pool that is cut short holds whole comparisons."""
    done = []
    monkeypatch.setattr(ablations, "work", lambda jobs, workers, lock: done.extend(jobs) or [])
    monkeypatch.setattr(ablations, "plan", lambda pool, arms, *rest: ({arm: 100 for arm in arms}, []))
    ablations.fill(tmp_path, ["full", "biased-full"], 2, 1.0, 1)
    assert [job.name for job in done] == [
        "world-0", "world-biased-0", "world-1", "world-biased-1", "full-0", "full-0 (edit)", "biased-full-0",
        "biased-full-0 (bias)", "full-1", "full-1 (edit)", "biased-full-1", "biased-full-1 (bias)"]
    of = {job.name: " ".join(job.command) for job in done}
    assert "world-biased-1/vqgan.pt" in of["biased-full-1"] and "--seed 1" in of["biased-full-1"]
    assert "--data shapes:tiny-biased" in of["world-biased-1"] and "--data" not in of["full-1"]
    assert "--mixsel select" in of["full-1"] and "--unroll-mask true" in of["full-1"]


def test_a_pool_in_use_or_with_other_minutes_is_refused(launched, tmp_path, capsys):
    pool = tmp_path / "runs/pool"
    pool.mkdir(parents=True)
    with open(pool / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            eval.main(ARGS)
        assert "runs/pool is in use" in capsys.readouterr().err and not launched
    ablations.write_json(pool / "plan.json", {"minutes": 3.0, "updates": {}, "milliseconds": {}})
    with pytest.raises(ValueError, match="--minutes 2, but .* was begun with 3: take another --pool"):
        ablations.plan(pool, ["plain"], 2.0, 1, None)


def test_an_arm_that_comes_later_is_measured_beside_the_yardstick(tmp_path, monkeypatch):
    """The machine is twice as slow on the second day: updates still stand in the ratio of what they cost."""
    milliseconds = {"plain": 100, "full": 250, "no-mixsel": 400}

    def work(jobs, workers, lock):
        for job in jobs:
            arm, again = job.name.removeprefix("cost-").rsplit("-", 1)
            cost = milliseconds[arm] * (3 if again == "0" else 1)  # with a busy neighbour
            job.done.parent.mkdir()
            job.done.touch()
            lines = [{"step": step, "cpu_seconds": step * cost / 1000} for step in ablations.SHORT]
            job.done.with_name("log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return []
    monkeypatch.setattr(ablations, "work", work)
    assert ablations.plan(tmp_path, ["full"], 10, 1, None) == ({"plain": 6000, "full": 2400}, [])
    milliseconds["plain"] = 200
    assert ablations.plan(tmp_path, ["full", "no-mixsel"], 10, 1, None)[0]["no-mixsel"] == 3000


def results(*values: float, learnt: bool = True) -> dict[int, dict]:
    return {seed: {"t2i_exact": {"value": value, "low": value - 0.05 if learnt else 0.0},
                   "t2i_exact_ignoring": {"high": 0.02}, "scenes": 184} for seed, value in enumerate(values)}


@pytest.mark.parametrize("full, other, said", [
    (results(0.8, 0.82, 0.81), results(0.7, 0.73, 0.71), "the paper's order holds"),
    (results(0.7, 0.73, 0.71), results(0.8, 0.82, 0.81), "the paper's order does not hold"),
    (results(0.8, 0.6, 0.7), results(0.7, 0.7, 0.65), "cannot be told"),
    (results(0.8), results(0.1), "one seed  cannot be told"),
    ({1: results(0.8)[0]}, results(0.1), "no seed in common  cannot be told"),
    (results(0.803, 0.803), results(0.8, 0.8), "cannot be told"),
    (results(0.8, 0.82, 0.81), results(0.01, 0.02, 0.01, learnt=False), "cannot be told: not learnt"),
])
def test_an_order_is_claimed_only_where_it_shows(full, other, said):
    table = ablations.Table("", *ablations.DRAWN, {"full": 12.08, "plain": 14.12})
    assert ablations.verdict(table, "plain", "full", {"full": full, "plain": other}).endswith(said)


def test_the_interval_of_a_difference_is_students_and_paired():
    gaps = [0.1, 0.16, 0.1]
    mean, half = ablations.difference(results(0.5, 0.2, 0.9), results(0.4, 0.04, 0.8), "t2i_exact")
    spread = math.sqrt(sum((gap - 0.12) ** 2 for gap in gaps) / 2)
    assert mean == pytest.approx(0.12) and half == pytest.approx(4.30 * spread / math.sqrt(3), abs=1e-9)


def test_curves_are_means_over_seeds_by_tenths_of_the_minutes(tmp_path):
    for arm, seed, shift in (("full", 0, 0.0), ("full", 1, 1.0), ("plain", 0, 0.5), ("argvlt", 0, 0.0)):
        folder = tmp_path / f"{arm}-{seed}"
        folder.mkdir()
        lines = [{"step": 10 * i, "val_t2i": i + shift} for i in range(1, 11)] + [{"step": 100, "task": "t2i"}]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    head, columns, full, plain = ablations.curves(tmp_path)[1:]
    assert head == "Validation loss, t2i, by the share of the minutes"
    assert columns.split() == [f"{i}0%" for i in range(1, 11)]
    assert full.split() == ["full", *(f"{i + 0.5:.3f}" for i in range(1, 11))] and plain.split()[-1] == "10.500"
