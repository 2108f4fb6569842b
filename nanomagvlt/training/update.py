"""One update of the transformer: what scale needs, around losses() of objectives.py and argvlt.py.

A batch is computed in parts of `micro_batch` pairs, one after the other, on one process or on several. Each part's loss
is a mean over the part, and the update's gradient is the mean over the parts: so it does not matter which process
computes which part. Every pass is followed at once by its backward pass, so that the activations of one pass are in
memory at a time; the gradient of a sum is the sum of the gradients.

All randomness is a function of (seed, update, purpose, row of the batch) or, for dropout, of the part: a resumed run
equals the run that was not interrupted.
Shapes: B the whole batch, b a part of it.
"""
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from nanomagvlt import argvlt, objectives
from nanomagvlt.config import Config
from nanomagvlt.data.cache import TokenCache, make_batch
from nanomagvlt.model import MAGVLT
from nanomagvlt.rng import batch_uniform, keyed_generator, keyed_seed
from nanomagvlt.sequence import TASKS
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training import distributed
from nanomagvlt.training.loop import learning_rate


def method_of(cfg: Config):
    """The module with the model's losses(), run_pass(), score_pass() and total_loss()."""
    return argvlt if cfg.model == "argvlt" else objectives


def compiled_score(cfg: Config) -> Callable:
    """score_pass() of the model's method, compiled if cfg.compile: all passes of an update go through it.

    PyTorch soon compiles graphs for all lengths of text, so there are about six. There is at most one for each shape: a
    task has one for each padded length, and as many with MixSel. The limit allows them all: beyond it PyTorch raises.
    """
    score, limits = method_of(cfg).score_pass, torch._dynamo.config
    if not cfg.compile:
        return score
    limits.recompile_limit = max(8, 2 * len(cfg.task_shares) * math.ceil(cfg.text_length / cfg.text_bucket))
    limits.accumulated_recompile_limit = max(256, limits.recompile_limit)
    return torch.compile(score, fullgraph=True)


def draw_task(cfg: Config, step: int) -> str:
    """The task of an update, with probabilities as task_weights: the same in all processes."""
    names = [task for task in TASKS if task in cfg.task_weights]
    weights = torch.tensor([cfg.task_weights[task] for task in names])
    return names[int(torch.multinomial(weights, 1, generator=keyed_generator(cfg.seed, "task", step)))]


class Parts:
    """The parts of each batch that this process computes. A thread prepares the next update's parts."""

    def __init__(self, cfg: Config, cache: TokenCache, bpe: BPE, device: torch.device):
        self.cfg, self.cache, self.bpe, self.device = cfg, cache, bpe, device
        self.size = cfg.micro_batch or cfg.batch_size
        self.thread, self.next = ThreadPoolExecutor(1), {}

    def of_step(self, step: int) -> list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
        """[(its number, its rows of the batch (b,), its tensors)] on the device, as make_batch() makes them."""
        ready: Future = self.next.pop(step, None) or self.thread.submit(self.make, step)
        self.next = {step + 1: self.thread.submit(self.make, step + 1)}
        parts = [(number, {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()})
                 for number, batch in ready.result()]
        return [(number, batch.pop("rows"), batch) for number, batch in parts]

    def make(self, step: int) -> list[tuple[int, dict[str, torch.Tensor]]]:
        cfg, made = self.cfg, []
        rows = self.cache.rows_of_step(step, cfg.batch_size, cfg.seed)                               # (B,)
        parts = self.order(rows, step).reshape(-1, self.size)                                        # (parts, b)
        for number in range(distributed.rank(), len(parts), distributed.world_size()):
            batch = make_batch(self.cache, self.bpe, rows[parts[number]], cfg, cfg.bpe_dropout,
                               (cfg.seed, "bpe dropout", step))
            batch["rows"] = torch.from_numpy(parts[number])                                          # (b,)
            if self.device.type == "cuda":  # copies from pinned memory run while the GPU computes
                batch = {name: tensor.contiguous().pin_memory() for name, tensor in batch.items()}
            made.append((number, batch))
        return made

    def order(self, rows: np.ndarray, step: int) -> np.ndarray:
        """The rows of the batch in the order in which they are cut into parts, (B,): the same in all processes.

        Where no text is scored, in t2i, they are sorted by the length of the captions: so a part has less padding, and
        the expected gradient stays the same. Where text is scored, sorting would give the tokens of short captions a
        greater weight, because a part's loss is a mean over its own tokens.
        """
        scores_text = self.cfg.model == "argvlt" or TASKS[draw_task(self.cfg, step)].length_of
        if scores_text or self.size == len(rows):
            return np.arange(len(rows))
        return np.argsort([len(caption) for caption in self.cache.captions(rows)], kind="stable")


def update_model(model: MAGVLT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, cfg: Config,
                 parts: Parts, score: Callable, step: int) -> tuple[str, dict[str, torch.Tensor], float]:
    """One update: its task, its loss terms (means over the batch), and the norm of the gradient.

    score is compiled_score(). If the norm is not finite, no weight changes, and the loss scale of fp16 is halved. All
    processes see the same norm, because they have the same sum of gradients.
    """
    task, method, num_parts = draw_task(cfg, step), method_of(cfg), cfg.batch_size // parts.size

    def run_and_free(model, name: str, seq, targets) -> tuple[dict, dict]:
        terms, logits = method.run_pass(model, name, seq, targets, score)
        scaler.scale(method.total_loss(cfg, **terms) / num_parts).backward()
        return {name: term.detach() for name, term in terms.items()}, logits

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg.lr, cfg.warmup, cfg.steps, cfg.decay_fraction)
    optimizer.zero_grad()
    means: dict[str, torch.Tensor] = {}
    for number, rows, batch in parts.of_step(step):
        torch.manual_seed(keyed_seed(cfg.seed, "dropout", step, number * parts.size))  # dropout alone uses it
        rng = partial(batch_uniform, model.device, cfg.batch_size, rows, cfg.seed, step)
        _, terms = method.losses(model, task, batch, rng, run_and_free)
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term / num_parts
    distributed.all_reduce_sum([p.grad for p in model.parameters() if p.grad is not None] + list(means.values()))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()  # the only wait for the device
    if math.isfinite(norm):
        scaler.step(optimizer)
        scaler.update()
    else:
        scaler.update(scaler.get_scale() / 2)
    return task, means, norm


@torch.no_grad()
def update_ema(averaged: MAGVLT, model: MAGVLT, decay: float) -> None:
    """averaged = decay x averaged + (1 - decay) x model, weight by weight."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
