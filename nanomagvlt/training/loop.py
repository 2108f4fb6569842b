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


class Muon(torch.optim.AdamW):
    """AdamW, except for parameter groups with "muon": True, which are matrices. There the update is Nesterov's momentum
    with all its singular values made about 1 (Jordan et al., 2024, kellerjordan.github.io/posts/muon). The factor
    0.2 sqrt(larger side) gives it AdamW's size, so that one learning rate serves both (Liu et al., 2025, arXiv
    2502.16982). torch.optim.Muon computes in bfloat16, which is slow on CPUs."""

    @torch.no_grad()
    def step(self):
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["muon"]]
        super().step()
        self.param_groups = everything
        for group in everything:
            for p in group["params"] if group["muon"] else []:
                state = self.state[p] = self.state[p] or {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                state["momentum"].lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(state["momentum"], 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * 0.2 * max(p.shape) ** 0.5 * update)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """A matrix with the singular vectors of x and all singular values about 1, by 5 Newton-Schulz steps."""
    if len(x) > len(x.T):
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x


def optimizer_for(model: torch.nn.Module, cfg: Config, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions; not on biases, norms, embeddings and positions. With
    cfg.optimizer "muon", a transformer's blocks have Muon for their matrices."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [p for _, p in trained if p.ndim < 2 or id(p) in embeddings]
    decayed, muon = [], []
    for name, p in trained:
        if p.ndim >= 2 and id(p) not in embeddings:
            (muon if cfg.optimizer == "muon" and name.startswith("blocks.") else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay, "muon": False},
              {"params": rest, "weight_decay": 0.0, "muon": False}]
    if muon:
        groups.append({"params": muon, "weight_decay": cfg.weight_decay, "muon": True})
    return (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=cfg.betas, fused=True)


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
