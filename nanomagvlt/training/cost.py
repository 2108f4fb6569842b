"""The cost of a training run before it starts: computed (train.py --dry-run) and measured (train.py --benchmark).

Computed: operations are counted by PyTorch's FlopCounterMode, in an update of tensors that have a shape but no content.
Memory is what stays: weights, their gradients, AdamW's two moments and the moving average, 4 bytes a number each; and
what one forward pass keeps for its backward pass, found by tracing such a pass. Temporary tensors come on top: leave a
tenth of the memory free.

Measured: some updates of each task on this machine, with these settings and this number of processes, on random pairs
with captions of full length. Not included: BPE, validation, samples and saves.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanomagvlt.config import Config
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.objectives import DTYPE
from nanomagvlt.sequence import KIND
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.training.distributed import rank, world_size
from nanomagvlt.training.loop import optimizer_for, scaler_for
from nanomagvlt.training.update import Parts, compiled_score, method_of, update_ema, update_model

GIB = 2 ** 30


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(calls: list[Callable], device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """The median seconds of each call, over `repeats` rounds in which they take turns, after warm-up rounds."""
    times = [[] for _ in calls]
    for i in range(warm_up + repeats):
        for call, taken in zip(calls, times):
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if i >= warm_up:
                taken.append(time.perf_counter() - started)
    return [median(taken) for taken in times]


def matmul_flops(device: torch.device, precision: str) -> float:
    """Operations a second in the product of two square matrices in cfg.precision: 8192 on a GPU, 1024 on a CPU."""
    n, dtype = 8192 if device.type == "cuda" else 1024, DTYPE[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n ** 3 / medians([lambda: a @ b], device, 5)[0]


def count_flops(call: Callable) -> int:
    """Multiplications and additions in the matrix products of call(), by PyTorch's counter. On a CPU the counter sees
    attention only where it is written out: hence SDPBackend.MATH."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def empty_losses(cfg: Config, task: str, pairs: int,
                 text_length: int | None = None) -> tuple[MAGVLT, Callable[[], torch.Tensor]]:
    """Inside a FakeTensorMode: a model, and a function that computes its loss on pairs without content."""
    model, n, t = MAGVLT(cfg), cfg.image_tokens, text_length or cfg.text_length
    sizes = {"joined_image_tokens": (n,), "other_text_tokens": (t,), "other_text_lengths": ()}
    sizes |= {f"{piece}_lengths": () for piece in KIND}
    sizes |= {f"{piece}_tokens": (n if kind == "image" else t,) for piece, kind in KIND.items()}
    batch = {name: torch.zeros(pairs, *size, dtype=torch.long) for name, size in sizes.items()}
    batch |= {name: torch.zeros(pairs, dtype=torch.bool) for name in ("is_first", "is_stacked")}
    return model, lambda: method_of(cfg).losses(model, task, batch, lambda _, *shape: torch.rand(pairs, *shape))[0]


def flops_of_update(cfg: Config, task: str, text_length: int | None = None) -> int:
    """Operations of one pair in an update of a task, forward and backward. None: a caption of full length."""
    with FakeTensorMode():
        _, loss = empty_losses(cfg, task, 1, text_length)
        return count_flops(lambda: loss().backward())


def activation_bytes(cfg: Config, task: str, pairs: int) -> int:
    """What one pass keeps for its backward pass, without weights but with their copies in half precision."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor
    with FakeTensorMode():
        model, loss = empty_losses(dataclasses.replace(cfg, unroll_mask=False, mixsel="off", length_pass="main"), task,
                                   pairs)
        for block in model.blocks:  # attention with dropout keeps more on a CPU than a GPU's kernels do
            block.attention.dropout = 0.0
        of_weights = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss()
    return sum(kept.values())


def report(cfg: Config) -> str:
    """Parameters, operations and memory of a training run, as text."""
    with torch.device("meta"):
        parameters = num_parameters(MAGVLT(cfg))
    least, most = (cfg.batch_size * sum(share * flops_of_update(cfg, task, length)
                                        for task, share in cfg.task_shares.items())
                   for length in (min(cfg.text_bucket, cfg.text_length), cfg.text_length))
    pairs = cfg.micro_batch or cfg.batch_size
    one, two = (max(activation_bytes(cfg, task, n) for task in cfg.task_shares) for n in (1, 2))
    state = (24 if world_size() > 1 else 20) * parameters  # several processes sum their gradients in one more copy
    activations = one + (pairs - 1) * (two - one)
    return "\n".join([
        f"parameters   {parameters:,}",
        f"operations   {most / 1e15:.3g} PFLOP an update of {cfg.batch_size:,} pairs, {least / 1e15:.3g} if captions "
        f"fill {cfg.text_bucket} positions; {cfg.steps:,} updates",
        f"memory       {(state + activations) / GIB:.3g} GiB, and leave a tenth free: {state / GIB:.3g} for weights, "
        f"gradients, moments and the average,\n             {activations / GIB:.3g} for {pairs} pairs at a time "
        f"({(two - one) / 2 ** 20:.0f} MiB each; a smaller --micro-batch needs less)",
    ])


class RandomPairs:
    """Replaces a TokenCache: random image tokens, and captions that fill all text positions."""

    def __init__(self, cfg: Config):
        self.cfg, self.partners = cfg, np.broadcast_to(np.int32(1), 2 ** 40)

    def rows_of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        return np.arange(step * batch_size, (step + 1) * batch_size)

    def tokens_of(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        n = self.cfg.image_tokens
        tokens = np.random.default_rng(rows.tolist()).integers(self.cfg.codebook_size, size=(len(rows), 2 * n))
        return torch.from_numpy(tokens).split(n, dim=1)

    def captions(self, rows: np.ndarray) -> list[str]:
        return ["a " * self.cfg.text_length] * len(rows)


def benchmark(cfg: Config, device: torch.device, updates: int) -> Iterator[str]:
    """Lines of text: the speed of `updates` updates of each task, after one that is not timed, of all processes
    together; on a GPU also the memory, and how often an update waits for it; and a profile of an update of two parts.
    All processes must take all lines."""
    torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(0)
    rate = world_size() * matmul_flops(device, cfg.precision)
    model = MAGVLT(cfg).to(device)
    averaged, optimizer = copy.deepcopy(model).requires_grad_(False), optimizer_for(model, cfg, cfg.lr)
    scaler = scaler_for(cfg, device)
    score, steps = compiled_score(cfg), count()
    few = min(cfg.batch_size, 2 * (cfg.micro_batch or cfg.batch_size) * world_size())  # one would be another graph
    whole, short = (Parts(dataclasses.replace(cfg, batch_size=pairs), RandomPairs(cfg), BPE([]), device)
                    for pairs in (cfg.batch_size, few))

    def update(task: str, parts: Parts = whole) -> float:
        """Its seconds."""
        synchronize(device)
        started = time.perf_counter()
        update_model(model, optimizer, scaler, dataclasses.replace(parts.cfg, task_weights={task: 1.0}), parts, score,
                     next(steps))
        update_ema(averaged, model, cfg.ema)
        synchronize(device)
        return time.perf_counter() - started

    yield f"{'':8}{'seconds':10}{'samples/s':12}{'TFLOP/s':10}of {rate / 1e12:.3g}, the rate of matrix products here"
    mean, commonest = 0.0, max(cfg.task_shares, key=cfg.task_shares.get)
    for task, share in cfg.task_shares.items():
        update(task)
        seconds = median(update(task) for _ in range(updates))
        reached = cfg.batch_size * flops_of_update(cfg, task) / seconds
        mean += share * seconds
        yield f"{task:8}{seconds:<10.3g}{cfg.batch_size / seconds:<12.4g}{reached / 1e12:<10.3g}{reached / rate:.0%}"
    yield (f"{cfg.steps:,} updates, {cfg.batch_size / mean:,.4g} samples/s: {mean * cfg.steps / 3600:,.1f} hours, and "
           "the time of validation and samples")
    if device.type == "cuda":
        yield (f"memory: {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB at most; an update waits for the GPU "
               f"{count_waits(lambda: update(commonest))} times")
    with torch.profiler.profile() as profiler:
        update(commonest, short)
    if rank() == 0:
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        yield profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)


def count_waits(update: Callable) -> int:
    """How often the CPU waits for the GPU in an update, its end excepted. Once is right: for the gradient's norm."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        update()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)
