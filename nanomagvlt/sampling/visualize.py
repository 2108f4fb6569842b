"""Appendix - Watching: decoding step by step, and what image tokens look at (figure 9 of the paper).

Nothing here changes what is computed: the steps are those that decode() leaves behind, and attention is worked out
again from the queries and keys that a hook on each block picks up.

Shapes: B batch, L sequence, D width, H heads, N image places on G x G, K decoding steps.
"""
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanomagvlt import sequence
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.decoding import Step
from nanomagvlt.model import MAGVLT

SIDE = 96  # pixels of a small picture


def film(painted: np.ndarray, trace: list[Step]) -> tuple[Image.Image, list[Image.Image]]:
    """The decoding of the first image of a batch: a strip, a column a step, and the frames of an animation.

    painted are the steps' tokens as pictures, uint8 (K, S, S, 3).

    The strip's rows are what all places hold after the step, which of them were hidden before it (black), and how sure
    each is (white: p = 1). In the frames, what is hidden again is grey.
    """
    hidden = torch.stack([step.is_masked[0] for step in trace]).cpu()                                # (K, N)
    sure = torch.stack([step.confidence[0] for step in trace]).exp().cpu()                           # (K, N)
    strip = Image.new("RGB", (len(trace) * (SIDE + 4) - 4, 3 * (SIDE + 4) - 4), "white")
    frames = []
    for k in range(len(trace)):
        small = resized(painted[k], SIDE)
        for row, cell in enumerate((small, heat(1 - hidden[k].float()), heat(sure[k]))):
            strip.paste(cell, (k * (SIDE + 4), row * (SIDE + 4)))
        again = hidden[k + 1] if k + 1 < len(trace) else torch.zeros_like(hidden[k])
        cover = heat(again.float()).convert("L").resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
        frame = resized(painted[k], 2 * SIDE)
        frame.paste("gray", (0, 0), cover)
        frames.append(frame)
    return strip, frames


def resized(image: np.ndarray, side: int) -> Image.Image:
    """uint8 (S, S, 3) as a picture of side x side."""
    method = Image.Resampling.NEAREST if side > len(image) else Image.Resampling.BOX
    return Image.fromarray(image).resize((side, side), method)


def heat(values: Tensor) -> Image.Image:
    """Values (N,) in [0, 1] of the places of a grid, 0 black and 1 white."""
    grid = round(len(values) ** 0.5)
    grey = (values.view(grid, grid).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return resized(np.repeat(grey[..., None], 3, axis=2), SIDE)


def text_table(bpe: BPE, trace: list[Step], length: int) -> str:
    """The decoding of the first text of a batch, a line a step: [guessed in this step, how surely], known before."""
    lines = []
    for k, step in enumerate(trace):
        ids, hidden = step.tokens[0, :length].tolist(), step.is_masked[0, :length].tolist()
        words = ["(end)" if i == bpe.end else bpe.decode([i]).strip() for i in ids]
        sure = step.confidence[0, :length].exp().tolist()
        lines.append(f"{k + 1:3}  " + " ".join(f"[{word} {p:.0%}]" if is_hidden else word
                                               for word, is_hidden, p in zip(words, hidden, sure)))
    return "\n".join(lines)


@torch.inference_mode()
def attention_maps(model: MAGVLT, trace: list[Step], text_tokens: Tensor, lengths: Tensor, keys: range) -> Tensor:
    """How much each place of the first image of a batch looks at text places `keys`, in each decoding step: (K, N), the
    mean over blocks and heads. text_tokens (1, T) and lengths (1,) are the prompt's.
    """
    image, hidden = (torch.stack([getattr(step, name)[0] for step in trace]) for name in ("tokens", "is_masked"))
    text_tokens = text_tokens.expand(len(trace), -1)
    seq = sequence.build("t2i", model.cfg, image, hidden, text_tokens, torch.zeros_like(text_tokens, dtype=torch.bool),
                         lengths.expand(len(trace)))                                 # the steps are a batch: B = K
    picked, where = [], seq.layout
    hooks = [block.attention.qkv.register_forward_hook(lambda module, given, out: picked.append(out))
             for block in model.blocks]
    try:
        model(seq)
    finally:
        for hook in hooks:
            hook.remove()
    maps = 0.0
    for qkv in picked:                                                                               # (B, L, 3 D)
        b, length, width = qkv.shape
        q, k, _ = qkv.view(b, length, 3, model.cfg.heads, -1).permute(2, 0, 3, 1, 4)                 # (B, H, L, D/H)
        scores = q[:, :, where.image] @ k.transpose(2, 3) / q.shape[-1] ** 0.5                       # (B, H, N, L)
        share = scores.masked_fill(~seq.is_valid[:, None, None], -torch.inf).softmax(-1)
        maps = maps + share[..., where.text][..., list(keys)].sum(-1).mean(1) / len(picked)          # (B, N)
    return maps


def attention_sheet(painted: np.ndarray, maps: Tensor) -> Image.Image:
    """As figure 9: pictures step by step, uint8 (K, S, S, 3), and under them maps (K, N), white the highest of all."""
    sheet = Image.new("RGB", (len(maps) * (SIDE + 4) - 4, 2 * SIDE + 4), "white")
    for k, one in enumerate(maps / maps.max().clamp(min=1e-9)):
        sheet.paste(resized(painted[k], SIDE), (k * (SIDE + 4), 0))
        sheet.paste(heat(one), (k * (SIDE + 4), SIDE + 4))
    return sheet
