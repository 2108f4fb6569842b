"""Appendix - What a run will cost, before anything is spent: python train.py --preset base --dry-run

Operations are counted from the sizes (see operations_of_update() in update.py). Memory is what stays: weights, their
gradients, AdamW's two moments and the moving average, 4 bytes a number each; and what the forward pass keeps for the
backward pass, which is found out by tracing one pass with tensors that have a shape but no content. What comes and
goes on top of that is not in it: leave a tenth to spare.
"""
import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanomagvlt import parallel
from nanomagvlt.config import Config
from nanomagvlt.model import MAGVLT, num_parameters
from nanomagvlt.sequence import TASKS
from nanomagvlt.speed import matrix_rate
from nanomagvlt.update import method_of, operations_of_update

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


def budget(cfg: Config, device: torch.device) -> str:
    """Parameters, operations, memory and hours of a training run, as text."""
    with torch.device("meta"):
        parameters = num_parameters(MAGVLT(cfg))
    tasks = [(task, weight / sum(cfg.task_weights)) for task, weight in zip(TASKS, cfg.task_weights) if weight]
    an_update = cfg.batch_size * sum(share * operations_of_update(cfg, task, cfg.text_length) for task, share in tasks)
    at_once = cfg.micro_batch or cfg.batch_size
    one, two = (max(activation_bytes(cfg, task, pairs) for task, _ in tasks) for pairs in (1, 2))
    state, pair = 20 * parameters, two - one
    activations = one + (at_once - 1) * pair
    if parallel.world() > 1:
        state += 4 * parameters  # the gradients in one piece, to be added up
    torch.set_float32_matmul_precision("high")  # as train.py
    rate = matrix_rate(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    seconds = an_update / (REACHED * rate * parallel.world())
    gib = 2 ** 30
    return "\n".join([
        f"parameters   {parameters:,}",
        f"operations   {an_update / 1e15:.3g} PFLOP an update of {cfg.batch_size:,} pairs, {cfg.steps:,} updates",
        f"memory       {(state + activations) / gib:.1f} GiB and a tenth to spare: {state / gib:.1f} for weights, "
        f"gradients, moments and the average,\n             {activations / gib:.1f} for {at_once} pairs at a time "
        f"({pair / 2 ** 20:.0f} MiB each; --micro-batch makes it fewer)",
        f"hours        {seconds * cfg.steps / 3600:,.1f} on {parallel.world()} x {device}, {seconds:,.3g} s an update, "
        f"if {REACHED:.0%} of {rate / 1e12:,.3g} TFLOP/s are reached,\n             what multiplying matrices was "
        f"measured at in {cfg.precision} just now",
    ])
