"""Appendix - Speed: masked beside autoregressive decoding, on this machine (tables 1 and 3).

Both models are the same transformer with random weights: speed does not depend on content. MAGVLT makes K passes over
the whole sequence. ARGVLT keeps keys and values, so it reads every position once: about K times fewer operations, but
one position at a time, and each step fetches all weights from memory. So masked decoding wins where latency is the
limit (a GPU, few samples at a time), and loses where arithmetic is (a CPU, large batches).
"""
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nanomagvlt import argvlt, decoding
from nanomagvlt.config import ARGVLT, Config
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import TASKS
from nanomagvlt.training.cost import count_flops, medians

PAPER = {"t2i": 8.12, "i2t": 1.56}  # how many times as fast as ARGVLT the paper's MAGVLT is
STEPS = {"t2i": 10, "i2t": 12}      # the paper's K
CAPTION = 16                        # text tokens of a caption
HEAD = f"""{'':12}{'seconds a batch':20}{'with the VQ-GAN':20}{'times as fast as ARGVLT':26}GFLOP
{'task batch':12}{2 * f"{'MAGVLT':10}{'ARGVLT':10}"}{'':8}{'+ VQ-GAN':10}{'paper':8}{'MAGVLT':10}ARGVLT"""


def decode(model: MAGVLT, task: str, batch: dict[str, Tensor], **options) -> Tensor:
    """The generated tokens (B, N) of a task, by masked or by autoregressive decoding. MAGVLT also predicts the length
    of a text, which it does not use here: all captions are equally long."""
    (piece,), is_causal = TASKS[task].generates, model.cfg.model == "argvlt"
    if piece == "text" and not is_causal:
        decoding.predict_length(model, task, batch)
    to_fill = {piece: torch.ones_like(batch[f"{piece}_tokens"], dtype=torch.bool)}
    done, _ = (argvlt if is_causal else decoding).generate(
        model, task, batch, to_fill, {piece: decoding.sampling_config(model.cfg, piece)},
        torch.Generator().manual_seed(0), **options)
    return done[f"{piece}_tokens"]


@torch.inference_mode()
def compare(cfg: Config, vqgan, device: torch.device, dtype: torch.dtype, batches: list[int], repeats: int,
            compiled: bool) -> Iterator[dict]:
    """T2I and I2T at each batch size: seconds a batch of both models and of the VQ-GAN's decoder, and operations."""
    cfg = dataclasses.replace(cfg, image_steps=min(STEPS["t2i"], cfg.image_tokens), text_steps=STEPS["i2t"]).check()
    twin = dataclasses.replace(cfg, model="argvlt", **ARGVLT).check()
    masked, causal = (MAGVLT(c).to(device, dtype).eval() for c in (cfg, twin))
    forward, step, caption = masked.forward, argvlt.next_token, min(CAPTION, cfg.text_length)
    for task, size in ((task, size) for task in STEPS for size in batches):
        batch = {"image_tokens": torch.randint(cfg.codebook_size, (size, cfg.image_tokens), device=device),
                 "text_tokens": torch.randint(cfg.end_token, (size, caption), device=device),
                 "text_lengths": torch.full((size,), caption, device=device)}
        masked.forward, cache = forward, causal.new_cache(size, cfg.image_tokens + caption + 4)
        one = {name: tensor[:1] for name, tensor in batch.items()}
        flops = [size * count_flops(partial(decode, model, task, one)) for model in (masked, causal)]
        if compiled:  # anew for each batch size, so that no graph is made for sizes that may vary
            torch._dynamo.reset()
            for tensor in (tensor for pair in cache for tensor in pair):
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write into it
            mode = "reduce-overhead" if device.type == "cuda" else "default"  # the former: with CUDA graphs
            step, masked.forward = (torch.compile(call, mode=mode, fullgraph=True, dynamic=False)
                                    for call in (argvlt.next_token, forward))
        calls = [partial(decode, masked, task, batch), partial(decode, causal, task, batch, cache=cache, step=step),
                 partial(vqgan.decode, batch["image_tokens"])]
        seconds = dict(zip(("magvlt", "argvlt", "vqgan"), medians(calls, device, repeats, 3 if compiled else 1)))
        yield {"task": task, "batch": size, **seconds, "magvlt_flops": flops[0], "argvlt_flops": flops[1]}


def row(found: dict) -> str:
    """A result of compare() as a line under HEAD."""
    task, size, m, a, vqgan, *flop = found.values()
    images = f"{m + vqgan:<10.4g}{a + vqgan:<10.4g}", f"{(a + vqgan) / (m + vqgan):.2f}"
    both, ratio = images if task == "t2i" else ("", "")
    return (f"{task:5}{size:<7}{m:<10.4g}{a:<10.4g}{both:20}{a / m:<8.2f}{ratio:10}{PAPER[task]:<8}"
            f"{flop[0] / 1e9:<10.4g}{flop[1] / 1e9:.4g}")
