"""What to generate anew: regions and masks of images, [MASK] in texts.

Everything here ends in `to_fill`, a bool tensor that is True at each token to generate; decoding.py needs no more. An
image token stands for a square patch of pixels, and is generated if any of them is in the mask.

Shapes: B batch, S image side, N image tokens on G x G, T text tokens.
"""
import re

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from nanomagvlt.tokenizers.bpe import BPE

MASK_WORD = re.compile(r"(\[MASK(?::[1-9]\d{0,2})?\])")


def region(size: tuple[int, int], box: tuple[int, ...]) -> Image.Image:
    """A mask of size (width, height), white in the box x0, y0, x1, y1 (pixels; x1 and y1 are outside). Raises
    ValueError for an empty box and one that leaves the image."""
    if len(box) != 4 or not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        raise ValueError(f"--region {','.join(map(str, box))} must be x0,y0,x1,y1 within {size[0]} x {size[1]} pixels")
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def mask_to_positions(mask: Image.Image, grid: int, fit: str) -> Tensor:
    """(N,) bool: True at tokens with a white pixel in the mask, which is made square by `fit` as its image is."""
    size = np.array(mask.size[::-1])[:, None]                                                        # height and width
    square = {"crop": size.min(0), "pad": size.max(0), "squeeze": size}[fit]
    points = np.stack(np.nonzero(np.asarray(mask.convert("L")) > 127)) - (size - square) / 2         # y and x
    y, x = (points * grid / square)[:, ((points >= 0) & (points < square)).all(0)].astype(int)
    to_fill = torch.zeros(grid, grid, dtype=torch.bool)                                              # (G, G)
    to_fill[y, x] = True
    return to_fill.flatten()


def centre_positions(grid: int) -> Tensor:
    """The paper's region (section 4.2), the middle half of the rows and columns: (N,) bool."""
    middle = torch.arange(grid)
    middle = (middle >= grid // 4) & (middle < grid - grid // 4)                                     # (G,)
    return (middle[:, None] & middle).flatten()


def random_positions(num_positions: int, share: float, batch: int, generator: torch.Generator) -> Tensor:
    """round(share x N) random positions, at least 1, other ones in each row: (B, N) bool."""
    rank = torch.rand(batch, num_positions, generator=generator).argsort(1).argsort(1)               # (B, N)
    return rank < max(1, round(share * num_positions))


def blend(original: np.ndarray, generated: np.ndarray, to_fill: Tensor) -> np.ndarray:
    """The original (S, S, 3) or (B, S, S, 3) around the generated part of (B, S, S, 3), with a soft edge, all uint8.

    out = m x original + (1 - m) x generated, where m is the mask of kept tokens, ~to_fill (B, N), enlarged to S x S and
    blurred with a Gaussian of radius 15 at S = 256 (section 4.2; the released code computes m and does not use it).
    """
    side, grid = generated.shape[1], round(to_fill.shape[1] ** 0.5)
    kept = (~to_fill).view(-1, grid, grid).numpy() * np.uint8(255)
    blur = ImageFilter.GaussianBlur(15 * side / 256)
    soft = [Image.fromarray(m).resize((side, side), Image.Resampling.NEAREST).filter(blur) for m in kept]
    m = np.stack(soft)[..., None] / 255                                                              # (B, S, S, 1)
    return (m * original + (1 - m) * generated).round().astype(np.uint8)


def read_masked_text(text: str, bpe: BPE, text_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """"a [MASK] circle" -> text_tokens (T,), their number with the end token (), and to_fill (T,) bool.

    [MASK] is one token, [MASK:3] are three. Raises ValueError for a text without [MASK] or of more than T tokens."""
    parts, ids, to_fill = MASK_WORD.split(text), [], []                        # words, [MASK], words, [MASK:3], words
    if len(parts) == 1 or any("[MASK" in words for words in parts[::2]):
        raise ValueError(f"{text!r}: write [MASK] for one token, [MASK:3] for three, up to [MASK:999]")
    for i, part in enumerate(parts):
        new = [bpe.end] * int(part[6:-1] or 1) if i % 2 else bpe.encode(part)
        ids, to_fill = ids + new, to_fill + [i % 2 == 1] * len(new)
    if len(ids) >= text_length:
        raise ValueError(f"{text!r} has {len(ids) + 1} tokens with its end: at most {text_length} fit")
    padded, length = bpe.pad(ids, text_length)
    return torch.tensor(padded), torch.tensor(length), torch.tensor(to_fill + [False] * (text_length - len(ids)))


def word_positions(bpe: BPE, prompt: str, word: str) -> range:
    """The token positions of a word, or of several in a row, in a prompt; upper and lower case are equal. Raises
    ValueError for words that are not in the prompt."""
    found = re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)
    if not word.strip() or not found:
        raise ValueError(f"{word!r} is no word of {prompt!r}")
    first = len(bpe.encode(prompt[:found.start()]))
    return range(first, first + len(bpe.encode(found[0])))


def centre_words(lengths: Tensor, text_length: int) -> Tensor:
    """The paper's infilling: n // 2 tokens in the middle of n, not counting the end token: (B,) -> (B, T) bool."""
    n = lengths[:, None] - 1                                                                         # (B, 1)
    start, position = n // 2 - n // 2 // 2, torch.arange(text_length, device=lengths.device)
    return (position >= start) & (position < start + n // 2)
