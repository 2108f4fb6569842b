"""What every training loop here needs: a learning rate, an optimiser, a log, and a way to stop without loss.

A loop is then flat: `while step < cfg.steps`, one update, one line in the log, a save, and a look at whether Ctrl-C
came. Both loops, train_vqgan() in vqtrain.py and train_model() in train.py, read the same way.
"""
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanomagvlt.config import Config

# For tqdm: in a file, where nobody watches, a line every half minute is enough.
BAR = {"mininterval": 0.1 if sys.stderr.isatty() else 30}


class Clock:
    """`with clock:` adds up the time that passes, and the processor time that this process takes of it."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0):
        self.seconds, self.cpu_seconds, self.last = seconds, cpu_seconds, 0.0  # last: of the last time alone

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *error):
        self.last = time.perf_counter() - self.began[0]
        self.seconds += self.last
        self.cpu_seconds += time.process_time() - self.began[1]

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


AT_MOST = 3  # updates in a row whose gradient is not finite


class Finite:
    """Is an update's gradient norm finite? One that is not has changed no weight: it is counted as skipped. Three in a
    row raise ValueError, since the run has diverged; last.pt is sound all the same."""

    def __init__(self, run: Path, skipped: int = 0, in_a_row: int = 0):
        self.run, self.skipped, self.in_a_row = run, skipped, in_a_row

    def __call__(self, norm: float, step: int) -> bool:
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == AT_MOST:
            raise ValueError(f"the gradients of {AT_MOST} updates in a row, up to step {step:,}, were not finite: "
                             f"{self.run / 'last.pt'} is sound; try a smaller --lr, under another --name")
        return False


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and all there is has been saved."""


class Interrupt:
    """Within `with Interrupt() as stop`, the first Ctrl-C, SIGTERM or SIGUSR1 (by which schedulers warn) is a flag,
    stop.came, to be looked at after each update; a second one ends at once."""

    def __init__(self, speaks: bool = True):
        self.speaks = speaks

    def __enter__(self):
        self.came = False
        self.before = {number: signal.signal(number, self)
                       for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __call__(self, number, frame):
        if self.came:
            sys.exit(128 + number)
        self.came = True
        if self.speaks:
            tqdm.write("stopping after this update, and saving ...")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(step: int, peak: float, warmup: int, total: int, fall: float = 1.0) -> float:
    """Linear from 0 over the warm-up, then the peak, then half a cosine down to 0 over the last share `fall` of what
    follows the warm-up; with 1 all of it falls."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 1 + fall) / fall)))


def optimizer_for(model: torch.nn.Module, cfg: Config, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and convolutions only, not on biases, norms, embeddings or positions."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=lr, betas=cfg.betas, fused=True)


class Log:
    """One JSON line a record, appended; going on from an earlier step drops the lines after it.

    A last line that a crash cut short, without its newline, is one of those.
    """

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
        self.file = open(path, "a", buffering=1)

    def write(self, **record) -> None:
        numbers = {name: round(value, 5) if math.isfinite(value) else None  # JSON has no NaN
                   for name, value in record.items() if isinstance(value, float)}
        self.file.write(json.dumps(record | numbers) + "\n")
