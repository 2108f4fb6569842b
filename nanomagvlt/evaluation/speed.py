"""Appendix - How fast: masked decoding beside autoregressive decoding, on the machine it runs on (tables 1 and 3).

Both have the same transformer, with random weights: what is drawn does not matter here. MAGVLT reads the whole sequence
K times. ARGVLT reads the condition once and then token after token, the keys and values of what it has read being kept:
far fewer operations, but one after the other, and each of them has to fetch all weights from memory. So masked decoding
wins where waiting is the limit (a GPU, few images at a time), and loses where arithmetic is (a CPU, large batches).
To say which it is, the machine's memory bandwidth and matrix rate are measured beside the models: an ARGVLT that
fetches bytes about as fast as the machine can is a strong opponent, not a badly written one. (Compiled, all of its step
is one graph, sampling included; of MAGVLT it is the transformer alone.)

The two take turns, in one process; figures are medians after a warm-up.
"""
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from nanomagvlt import argvlt, decoding
from nanomagvlt.config import Config
from nanomagvlt.model import MAGVLT, num_parameters, operations
from nanomagvlt.sequence import valid_mask

PAPER = {"t2i": 8.12, "i2t": 1.56}   # how many times as fast as ARGVLT the paper's MAGVLT is
STEPS = {"t2i": 10, "i2t": 12}       # K of the paper
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPTION = 16                         # tokens of the captions that are read and written


@dataclass
class Comparison:
    """One task at one batch size. Seconds a batch; operations and bytes of the decoding, the VQ-GAN aside."""
    task: str
    batch: int
    steps: int                # K of MAGVLT
    tokens: int               # steps of ARGVLT
    magvlt: float
    argvlt: float
    vqgan: float              # to turn the tokens into images; 0 for captions
    magvlt_operations: float
    argvlt_operations: float
    argvlt_bytes: float       # weights and keys and values that it has to fetch, at least

    @property
    def ratio(self) -> float:
        """How many times as fast MAGVLT is."""
        return self.argvlt / self.magvlt

    def __str__(self) -> str:
        with_pixels = f"{(self.argvlt + self.vqgan) / (self.magvlt + self.vqgan):.2f}x" if self.vqgan else ""
        return (f"{self.task:5}{self.batch:<7}{self.magvlt:<11.4g}{self.argvlt:<11.4g}{self.batch / self.magvlt:<10.4g}"
                f"{self.batch / self.argvlt:<10.4g}{f'{self.ratio:.2f}x':8}{with_pixels:10}{PAPER[self.task]}x   "
                f"{self.argvlt_bytes / self.argvlt / 1e9:<8.3g}{self.magvlt_operations / self.argvlt_operations:.1f}")


HEAD = f"""{'':12}{'seconds a batch':22}{'a second':20}{'MAGVLT is faster':26}{'ARGVLT':8}{'operations'}
{'task batch':12}{'MAGVLT':11}{'ARGVLT':11}{'MAGVLT':10}{'ARGVLT':10}{'':8}{'+ VQ-GAN':10}{'paper':8}{'GB/s':8}M / A"""


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(calls: list[Callable], device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each call: the median of `repeats` rounds in which they take turns, after some that do not count."""
    times = [[] for _ in calls]
    for i in range(warm_up + repeats):
        for call, taken in zip(calls, times):
            wait(device)
            started = time.perf_counter()
            call()
            wait(device)
            if i >= warm_up:
                taken.append(time.perf_counter() - started)
    return [median(taken) for taken in times]


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, in copying a tensor that fits no cache."""
    source = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians([lambda: target.copy_(source)], device, 5)[0]


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in multiplying two square matrices, 8192 on a GPU, 1024 on a CPU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n ** 3 / medians([lambda: a @ b], device, 5)[0]


def masked_decoding(model: MAGVLT, task: str, image: Tensor, text: Tensor) -> Tensor:
    """Image tokens for texts (B, T) without padding; or texts for image tokens (B, N), their length guessed first."""
    generator, lengths = torch.Generator().manual_seed(0), torch.full_like(text[:, 0], text.shape[1])
    if task == "t2i":
        return decoding.draw_image(model, text, lengths, generator)[0]
    decoding.predict_length(model, image, torch.zeros_like(image, dtype=torch.bool))  # known here, but it takes its time
    canvas = decoding.DecodeState(torch.zeros_like(text), valid_mask(lengths, text.shape[1]), decoding.text_recipe(model.cfg))
    return decoding.write_text(model, image, generator, lengths, canvas)[0]


def causal_decoding(model: MAGVLT, task: str, image: Tensor, text: Tensor, cache, step: Callable) -> Tensor:
    """The same, token after token; a text in as many steps as it has tokens."""
    generator, lengths = torch.Generator().manual_seed(0), torch.full_like(text[:, 0], text.shape[1])
    to_fill = torch.ones_like(image if task == "t2i" else text, dtype=torch.bool)
    return argvlt.generate(model, task, image, text, lengths, to_fill, generator, cache=cache, step=step)


def operations_of(cfg: Config, task: str, length: int, caption: int) -> tuple[int, int]:
    """Of one sample's decoding: MAGVLT's and ARGVLT's. `length` is the whole sequence's."""
    scored, vocabulary = (cfg.image_tokens, cfg.codebook_size) if task == "t2i" else (caption, cfg.text_vocab)
    steps = cfg.image_steps if task == "t2i" else cfg.text_steps
    masked = steps * operations(cfg, length, length, scored, vocabulary)
    if task == "i2t":
        short = length - caption + cfg.length_positions
        masked += operations(cfg, short, short, 0, 0)                         # the length, but for its small head
    return masked, operations(cfg, length - 1, length, scored, vocabulary)    # the last token need not be read


def bytes_fetched(model: MAGVLT, task: str, batch: int, length: int, tokens: int) -> int:
    """What `tokens` cached steps must fetch at least: all weights but the embeddings, the table of the modality that
    is scored, and the keys and values of a sequence of `length`."""
    cfg, size = model.cfg, model.output_bias.element_size()
    weights = num_parameters(model.blocks) + num_parameters(model.head)
    table = (cfg.codebook_size if task == "t2i" else cfg.text_vocab) * cfg.width
    return tokens * size * (weights + table + 2 * cfg.layers * batch * length * cfg.width)


@torch.inference_mode()
def compare(cfg: Config, vqgan, device: torch.device, dtype: torch.dtype, batches: list[int], repeats: int,
            compiled: bool, report: Callable[[Comparison], None]) -> None:
    """Reports T2I and I2T at each batch size. cfg is MAGVLT's; vqgan decodes, and is neither cast nor compiled."""
    cfg = dataclasses.replace(cfg, image_steps=min(STEPS["t2i"], cfg.image_tokens), text_steps=STEPS["i2t"]).check()
    twin = dataclasses.replace(cfg, model="argvlt", task_weights=(8.0, 2.0, 0.0), unroll_mask=False, mixsel="off")
    masked, causal = (MAGVLT(c).to(device, dtype).eval() for c in (cfg, twin.check()))
    step, caption = argvlt.next_token, min(CAPTION, cfg.text_length)
    length = cfg.image_tokens + caption + 4

    def calls(task: str, batch: int) -> list[Callable]:
        image = torch.randint(cfg.codebook_size, (batch, cfg.image_tokens), device=device)
        text = torch.randint(cfg.end_token, (batch, caption), device=device)
        cache = causal.new_cache(batch, length)
        for kept in (kept for pair in cache for kept in pair):
            torch._dynamo.mark_static_address(kept)  # so that CUDA graphs may write into it
        return [partial(masked_decoding, masked, task, image, text),
                partial(causal_decoding, causal, task, image, text, cache, step), lambda: vqgan.decode(image)]

    forward, mode = masked.forward, "reduce-overhead" if device.type == "cuda" else "default"  # with CUDA graphs
    for task, k, tokens in (("t2i", cfg.image_steps, cfg.image_tokens), ("i2t", cfg.text_steps, caption)):
        for batch in batches:
            if compiled:  # anew for every shape, so that none is compiled for a shape that may vary
                torch._dynamo.reset()
                step, masked.forward = (torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
                                        for function in (argvlt.next_token, forward))
            magvlt, arg, pictures = medians(calls(task, batch), device, repeats, 3 if compiled else 1)
            report(Comparison(task, batch, k, tokens, magvlt, arg, pictures if task == "t2i" else 0.0,
                              *(batch * number for number in operations_of(cfg, task, length, caption)),
                              bytes_fetched(causal, task, batch, length, tokens)))
