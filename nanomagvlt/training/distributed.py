"""Appendix - Several processes, one run: each computes its share of every update, and gradients are added up.

`torchrun --nproc_per_node=8 train.py ...` starts them and says to each, in its environment, who it is. Without torchrun
there is one, and nothing here does anything. The model is not wrapped: an update's gradients are summed once, in one
piece, when all of its parts are done. So it does not matter that some weights have no gradient in some tasks.
"""
import argparse
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def local_device(device: str) -> str:
    """auto and cuda are, under torchrun, this process's own GPU, if there is one. Raises ValueError where all would
    share one."""
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {device} under torchrun: give cuda, and each process takes its own")
    if "LOCAL_RANK" in os.environ and (device == "cuda" or device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def begin(device: torch.device) -> None:
    """Joins the others, if torchrun started them, to compute on this device."""
    if "LOCAL_RANK" not in os.environ:
        return
    # The others wait while the first writes, validates and draws: let them.
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12),
                            device_id=device if on_gpu else None)


def rank() -> int:
    """Which process this is: the first, 0, writes all files and says all there is to say."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensors: list[torch.Tensor]) -> None:
    """Each becomes its sum over all processes, in place."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def all_reduce_any(flag: bool, device: torch.device) -> bool:
    """Does it hold in any process?"""
    if world_size() == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total)


def barrier() -> None:
    """Until all have come here."""
    if world_size() > 1:
        dist.barrier()


def end() -> None:
    """Takes leave of the others, who do the same."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(status: int) -> None:
    """Ends this process after an error. The others may be waiting for it in the middle of an update, and taking leave
    of them would wait, too: so it ends at once, and torchrun then ends the others."""
    if world_size() == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------------------------------------- work in shares

def of_many(text: str) -> tuple[int, int]:
    """'3/8' -> (2, 8)."""
    number, _, many = text.partition("/")
    if not (number.isdecimal() and many.isdecimal() and 1 <= int(number) <= int(many)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 3/8")
    return int(number) - 1, int(many)


def share_of_work(part: tuple[int, int] | None, device: str) -> tuple[tuple[int, int] | None, str]:
    """Which share of a job without gradients is done here, and on what: the part asked for, or what torchrun says.

    None is all of it. Such processes never speak to each other: what each has finished lies in files. Raises ValueError
    where both are said.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if part:
            raise ValueError("--part under torchrun: give one of them")
        part, device = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), local_device(device)
    return part, device
