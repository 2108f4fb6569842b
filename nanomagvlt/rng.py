"""Appendix - Randomness: a function of (seed, step, purpose), never of what happened before.

So the same seed repeats a run, a resumed run is the run that was not interrupted, and nothing random is kept in a
checkpoint. Everything that is drawn anywhere has a key: (seed, "task", step), say.
"""
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def keyed_seed(*key) -> int:
    """A seed in [0, 2^63) made of anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator that always starts the same for the same key."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def batch_uniform(device: torch.device, batch_size: int, part: slice, seed: int, step: int | str, purpose: str,
                  *shape: int) -> Tensor:
    """The `uniform` of objectives.py: numbers (b, *shape) in [0, 1), a part of those of the batch (B, *shape), which
    depend on seed, update and purpose. They are drawn on the device, so that it need not wait for them."""
    generator = torch.Generator(device).manual_seed(keyed_seed(seed, step, purpose))
    return torch.rand(batch_size, *shape, generator=generator, device=device)[part]


def random_rows(generator: torch.Generator | Iterator[torch.Generator], rows: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows, count), all from one generator, row after row.

    Or each row from the next of several: what it becomes does then not depend on who else is in the batch.
    """
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, count, generator=generator)
    return torch.stack([torch.rand(count, generator=next(generator)) for _ in range(rows)])
