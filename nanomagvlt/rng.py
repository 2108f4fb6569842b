"""Randomness: a function of a key such as (seed, step, purpose), never of what happened before.

So the same seed repeats a run, a resumed run equals the run that was not interrupted, and a checkpoint holds no random
state. (New weights and dropout use PyTorch's global generator. Training seeds it by a key: once for the weights, and
for dropout before each part of a batch.) Read on in io.py.
"""
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# rng(purpose, *shape) -> uniform numbers in [0, 1), (B, *shape). Within one update a purpose always gives the same
# numbers; for a part of a batch, the rows of that part.
Rng = Callable[..., Tensor]


def keyed_seed(*key) -> int:
    """A seed in [0, 2^63) for a key of anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator in a state that depends on the key alone."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def batch_uniform(device: torch.device, batch_size: int, part: slice | Tensor, seed: int, step: int | str,
                  purpose: str, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), drawn as (B, *shape) for the whole batch and cut to the rows `part`: (b, *shape).

    They depend on seed, step (an update, or a name such as "val 0") and purpose. They are drawn on the device, so that
    it does not wait for them.
    """
    generator = torch.Generator(device).manual_seed(keyed_seed(seed, step, purpose))
    return torch.rand(batch_size, *shape, generator=generator, device=device)[part]


def random_rows(generator: torch.Generator | Iterator[torch.Generator], rows: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows, count), drawn row after row from one generator.

    From an iterator of generators each row takes the next: then a row does not depend on the rest of the batch.
    """
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, count, generator=generator)
    return torch.stack([torch.rand(count, generator=next(generator)) for _ in range(rows)])
