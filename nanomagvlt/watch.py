"""Appendix - Watching: decoding step by step, and what image tokens look at (figure 9 of the paper).

Nothing here changes what is computed: the steps are those that decode() leaves behind, and attention is worked out
again from the queries and keys that a hook on each block picks up.

Shapes: B batch, L sequence, D width, H heads, N image places on G x G, K decoding steps.
"""
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanomagvlt.bpe import BPE
from nanomagvlt.data import to_images
from nanomagvlt.decode import Step
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import Sequence
from nanomagvlt.vqgan import VQGAN

SIDE = 96  # pixels of a small picture


@torch.inference_mode()
def film(vqgan: VQGAN, trace: list[Step]) -> tuple[Image.Image, list[Image.Image]]:
    """The decoding of the first image of a batch: a strip, a column a step, and the frames of an animation.

    The strip's rows are what all places hold after the step, which of them were hidden before it (black), and how sure
    each is (white: p = 1). In the frames, what is hidden again is grey.
    """
    painted = to_images(vqgan.decode(torch.stack([step.tokens[0] for step in trace])))               # (K, S, S, 3)
    hidden = torch.stack([step.is_masked[0] for step in trace]).cpu()                                # (K, N)
    sure = torch.stack([step.confidence[0] for step in trace]).exp().cpu()                           # (K, N)
    strip = Image.new("RGB", (len(trace) * (SIDE + 4) - 4, 3 * (SIDE + 4) - 4), "white")
    frames = []
    for k in range(len(trace)):
        small = enlarge(painted[k], SIDE)
        for row, cell in enumerate((small, heat(1 - hidden[k].float()), heat(sure[k]))):
            strip.paste(cell, (k * (SIDE + 4), row * (SIDE + 4)))
        again = hidden[k + 1] if k + 1 < len(trace) else torch.zeros_like(hidden[k])
        cover = heat(again.float()).convert("L").resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
        frame = enlarge(painted[k], 2 * SIDE)
        frame.paste("gray", (0, 0), cover)
        frames.append(frame)
    return strip, frames


def enlarge(image: np.ndarray, side: int) -> Image.Image:
    """uint8 (S, S, 3) as a picture of side x side."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def heat(values: Tensor) -> Image.Image:
    """Values (N,) in [0, 1] of the places of a grid, 0 black and 1 white."""
    grid = round(len(values) ** 0.5)
    grey = (values.view(grid, grid).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return enlarge(np.repeat(grey[..., None], 3, axis=2), SIDE)


def text_table(bpe: BPE, trace: list[Step], length: int) -> str:
    """The decoding of the first text of a batch, a line a step: [guessed in this step], known before."""
    lines = []
    for k, step in enumerate(trace):
        ids, hidden = step.tokens[0, :length].tolist(), step.is_masked[0, :length].tolist()
        words = ["(end)" if i == bpe.end else bpe.decode([i]).strip() for i in ids]
        lines.append(f"{k + 1:3}  " + " ".join(f"[{word}]" if h else word for word, h in zip(words, hidden)))
    return "\n".join(lines)


@torch.inference_mode()
def attention_maps(model: MAGVLT, seq: Sequence, keys: range) -> Tensor:
    """How much each image place looks at text places `keys`, in each block: (blocks, B, N), the mean over heads."""
    picked, where = [], seq.layout
    hooks = [block.attention.qkv.register_forward_hook(lambda module, given, out: picked.append(out))
             for block in model.blocks]
    try:
        model(seq)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for qkv in picked:                                                                               # (B, L, 3 D)
        b, length, width = qkv.shape
        q, k, _ = qkv.view(b, length, 3, model.cfg.heads, -1).permute(2, 0, 3, 1, 4)                 # (B, H, L, D/H)
        scores = q[:, :, where.image] @ k.transpose(2, 3) / q.shape[-1] ** 0.5                       # (B, H, N, L)
        share = scores.masked_fill(~seq.is_valid[:, None, None], -torch.inf).softmax(-1)
        maps.append(share[..., where.text][..., list(keys)].sum(-1).mean(1))                         # (B, N)
    return torch.stack(maps)


def attention_sheet(image: np.ndarray, maps: Tensor) -> Image.Image:
    """The picture uint8 (S, S, 3), then a map for each block (blocks, N), each as bright as its highest place."""
    cells = [enlarge(image, SIDE)] + [heat(m / m.max().clamp(min=1e-9)) for m in maps]
    sheet = Image.new("RGB", (len(cells) * (SIDE + 4) - 4, SIDE), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i * (SIDE + 4), 0))
    return sheet
