"""What is timed is what is counted, and neither side is slowed by its code."""
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nanomagvlt import argvlt
from nanomagvlt.evaluation import speed
from nanomagvlt.model import MAGVLT
from nanomagvlt.tokenizers.vqgan import VQGAN


def test_both_tasks_are_compared_at_each_batch_size(cfg):
    found = list(speed.compare(cfg, VQGAN(cfg).eval(), torch.device("cpu"), torch.float32, [1, 3], 1, False))
    assert [speed.row(r).split()[:2] for r in found] == [["t2i", "1"], ["t2i", "3"], ["i2t", "1"], ["i2t", "3"]]
    assert all(min(r["magvlt"], r["argvlt"], r["vqgan"]) > 0 for r in found)
    assert found[1]["magvlt_flops"] == 3 * found[0]["magvlt_flops"] > 9 * found[0]["argvlt_flops"]


@pytest.mark.parametrize("task", ["t2i", pytest.param("i2t", marks=pytest.mark.slow)])
def test_compiled_decoding_is_one_graph_a_pass_and_gives_the_same_tokens(task, cfg, model, batch):
    batch, graphs = batch | {"text_lengths": torch.full((5,), 6)}, CompileCounter()      # no padding
    causal = MAGVLT(dataclasses.replace(cfg, model="argvlt", text_window=0)).eval()
    tokens = speed.decode(model, task, batch)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=graphs, fullgraph=True, dynamic=False)
    assert torch.equal(speed.decode(model, task, batch), tokens)
    assert graphs.frame_count == (1 if task == "t2i" else 2)  # the length has a pass of its own
    graphs.clear()
    compiled = torch.compile(argvlt.next_token, backend=graphs, fullgraph=True, dynamic=False)
    one, other = (speed.decode(causal, task, batch, step=step) for step in (argvlt.next_token, compiled))
    assert torch.equal(one, other) and graphs.frame_count == 2  # one reads the condition, the other every token
