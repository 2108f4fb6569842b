"""What both training loops share: learning rate, optimiser, log, and a stop that loses nothing.

A loop is then flat: `while step < cfg.steps`: one update, a line in the log, a save, a look at the stop flag. So read
train_vqgan() in train_vqgan.py and train_model() in train.py.
"""
import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanomagvlt.config import Config
from nanomagvlt.io import whole

BAR = {"mininterval": 0.1 if sys.stderr.isatty() else 30}  # for tqdm: in a file a line every half minute is enough
MAX_SKIPPED = 3  # updates in a row with a gradient that is not finite


class Clock:
    """`with clock:` adds up the seconds that pass, and the processor seconds of this process."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0):
        self.seconds, self.cpu_seconds = seconds, cpu_seconds

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *error):
        self.seconds += time.perf_counter() - self.began[0]
        self.cpu_seconds += time.process_time() - self.began[1]

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


class FiniteCheck:
    """Tests whether an update's gradient norm is finite; one that is not has changed no weight, and counts as skipped.

    After three in a row the run has diverged: it raises ValueError. last.pt is sound all the same. In fp16 the update
    also halves the loss scale, which was too large; so such updates are counted in a row only when it is down to 1.
    """

    def __init__(self, run: Path, skipped: int = 0, in_a_row: int = 0):
        self.run, self.skipped, self.in_a_row = run, skipped, in_a_row

    def __call__(self, norm: float, step: int, scaler: torch.amp.GradScaler) -> bool:
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + (scaler.get_scale() <= 1)  # 1 without fp16
        if self.in_a_row == MAX_SKIPPED:
            raise ValueError(f"the gradients of {MAX_SKIPPED} updates in a row, up to step {step:,}, were not finite: "
                             f"{self.run / 'last.pt'} is sound; try a smaller --lr, under another --name")
        return False


class Stopped(Exception):
    """Training was stopped by a signal, and everything is saved."""


class Interrupt:
    """`with Interrupt() as stop:` the first Ctrl-C, SIGTERM or SIGUSR1 (a scheduler's warning) sets stop.came, which
    the loop reads after each update; a second signal ends the process at once."""

    def __init__(self, prints: bool = True):
        self.prints = prints

    def __enter__(self):
        self.came = False
        self.before = {number: signal.signal(number, self)
                       for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __call__(self, number, frame):
        if self.came:
            sys.exit(128 + number)
        self.came = True
        if self.prints:
            tqdm.write("stopping after this update, and saving ...")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(step: int, peak: float, warmup: int, total: int, decay_fraction: float = 1.0) -> float:
    """The rate at a step: linear from 0 in the warm-up, then the peak, then half a cosine down to 0 over the last share
    `decay_fraction` of the steps after the warm-up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    decay = max(0.0, (progress - 1 + decay_fraction) / decay_fraction)
    return peak * 0.5 * (1 + math.cos(math.pi * decay))


def optimizer_for(model: torch.nn.Module, cfg: Config, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions; not on biases, norms, embeddings and positions."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=lr, betas=cfg.betas, fused=True)


def scaler_for(cfg: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that small gradients do not become 0. In other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")


class Log:
    """A JSON line for each record, appended to a file.

    A run that goes on from an earlier step drops the later lines, and lines that a crash damaged.
    """

    def __init__(self, path: Path, step: int):
        if path.is_file():
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # raised by a damaged line
                    kept += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= step else []
            with whole(path) as file:
                file.writelines(kept)
        self.path, self.file = path, open(path, "a", buffering=1)

    def write(self, **record) -> None:
        numbers = {name: round(value, 5) if math.isfinite(value) else None  # JSON has no NaN
                   for name, value in record.items() if isinstance(value, float)}
        try:
            self.file.write(json.dumps(record | numbers) + "\n")
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(self.path)) from None
