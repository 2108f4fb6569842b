"""Appendix - One update of the transformer: its task, its samples, its masks, and what they cost.

All chance in it is a function of (seed, update, purpose), never of what happened before: so a resumed run is the run
that was not interrupted. A batch may be computed in parts of `micro_batch` pairs, one after the other, on one process
or on several: a part's samples, masks and MixSel partners are the same wherever it is computed, and means are over the
whole batch. So one, two or four processes do the same update.

B is the whole batch, b a part of it.
"""
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from nanomagvlt import argvlt, objectives
from nanomagvlt.training import distributed
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.rng import batch_uniform, keyed_generator, keyed_seed
from nanomagvlt.config import Config
from nanomagvlt.data.cache import TokenCache, make_batch, rows_of_step
from nanomagvlt.training.loop import learning_rate
from nanomagvlt.model import MAGVLT, operations
from nanomagvlt.sequence import TASKS
from nanomagvlt.evaluation.speed import matmul_flops


def method_of(cfg: Config):
    """The module that holds the method's one_pass(), loss_terms(), num_scored() and total_loss()."""
    return argvlt if cfg.model == "argvlt" else objectives


def compiled_pass(cfg: Config) -> Callable:
    """The method's one_pass(), compiled if cfg wants it: all passes of an update go through it."""
    one_pass = method_of(cfg).one_pass
    return torch.compile(one_pass, fullgraph=True) if cfg.compile else one_pass


def draw_task(cfg: Config, step: int) -> str:
    """The task of an update, T2I : I2T : IT2IT as task_weights; the same wherever it is asked for."""
    weights = torch.tensor(cfg.task_weights)
    return TASKS[int(torch.multinomial(weights, 1, generator=keyed_generator(cfg.seed, "task", step)))]


class Parts:
    """The parts of each batch that this process computes. The next update's are made in a thread while one is used."""

    def __init__(self, cfg: Config, cache: TokenCache, bpe: BPE, device: torch.device):
        self.cfg, self.cache, self.bpe, self.device = cfg, cache, bpe, device
        self.thread, self.coming = ThreadPoolExecutor(1), {}

    def of_step(self, step: int) -> list[tuple[slice, dict[str, torch.Tensor]]]:
        """[(which rows of the batch, its tensors)], as make_batch() gives them."""
        coming: Future = self.coming.pop(step, None) or self.thread.submit(self.make, step)
        self.coming = {step + 1: self.thread.submit(self.make, step + 1)}
        self.num_texts = [batch["text_tokens"].shape[1] for _, batch in coming.result()]  # T of each, for the meter
        return [(part, {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()})
                for part, batch in coming.result()]

    def make(self, step: int) -> list[tuple[slice, dict[str, torch.Tensor]]]:
        cfg, size = self.cfg, self.cfg.micro_batch or self.cfg.batch_size
        rows = rows_of_step(step, cfg.batch_size, len(self.cache), cfg.seed)                         # (B,)
        parts = [slice(i, i + size) for i in range(0, cfg.batch_size, size)][distributed.rank()::distributed.world_size()]
        batches = [make_batch(self.cache, self.bpe, rows[part], cfg, cfg.bpe_dropout,
                              (cfg.seed, "bpe dropout", step, part.start)) for part in parts]
        if self.device.type == "cuda":  # from pinned memory they are copied while the GPU works
            batches = [{name: tensor.contiguous().pin_memory() for name, tensor in batch.items()} for batch in batches]
        return list(zip(parts, batches))


def update_model(model: MAGVLT, optimizer: torch.optim.Optimizer, cfg: Config, parts: Parts, one_pass: Callable,
                 step: int) -> tuple[str, dict[str, torch.Tensor], float]:
    """One update of one task, which is drawn here: the task, its loss terms, and the gradient's norm.

    one_pass is compiled_pass(). Where the norm is not finite nothing is changed: all processes agree, since
    what one of them has in its gradient, all have in the sum.
    """
    task, method, device = draw_task(cfg, step), method_of(cfg), model.device
    mine = [(part, batch, partial(batch_uniform, device, cfg.batch_size, part, cfg.seed, step))
            for part, batch in parts.of_step(step)]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg.lr, cfg.warmup, cfg.steps, cfg.decay_fraction)
    counts = None
    if len(mine) * distributed.world_size() > 1:  # the means are over what all parts score
        each = [method.num_scored(task, batch, uniform, cfg) for _, batch, uniform in mine]
        counts = {name: sum(count[name] for count in each) for name in each[0]}
        distributed.all_reduce_sum(list(counts.values()))

    optimizer.zero_grad()
    terms = {}
    for part, batch, uniform in mine:
        torch.manual_seed(keyed_seed(cfg.seed, "dropout", step, part.start))  # dropout alone uses the global generator
        for of_a_pass in method.loss_terms(model, task, batch, uniform, counts, one_pass):
            method.total_loss(task, cfg, **of_a_pass).backward()  # part by part of the sum: one graph lives at a time
            for name, term in of_a_pass.items():
                terms[name] = terms.get(name, 0.0) + term.detach()
    distributed.all_reduce_sum([p.grad for p in model.parameters() if p.grad is not None] + list(terms.values()))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()  # the one wait for the device
    if math.isfinite(norm):
        optimizer.step()
    return task, terms, norm


@torch.no_grad()
def update_ema(averaged: MAGVLT, model: MAGVLT, decay: float) -> None:
    """averaged = decay x averaged + (1 - decay) x model, weight by weight."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def operations_of_update(cfg: Config, task: str, num_text: int) -> int:
    """Multiplications and additions in the matrices, forward and backward, of one pair, its text padded to num_text."""
    n = cfg.image_tokens

    def a_pass(t: int, scores: bool = True) -> int:
        length = n + t + 4
        image = operations(cfg, 0, 0, n, cfg.codebook_size) if task != "i2t" or cfg.model == "argvlt" else 0
        text = operations(cfg, 0, 0, t, cfg.text_vocab) if task != "t2i" or cfg.model == "argvlt" else 0
        return operations(cfg, length, length, 0, 0) + scores * (image + text)
    forward = a_pass(num_text)
    if cfg.unroll_mask and task != "it2it":
        forward += a_pass(num_text)
    if cfg.mixsel != "off":
        joined = min(cfg.text_length, 2 * (num_text - 1) + cfg.mixsel_separators + 1)
        forward += a_pass(num_text if task == "i2t" else joined)
    if cfg.length_pass == "own" and cfg.model == "magvlt" and task != "t2i":
        forward += a_pass(cfg.length_positions, scores=False)
    return 3 * forward  # backward costs twice the forward pass


class Meter:
    """What the progress bar says: each task's last losses, and how fast training is beside what the machine can do."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device, self.recent = cfg, device, {}
        self.matmul_flops = matmul_flops(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
        self.operations, self.pairs, self.seconds = 0, 0, 0.0

    def count(self, task: str, num_texts: list[int], seconds: float) -> None:
        """One update: the parts of this process, and how long it took."""
        size = self.cfg.micro_batch or self.cfg.batch_size
        self.operations += size * sum(operations_of_update(self.cfg, task, num_text) for num_text in num_texts)
        self.pairs += self.cfg.batch_size
        self.seconds += seconds

    def read(self, task: str, values: dict[str, float]) -> str:
        """Since the last reading; samples of all processes, operations of this one."""
        seconds = max(1e-9, self.seconds)
        rate = self.operations / seconds
        self.recent[task] = f"{task} " + " ".join(f"{value:.3f}" for value in values.values())
        text = (f"{', '.join(sorted(self.recent.values()))}, {self.pairs / seconds:.0f} samples/s, "
                f"{rate / 1e12:.3g} TFLOP/s, {rate / self.matmul_flops:.0%} of what matrices reach here")
        if self.device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(self.device) / 2 ** 30:.1f} GiB"
        self.operations, self.pairs, self.seconds = 0, 0, 0.0
        return text
