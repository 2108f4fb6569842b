"""Several processes, one run: each computes its share of every update, and the gradients are summed.

`torchrun --nproc_per_node=8 train.py ...` starts the processes and puts their numbers into the environment. Without
torchrun there is one process, and these functions do nothing. The model is not wrapped: an update's gradients are
summed once, when all its parts are done. So weights without a gradient in some task need no special care.
"""
import argparse
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def local_device(device: str) -> str:
    """The device of this process: under torchrun, auto and cuda mean its own GPU, if there is one.

    Raises ValueError where all processes would share one GPU.
    """
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {device} under torchrun: give cuda, and each process takes its own GPU")
    if "LOCAL_RANK" in os.environ and (device == "cuda" or device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def begin(device: torch.device) -> None:
    """Joins the other processes, if torchrun started any."""
    if "LOCAL_RANK" not in os.environ:
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # The timeout is long because the others wait while the first process prepares data, validates and saves.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12),
                            device_id=device if on_gpu else None)


def rank() -> int:
    """The number of this process. The first, 0, writes all files and prints all output."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensors: list[torch.Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def all_reduce_any(flag: bool, device: torch.device) -> bool:
    """Whether the flag is True in any process."""
    if world_size() == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total)


def barrier() -> None:
    """Waits until all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def end() -> None:
    """Leaves the group of processes, after the last message."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(status: int) -> None:
    """Ends this process after an error.

    The others may be waiting for it in the middle of an update, and a regular end would wait for them. So it ends at
    once, and torchrun then ends the others.
    """
    if world_size() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def print_rank0(line: str) -> None:
    """Prints, in the first process only."""
    if rank() == 0:
        print(line, flush=True)


def parse_part(text: str) -> tuple[int, int]:
    """'3/8' -> (2, 8)."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 3/8")
    return int(number) - 1, int(total)


def share_of_work(part: tuple[int, int] | None, device: str) -> tuple[tuple[int, int] | None, str]:
    """The share of a job without gradients that this process does (None: all of it), and its device.

    It is `part` or, under torchrun, this process's own. Such processes exchange no messages: finished work lies in
    files. Raises ValueError if there is both a part and torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if part:
            raise ValueError("--part under torchrun: give one of them")
        part, device = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), local_device(device)
    return part, device
