"""Decoding step by step, and what image tokens attend to (figure 9 of the paper).

decode() records its steps. Attention is computed again from the queries and keys that a hook on each block reads.

Shapes: B batch, L sequence, D width, H heads, N image tokens on G x G, T text tokens, K decoding steps, S image side.
"""
import contextlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanomagvlt.decoding import Step
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import build
from nanomagvlt.tokenizers.bpe import BPE

SIDE = 96  # pixels of a small picture


def film(images: np.ndarray, trace: list[Step]) -> tuple[Image.Image, list[Image.Image]]:
    """The decoding of the first image of a batch: a strip with a column for each step, and the frames of an animation.

    images are the tokens after each step, decoded, uint8 (K, S, S, 3). The rows of the strip: the image; what was
    masked before the step (black); probabilities (white: p = 1). In a frame, what the step masks again is grey.
    """
    masked = torch.stack([step.is_masked[0] for step in trace]).float()                              # (K, N)
    p = torch.stack([step.confidence[0] for step in trace]).exp()                                    # (K, N)
    strip = sheet([[resized(image, SIDE), heat(1 - m), heat(q)] for image, m, q in zip(images, masked, p)])
    frames = [resized(image, 2 * SIDE) for image in images]
    for frame, masked_again in zip(frames, masked[1:]):
        frame.paste("gray", mask=heat(masked_again, 2 * SIDE))
    return strip, frames


def sheet(columns: list[list[Image.Image]]) -> Image.Image:
    """Small pictures side by side, one list for each column."""
    size = SIDE + 4
    whole = Image.new("RGB", (len(columns) * size - 4, len(columns[0]) * size - 4), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            whole.paste(picture, (x * size, y * size))
    return whole


def resized(image: np.ndarray, side: int) -> Image.Image:
    """uint8 (S, S, 3) or, in grey, (S, S) as a picture of side x side pixels."""
    method = Image.Resampling.NEAREST if side > len(image) else Image.Resampling.BOX
    return Image.fromarray(image).resize((side, side), method)


def heat(values: Tensor, side: int = SIDE) -> Image.Image:
    """Values (N,) in [0, 1] as a picture of the grid, 0 black and 1 white."""
    grid = round(len(values) ** 0.5)
    return resized((values.view(grid, grid).clamp(0, 1) * 255).round().byte().cpu().numpy(), side)


def text_table(bpe: BPE, trace: list[Step], length: int) -> str:
    """The decoding of the first text of a batch, one line for each step: [new token, probability], known token."""
    lines = []
    for k, step in enumerate(trace, 1):
        ids, is_masked, p = (x[0, :length].tolist() for x in (step.tokens, step.is_masked, step.confidence.exp()))
        words = ["(end)" if i == bpe.end else bpe.decode([i]).strip() for i in ids]
        lines.append(f"{k:3}  " + " ".join(f"[{word} {q:.0%}]" if is_new else word
                                           for word, is_new, q in zip(words, is_masked, p)))
    return "\n".join(lines)


@torch.inference_mode()
def attention_maps(model: MAGVLT, trace: list[Step], text_tokens: Tensor, lengths: Tensor, keys: range) -> Tensor:
    """The attention of the first image's tokens to the text positions `keys`, mean over blocks and heads: (K, N). The
    prompt is text_tokens (1, T) of lengths (1,)."""
    batch = {"image_tokens": torch.stack([step.tokens[0] for step in trace]),                 # a step is a row: B = K
             "text_tokens": text_tokens.expand(len(trace), -1).to(model.device),
             "text_lengths": lengths.expand(len(trace)).to(model.device)}
    seq = build("t2i", model.cfg, batch, {"image": torch.stack([step.is_masked[0] for step in trace])})
    projections, maps = [], []
    with contextlib.ExitStack() as hooks:
        for block in model.blocks:
            hook = block.attention.qkv.register_forward_hook(lambda module, given, out: projections.append(out))
            hooks.callback(hook.remove)
        model(seq)
    for qkv in projections:                                                                          # (B, L, 3 D)
        q, k, _ = qkv.view(*qkv.shape[:2], 3, model.cfg.heads, -1).permute(2, 0, 3, 1, 4)            # (B, H, L, D/H)
        scores = q[:, :, seq.slices["image"]] @ k.transpose(2, 3) / q.shape[-1] ** 0.5               # (B, H, N, L)
        attention = scores.masked_fill(~seq.is_valid[:, None, None], -torch.inf).softmax(-1)
        maps.append(attention[..., seq.slices["text"]][..., list(keys)].sum(-1).mean(1))             # (B, N)
    return torch.stack(maps).mean(0)


def attention_sheet(images: np.ndarray, maps: Tensor) -> Image.Image:
    """Figure 9: the pictures of each step, uint8 (K, S, S, 3), above their maps (K, N); the highest value is white."""
    maps = maps / maps.max().clamp(min=1e-9)
    return sheet([[resized(image, SIDE), heat(values)] for image, values in zip(images, maps)])
