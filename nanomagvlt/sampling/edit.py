"""Appendix - What is to be made anew: regions and masks of images, [MASK] in texts.

Everything here ends as `to_fill`, True where a token is to be made: that is all that decode.py wants to know. A token
stands for a square patch of pixels, and is made anew if any of its pixels is to be.

Shapes: B batch, S image side, N image tokens on G x G, T text tokens.
"""
import re

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from nanomagvlt.tokenizers.bpe import BPE

MASK_WORD = re.compile(r"\[MASK(?::([1-9]\d{0,2}))?\]")


def region(size: tuple[int, int], box: tuple[int, ...]) -> Image.Image:
    """A mask of an image of size (width, height), white in the box x0, y0, x1, y1 (pixels, the last ones excluded).

    Raises ValueError for a box that is empty or leaves the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise ValueError(f"region {x0},{y0},{x1},{y1} is no x0,y0,x1,y1 within {size[0]} x {size[1]} pixels")
    mask = Image.new("RGB", size)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    return mask


def mask_to_positions(mask: Image.Image, grid: int) -> Tensor:
    """Where tokens are to be made anew, (N,) bool: where a mask, cut square like its image, has any white pixel."""
    width, height = mask.size
    side = min(width, height)
    ys, xs = np.nonzero(np.asarray(mask.convert("L")) > 127)
    ys, xs = ys - (height - side) / 2, xs - (width - side) / 2
    inside = (ys >= 0) & (ys < side) & (xs >= 0) & (xs < side)
    places = torch.zeros(grid, grid, dtype=torch.bool)                                               # (G, G)
    places[(ys[inside] * grid / side).astype(int), (xs[inside] * grid / side).astype(int)] = True
    return places.flatten()


def centre_positions(grid: int) -> Tensor:
    """The paper's region (section 4.2): the middle half of the rows and columns, (N,) bool."""
    middle = torch.arange(grid)
    middle = (middle >= grid // 4) & (middle < grid - grid // 4)                                     # (G,)
    return (middle[:, None] & middle).flatten()


def random_positions(num_places: int, share: float, batch: int, generator: torch.Generator) -> Tensor:
    """A random choice of round(share x N) places, at least 1, another one in every row: (B, N) bool."""
    rank = torch.rand(batch, num_places, generator=generator).argsort(1).argsort(1)
    return rank < max(1, round(share * num_places))


def blend(original: np.ndarray, painted: np.ndarray, to_fill: Tensor) -> np.ndarray:
    """original (S, S, 3) where it is kept, painted (B, S, S, 3) where it was made anew, with a soft edge, all uint8, by
    to_fill (B, N).

    out = m x original + (1 - m) x painted, m the keep mask enlarged to S x S and blurred with a Gaussian of radius
    15 at S = 256, less at smaller sizes (section 4.2; the released code makes m and does not use it).
    """
    side, grid = len(original), round(to_fill.shape[1] ** 0.5)
    keep = ((~to_fill).view(-1, grid, grid).numpy() * np.uint8(255))
    soft = [Image.fromarray(m).resize((side, side), Image.Resampling.NEAREST)
            .filter(ImageFilter.GaussianBlur(15 * side / 256)) for m in keep]
    m = np.stack([np.asarray(image) for image in soft])[..., None] / 255                             # (B, S, S, 1)
    return (m * original + (1 - m) * painted).round().astype(np.uint8)


def read_masked_text(text: str, bpe: BPE, text_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """"a [MASK] circle" -> text_tokens (T,), their number with the end token (), and where to fill (T,) bool.

    [MASK] stands for one token, [MASK:3] for three. Raises ValueError where nothing is to be filled, or where it is
    more than text_length tokens.
    """
    ids, to_fill, end = [], [], 0
    for found in MASK_WORD.finditer(text):
        words, count = bpe.encode(text[end:found.start()]), int(found[1] or 1)
        ids, to_fill = ids + words + [bpe.end] * count, to_fill + [False] * len(words) + [True] * count
        end = found.end()
    ids = ids + bpe.encode(text[end:]) + [bpe.end]
    to_fill = to_fill + [False] * (len(ids) - len(to_fill))
    if "[MASK" in MASK_WORD.sub("", text):
        raise ValueError(f"{text!r}: write [MASK] for one token, [MASK:3] for three, up to [MASK:999]")
    if not any(to_fill):
        raise ValueError(f"{text!r} has no [MASK]: put one where a word is missing, [MASK:3] for three tokens")
    if len(ids) > text_length:
        raise ValueError(f"{text!r} has {len(ids)} tokens with its end: at most {text_length} fit")
    padding = text_length - len(ids)
    return (torch.tensor(ids + [bpe.end] * padding), torch.tensor(len(ids)),
            torch.tensor(to_fill + [False] * padding))


def word_positions(bpe: BPE, prompt: str, word: str) -> range:
    """Where the tokens of a word, or of several in a row, stand among those of a prompt; case does not matter.

    Raises ValueError where they are not in it.
    """
    found = re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)
    if not word.strip() or not found:
        raise ValueError(f"{word!r} is no word of {prompt!r}")
    first = len(bpe.encode(prompt[:found.start()]))
    return range(first, first + len(bpe.encode(found[0])))


def centre_words(lengths: Tensor, text_length: int) -> Tensor:
    """The paper's infilling: of n tokens, the end token not counted, n // 2 in the middle: (B,) -> (B, T) bool."""
    n = lengths[:, None] - 1                                                                         # (B, 1)
    start, place = n // 2 - n // 2 // 2, torch.arange(text_length, device=lengths.device)
    return (place >= start) & (place < start + n // 2)
