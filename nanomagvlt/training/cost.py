"""Appendix - What a run will cost, before it is begun: computed (--dry-run), and measured (--benchmark).

Computed: operations are counted from the sizes (see operations_of_update() in update.py). Memory is what stays:
weights, their gradients, AdamW's two moments and the moving average, 4 bytes a number each; and what the forward pass
keeps for the backward pass, which is found out by tracing one pass with tensors that have a shape but no content. What
comes and goes on top of that is not in it: leave a tenth to spare.

Measured: some updates of each task, on this machine and with these settings, on as many processes as there are; of
made-up pairs, so that neither data nor tokenizers are wanted. The updates are those of training, with the longest
captions there can be; what is not in them is cutting captions into tokens, validation, samples and saves.
"""
import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from statistics import median

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType

from nanomagvlt.training import distributed
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import Config
from nanomagvlt.training.loop import optimizer_for
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.sequence import TASKS
from nanomagvlt.evaluation.speed import matmul_flops, wait
from nanomagvlt.training.update import Parts, update_ema, compiled_pass, method_of, operations_of_update, update_model

REACHED = 0.5  # the share of the measured matrix rate that a good training step reaches


def activation_bytes(cfg: Config, task: str, pairs: int) -> int:
    """What one pass keeps for the backward pass, weights aside but not their copies in bfloat16."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor
    with FakeTensorMode():
        model = MAGVLT(dataclasses.replace(cfg, unroll_mask=False, mixsel="off", length_pass="main"))
        for block in model.blocks:  # with dropout in it, attention on a CPU keeps what a GPU's kernels do not
            block.attention.dropout = 0.0
        of_weights = {p.untyped_storage()._cdata for p in model.parameters()}
        batch = {"image_tokens": torch.zeros(pairs, cfg.image_tokens, dtype=torch.long),
                 "text_tokens": torch.zeros(pairs, cfg.text_length, dtype=torch.long),
                 "text_lengths": torch.zeros(pairs, dtype=torch.long)}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            next(method_of(cfg).loss_terms(model, task, batch, lambda purpose, *shape: torch.rand(pairs, *shape)))
    return sum(kept.values())


def report(cfg: Config, device: torch.device) -> str:
    """Parameters, operations, memory and hours of a training run, as text."""
    with torch.device("meta"):
        parameters = num_parameters(MAGVLT(cfg))
    tasks = [(task, weight / sum(cfg.task_weights)) for task, weight in zip(TASKS, cfg.task_weights) if weight]
    an_update = cfg.batch_size * sum(share * operations_of_update(cfg, task, cfg.text_length) for task, share in tasks)
    at_once = cfg.micro_batch or cfg.batch_size
    one, two = (max(activation_bytes(cfg, task, pairs) for task, _ in tasks) for pairs in (1, 2))
    state, pair = 20 * parameters, two - one
    activations = one + (at_once - 1) * pair
    if distributed.world_size() > 1:
        state += 4 * parameters  # the gradients in one piece, to be added up
    torch.set_float32_matmul_precision("high")  # as train.py
    rate = matmul_flops(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    seconds = an_update / (REACHED * rate * distributed.world_size())
    gib = 2 ** 30
    return "\n".join([
        f"parameters   {parameters:,}",
        f"operations   {an_update / 1e15:.3g} PFLOP an update of {cfg.batch_size:,} pairs, {cfg.steps:,} updates",
        f"memory       {(state + activations) / gib:.3g} GiB and a tenth to spare: {state / gib:.3g} for weights, "
        f"gradients, moments and the average,\n             {activations / gib:.3g} for {at_once} pairs at a time "
        f"({pair / 2 ** 20:.0f} MiB each; --micro-batch makes it fewer)",
        f"hours        {seconds * cfg.steps / 3600:,.1f} on {distributed.world_size()} x {device}, {seconds:,.3g} s an update, "
        f"if {REACHED:.0%} of {rate / 1e12:,.3g} TFLOP/s are reached,\n             what multiplying matrices was "
        f"measured at in {cfg.precision} just now",
    ])


class MadeUpPairs:
    """In a TokenCache's place: random image tokens, and captions that fill all text places."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def __len__(self) -> int:
        return 100_000

    def tokens_of(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        n = self.cfg.image_tokens
        tokens = np.random.default_rng(rows.tolist()).integers(self.cfg.codebook_size, size=(len(rows), 2 * n))
        return torch.from_numpy(tokens).split((n, n // 2, n // 2), dim=1)

    def captions(self, rows: np.ndarray) -> list[str]:
        return ["a " * self.cfg.text_length] * len(rows)


def benchmark(cfg: Config, device: torch.device, updates: int) -> Iterator[str]:
    """Does so many updates of each task, after one that is not timed (torch.compile), and says line by line how fast
    they were, all processes together; on a GPU also the memory taken, and how often an update made the CPU wait for it.
    At last where the time goes in an update of two parts a process. All processes must take all lines."""
    torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(0)
    rate = distributed.world_size() * matmul_flops(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = MAGVLT(cfg).to(device)
    averaged, optimizer = copy.deepcopy(model).requires_grad_(False), optimizer_for(model, cfg, cfg.lr)
    one_pass, steps = compiled_pass(cfg), count()
    few = min(cfg.batch_size, 2 * (cfg.micro_batch or cfg.batch_size) * distributed.world_size())  # one would be another graph
    whole, short = (Parts(dataclasses.replace(cfg, batch_size=pairs), MadeUpPairs(cfg), BPE([]), device)
                    for pairs in (cfg.batch_size, few))

    def update(task: str, parts: Parts = whole) -> float:
        """Its seconds."""
        of_this_task = dataclasses.replace(parts.cfg, task_weights=tuple(float(name == task) for name in TASKS))
        wait(device)
        started = time.perf_counter()
        update_model(model, optimizer, of_this_task, parts, one_pass, next(steps))
        update_ema(averaged, model, cfg.ema)
        wait(device)
        return time.perf_counter() - started

    yield (f"{'':8}{'seconds':10}{'samples/s':12}{'TFLOP/s':10}of {rate / 1e12:.3g}, at which matrices are multiplied "
           "here")
    shares = {task: weight / sum(cfg.task_weights) for task, weight in zip(TASKS, cfg.task_weights) if weight}
    mean, commonest = 0.0, max(shares, key=shares.get)
    for task, share in shares.items():
        update(task)
        seconds = median(update(task) for _ in range(updates))
        reached = cfg.batch_size * operations_of_update(cfg, task, cfg.text_length) / seconds
        mean += share * seconds
        yield f"{task:8}{seconds:<10.3g}{cfg.batch_size / seconds:<12.4g}{reached / 1e12:<10.3g}{reached / rate:.0%}"
    yield (f"{cfg.steps:,} updates, {cfg.batch_size / mean:,.4g} samples/s: at most {mean * cfg.steps / 3600:,.1f} "
           "hours, and what validation and samples take")
    if device.type == "cuda":
        yield (f"memory: {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB at most; the CPU waits for the "
               f"GPU {waits(lambda: update(commonest))} times in an update")
    yield f"\n{'share':8}{'ms':10}{'times':8}what takes the time in {commonest}"
    if distributed.rank() == 0:
        yield from profiled(lambda: update(commonest, short), device)
    else:  # the others only take part
        update(commonest, short)


def waits(update: Callable) -> int:
    """How often the CPU waits for the GPU, the end aside. One is by design: the gradient's norm must be finite."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        update()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def profiled(update: Callable, device: torch.device, rows: int = 12) -> list[str]:
    """Where an update's time goes: the kernels that take most of it, on a GPU, or the operators, on a CPU."""
    on_gpu = device.type == "cuda"
    with torch.profiler.profile() as profiler:
        update()
    spent = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
             for event in profiler.key_averages()
             if not on_gpu or event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    total = sum(microseconds for microseconds, *_ in spent)
    return [f"{microseconds / total:<8.1%}{microseconds / 1000:<10.4g}{times:<8}{name[:80]}"
            for microseconds, times, name in sorted(spent, reverse=True)[:rows]]
