"""What only real processes show: kills at any moment, signals, two processes at once. `pytest -m slow`."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanomagvlt.training import checkpoint
from test_train import SMALL, content, equal

ROOT = Path(__file__).parents[2]
RUN = Path("runs/micro")

# Kills itself at its n-th fsync, which is inside a save, or before its n-th update.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
what, n, calls = sys.argv[1], int(sys.argv[2]), []
def deadly(original):
    def call(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return call
if what == "save":
    os.fsync = deadly(os.fsync)
else:
    train.update_model = deadly(train.update_model)
train.main(sys.argv[3:])
"""


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_twenty_kills_lose_nothing_before_the_last_save(tmp_path, monkeypatch):
    """Half of them between writing a file and moving it into place. What comes out is what no kill gives."""
    flags, chance = [*SMALL, "--steps", "60", "--save-every", "2", "--unroll-mask", "true", "--mixsel", "select",
                     "--micro-batch", "2"], random.Random(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT)))
    saved = 0
    for i in range(20):
        what = "save" if i % 2 else "update"
        assert start(["killed.py", what, str(chance.randint(2, 6)), *flags]).wait() == -signal.SIGKILL
        if (RUN / "last.pt").exists():
            step = checkpoint.load(RUN / "last.pt", "magvlt")["step"]
            assert step >= saved
            saved = step
    assert saved > 0 and start([str(ROOT / "train.py"), *flags]).wait() == 0
    killed = content(RUN)
    assert start([str(ROOT / "train.py"), *flags, "--name", "straight"]).wait() == 0
    straight = content(Path("runs/straight"))
    assert [name for name in straight if not equal(straight[name], killed[name])] == []
    assert all(re.fullmatch(r"(last|best|vqgan)\.pt\.\d+\.tmp", name) for name in set(killed) - set(straight))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_two_processes_stop_at_a_signal_and_go_on_as_if_uninterrupted(number, tmp_path, monkeypatch):
    """torchrun forwards SIGTERM by default, and SIGUSR1 with --signals-to-handle."""
    monkeypatch.chdir(tmp_path)
    port = 29_000 + os.getpid() % 500

    def command(name: str) -> list[str]:
        return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", str(ROOT / "train.py"), *SMALL, "--steps", "150",
                "--micro-batch", "2", "--save-every", "1000", "--name", name]

    def steps() -> int:
        log = Path("runs/told/log.jsonl")
        lines = log.read_text().splitlines() if log.exists() else []
        return max((json.loads(line)["step"] for line in lines[:-1]), default=0)
    process = start(command("told"))
    while steps() < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert 5 <= checkpoint.load("runs/told/last.pt", "magvlt")["step"] < 150
    for name in ("told", "straight"):
        assert start(command(name)).wait(300) == 0
    told, straight = content(Path("runs/told")), content(Path("runs/straight"))
    assert [name for name in straight if not equal(straight[name], told[name])] == [] and set(told) == set(straight)


BROKEN = """
import sys
sys.path.insert(0, {root!r})
import train
from nanomagvlt.training import distributed
original = train.update_model
def broken(*args):
    if args[-1] == 3 and distributed.rank() == {rank}:
        raise OSError(28, "No space left on device", "last.pt")
    return original(*args)
train.update_model = broken
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_fails_ends_all_with_its_message(rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN.format(root=str(ROOT), rank=rank))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29_500 + os.getpid() % 500),
               "broken.py", *SMALL, "--steps", "9", "--micro-batch", "2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200)
    who = " (process 1)" if rank else ""
    assert done.returncode != 0 and f"train.py: last.pt: No space left on device{who}\n" in done.stderr


@pytest.mark.slow
def test_two_processes_benchmark_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29_500 + os.getpid() % 500),
               str(ROOT / "train.py"), *SMALL, "--micro-batch", "2", "--benchmark", "1"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("Self CPU time total") == 1 and not list(tmp_path.iterdir())


POOL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in a shell's background ignores it
sys.path[:0] = [{root!r}, {root!r} + "/tests/training", {root!r} + "/tests/evaluation"]
import eval
from nanomagvlt.evaluation import ablations
from test_ablations import SMALL_SETTINGS
ablations.COMMON = SMALL_SETTINGS | {{"save-every": 1000}}
eval.main(["table", "--updates", "100000", "--seeds", "1", "--variants", "plain,no-mixsel", "--workers", "2"])
"""


@pytest.mark.slow
def test_ctrl_c_on_a_pool_lets_all_of_its_runs_save(tmp_path, monkeypatch):
    """Ctrl-C goes to the whole process group, as in a terminal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.py").write_text(POOL.format(root=str(ROOT)))
    process = subprocess.Popen([sys.executable, "pool.py"], start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    runs = [Path("runs/pool") / name for name in ("plain-0", "no-mixsel-0")]
    while not all((run / "log.jsonl").exists() and len((run / "log.jsonl").read_text()) > 200 for run in runs):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130 and "the same command goes on" in process.stderr.read()
    assert all(checkpoint.load(run / "last.pt", "magvlt")["step"] > 0 for run in runs)
