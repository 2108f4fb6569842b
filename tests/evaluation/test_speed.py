"""What is compared for speed is what is meant: the operations are right, and neither side is held up by its code."""
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanomagvlt import argvlt
from nanomagvlt.evaluation import speed
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN


def test_operations_are_counted_and_grow_with_steps_and_batch(cfg):
    found = []
    torch.manual_seed(0)
    speed.compare(cfg, VQGAN(cfg).eval(), torch.device("cpu"), torch.float32, [1, 3], 1, False, found.append)
    assert [(r.task, r.batch, r.steps, r.tokens) for r in found] == [
        ("t2i", 1, 4, 4), ("t2i", 3, 4, 4), ("i2t", 1, 12, 6), ("i2t", 3, 12, 6)]
    assert all(min(r.magvlt, r.argvlt) > 0 for r in found) and found[0].vqgan > 0 == found[2].vqgan
    assert found[1].magvlt_operations == 3 * found[0].magvlt_operations
    d, n, length = cfg.width, cfg.image_tokens, cfg.image_tokens + cfg.text_length + 4
    causal = MAGVLT(cfg)
    weights = sum(p.numel() for p in (*causal.blocks.parameters(), *causal.head.parameters()))
    assert found[1].argvlt_bytes == n * 4 * (weights + cfg.codebook_size * d + 2 * cfg.layers * 3 * length * d)


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_operations_are_those_that_pytorch_counts(task, cfg):
    """PyTorch's counter knows attention only where it is written out. The length's head is left out of ours."""
    image, text = torch.zeros(1, cfg.image_tokens, dtype=torch.long), torch.zeros(1, cfg.text_length, dtype=torch.long)
    models = [MAGVLT(cfg).eval(), MAGVLT(dataclasses.replace(cfg, model="argvlt")).eval()]
    length = cfg.image_tokens + cfg.text_length + 4
    calls = [lambda: speed.masked_decoding(models[0], task, image, text),
             lambda: speed.causal_decoding(models[1], task, image, text, models[1].new_cache(1, length),
                                           argvlt.next_token)]
    for call, ours in zip(calls, speed.operations_of(cfg, task, length, cfg.text_length)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_a_cached_step_is_one_graph_and_gives_the_same_tokens(task, cfg, batch):
    """Two graphs in all: one reads the condition, the other every token; none breaks."""
    torch.manual_seed(0)
    model = MAGVLT(dataclasses.replace(cfg, model="argvlt")).eval()
    image, text, lengths = batch["image_tokens"], batch["text_tokens"], torch.full((5,), cfg.text_length)
    to_fill = torch.ones_like(image if task == "t2i" else text, dtype=torch.bool)

    def tokens(step):
        return argvlt.generate(model, task, image, text, lengths, to_fill, torch.Generator().manual_seed(0), step=step)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(argvlt.next_token, backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(tokens(compiled), tokens(argvlt.next_token)) and counter.frame_count == 2


def test_masked_decoding_is_one_graph_a_task(cfg, model):
    counter = CompileCounter()
    torch._dynamo.reset()
    image = torch.zeros(2, cfg.image_tokens, dtype=torch.long)
    text = torch.zeros(2, cfg.text_length, dtype=torch.long)
    before = {task: speed.masked_decoding(model, task, image, text) for task in ("t2i", "i2t")}
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=False)
    after = {task: speed.masked_decoding(model, task, image, text) for task in before}
    assert all(torch.equal(before[task], after[task]) for task in before)
    assert counter.frame_count == 3  # t2i, the length's pass, i2t
