"""Fixtures of several tests: a model small enough to run in milliseconds, and the shared real data, if present."""
import os
import zlib
from pathlib import Path

import pytest
import torch

from nanomagvlt.config import Config
from nanomagvlt.model import MAGVLT

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project, on the build machines."""
    if not SHARED.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED} is absent, and CI must not skip its tests")
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def cfg() -> Config:
    """N = 4 image tokens, T = 6 text positions, D = 16."""
    return Config(image_size=16, text_length=6, length_positions=4, codebook_size=12, codebook_dim=4, text_vocab=20,
                  vq_channels=8, vq_multipliers=(1, 1, 2, 2), vq_latent=8, vq_groups=4, layers=2, width=16, heads=2,
                  init_std=0.3, zero_outputs=False, text_window=3, length_rows=0, batch_size=16,
                  image_steps=4).check()


@pytest.fixture
def model(cfg) -> MAGVLT:
    torch.manual_seed(0)
    return MAGVLT(cfg).eval()


@pytest.fixture
def batch(cfg) -> dict[str, torch.Tensor]:
    """Five random pairs, their captions of different lengths."""
    g = torch.Generator().manual_seed(1)
    return {"image_tokens": torch.randint(cfg.codebook_size, (5, cfg.image_tokens), generator=g),
            "joined_image_tokens": torch.randint(cfg.codebook_size, (5, cfg.image_tokens), generator=g),
            "is_first": torch.tensor([True, False, True, False, True]),
            "is_stacked": torch.tensor([True, True, False, False, False]),
            "other_text_tokens": torch.randint(cfg.text_vocab, (5, cfg.text_length), generator=g),
            "other_text_lengths": torch.tensor([6, 5, 3, 2, 1]),
            "text_tokens": torch.randint(cfg.text_vocab, (5, cfg.text_length), generator=g),
            "text_lengths": torch.tensor([1, 2, 3, 5, 6])}


@pytest.fixture
def rng(batch):
    """The rng of losses(): the same numbers for the same purpose."""
    def numbers(purpose: str, *shape: int) -> torch.Tensor:
        seed = zlib.crc32(purpose.encode())
        return torch.rand(len(batch["text_lengths"]), *shape, generator=torch.Generator().manual_seed(seed))
    return numbers
