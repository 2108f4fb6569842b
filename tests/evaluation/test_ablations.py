"""The pool of runs: finished work is not repeated, failures are named, and an order is claimed only where it shows."""
import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval
import train
from nanomagvlt.config import MAY_CHANGE
from nanomagvlt.evaluation import ablations
from test_train import SMALL

SMALL_SETTINGS = {flag.removeprefix("--"): value for flag, value in zip(SMALL[::2], SMALL[1::2])} | {"text-length": 60}
ARGS = ["table", "--updates", "2", "--seeds", "1", "--variants", "plain,no-mixsel", "--workers", "1"]


@pytest.fixture
def driver(tmp_path, monkeypatch) -> SimpleNamespace:
    """Jobs run in this process, with a small model: the names of those that were started. One may kill it, one fail."""
    monkeypatch.chdir(tmp_path)
    driver = SimpleNamespace(started=[], killed_by="", failing="")

    def launch(job, workers, slot, lock):
        if job.name == driver.killed_by:
            raise SystemExit(9)
        driver.started.append(job.name)
        if job.name != driver.failing:
            {"train.py": train, "eval.py": eval}[job.command[0]].main([*map(str, job.command[1:])])
        return SimpleNamespace(poll=lambda: int(job.name == driver.failing))
    monkeypatch.setattr(ablations, "COMMON", SMALL_SETTINGS)
    monkeypatch.setattr(ablations, "launch", launch)
    return driver


def test_a_pool_that_is_killed_continues_and_a_finished_one_does_nothing(driver, capsys):
    driver.killed_by = "no-mixsel-0"
    with pytest.raises(SystemExit):
        eval.main(ARGS)
    assert driver.started == ["shared-0", "plain-0", "plain-0 (edit)"]
    driver.killed_by = ""
    eval.main(ARGS)
    eval.main(ARGS)
    assert driver.started[3:] == ["no-mixsel-0", "no-mixsel-0 (edit)"]
    out = capsys.readouterr().out
    assert "Table 7" in out and "cannot be told: not learnt" in out
    assert any(line.split()[:2] == ["no-mixsel", "2"] for line in out.splitlines())                  # its updates
    a, b = (json.loads(Path(f"runs/pool/{name}-0.json").read_text())["config"] for name in ("plain", "no-mixsel"))
    assert {name for name in a if a[name] != b[name]} - {*MAY_CHANGE} == {"unroll_mask"}
    with pytest.raises(SystemExit):
        eval.main([*ARGS, "--updates", "7"])
    assert "--updates 7" in capsys.readouterr().err and len(driver.started) == 5


def test_failures_are_named_and_the_rest_is_done(driver, capsys):
    driver.failing = "plain-0"
    with pytest.raises(SystemExit):
        eval.main(ARGS)
    out, error = capsys.readouterr()
    assert "plain-0, plain-0 (edit)" in error and "no-mixsel-0 (edit)" in out and "plain-0/output.txt" in out


def test_a_pool_in_use_is_refused(driver, capsys):
    Path("runs/pool").mkdir(parents=True)
    with open("runs/pool/.lock", "w") as lock, pytest.raises(SystemExit):
        fcntl.flock(lock, fcntl.LOCK_EX)
        eval.main(ARGS)
    assert "runs/pool" in capsys.readouterr().err and not driver.started


def test_seeds_are_the_outer_loop_and_variants_of_a_seed_share_their_tokenizers(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(ablations, "work", lambda jobs, workers, lock: done.extend(jobs))
    ablations.fill(tmp_path, ["full", "biased-full", "8:2:0"], 2, 100, 1)
    names = ["shared-0", "full-0", "full-0 (edit)", "shared-biased-0", "biased-full-0", "biased-full-0 (bias)",
             "8:2:0-0", "8:2:0-0 (edit)"]
    assert [job.name for job in done] == names + [name.replace("-0", "-1") for name in names]
    of = {job.name: " ".join(map(str, job.command)) for job in done}
    assert all(flag in of["full-1"] for flag in ("--seed 1 ", "--mixsel select", "--unroll-mask true", "/shared-1/bpe"))
    assert "/shared-biased-1/vqgan.pt" in of["biased-full-1"] and "--data" not in of["full-1"] + of["shared-1"]
    assert "--data shapes:tiny-biased" in of["shared-biased-1"] and "t2i=8,i2t=2,it2it=0" in of["8:2:0-1"]


def results(*values: float, learnt: bool = True) -> dict[int, dict]:
    return {seed: {"t2i_exact": {"value": value, "low": value - 0.05 if learnt else 0.0},
                   "t2i_exact_ignoring": {"high": 0.02}, "scenes": 184} for seed, value in enumerate(values)}


@pytest.mark.parametrize("full, plain, outcome", [
    (results(0.8, 0.82, 0.81), results(0.7, 0.73, 0.71), "the paper's order holds"),
    (results(0.7, 0.73, 0.71), results(0.8, 0.82, 0.81), "the paper's order does not hold"),
    (results(0.8, 0.6, 0.7), results(0.7, 0.7, 0.65), "cannot be told"),
    (results(0.8), results(0.1), "one seed  cannot be told"),
    ({1: results(0.8)[0]}, results(0.1), "no seed in common  cannot be told"),
    (results(0.803, 0.803), results(0.8, 0.8), "cannot be told"),  # seeds that agree by chance
    (results(0.8, 0.82, 0.81), results(0.01, 0.02, 0.01, learnt=False), "cannot be told: not learnt"),
])
def test_an_order_is_claimed_only_where_it_shows(full, plain, outcome):
    """The paper's FIDs, of which lower is better: 12.08 for full, 14.12 for plain."""
    assert ablations.verdict("t2i_exact", "plain", "full", {"full": full, "plain": plain}).endswith(outcome)


def test_the_interval_of_a_difference_is_students_and_paired():
    gap, half = ablations.difference(results(0.5, 0.2, 0.9), results(0.4, 0.04, 0.8), "t2i_exact")  # 0.1, 0.16, 0.1
    assert gap == pytest.approx(0.12) and half == pytest.approx(4.30 * 0.0012 ** 0.5 / 3 ** 0.5, abs=1e-9)


def test_the_kept_pool_can_be_read():
    text = ablations.tables(Path(__file__).parents[2] / "data" / "results" / "pool")
    assert "0.622 0.655 0.649" in text and "no-mixsel 5780 119.748 0.566 0.248" in " ".join(text.split())
