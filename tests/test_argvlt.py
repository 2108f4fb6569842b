import dataclasses

import pytest
import torch

from nanomagvlt import argvlt
from nanomagvlt.config import preset
from nanomagvlt.decoding import sampling_config
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import KIND, TASKS, build


@pytest.fixture(params=[False, True], ids=["", "segments"])
def causal(cfg, request) -> MAGVLT:
    torch.manual_seed(0)
    return MAGVLT(dataclasses.replace(cfg, model="argvlt", segments=request.param, init_std=0.3,
                                      image_temperature=(1.0, 1.0), text_temperature=(1.0, 1.0))).eval()


def generate(causal, task, batch, fill=None, seed=0, rows=5, top_k=5, **options) -> torch.Tensor:
    """The tokens of the generated piece, of the first rows of the batch."""
    (piece,) = TASKS[task].generates
    batch = {name: tensor[:rows] for name, tensor in batch.items()}
    fill = torch.ones_like(batch[f"{piece}_tokens"], dtype=torch.bool) if fill is None else fill[:rows]
    sampling = {piece: sampling_config(causal.cfg, KIND[piece], top_k=top_k)}
    return argvlt.generate(causal, task, batch, {piece: fill}, sampling, torch.Generator().manual_seed(seed),
                           **options)[0][f"{piece}_tokens"]


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_no_position_attends_to_what_comes_after_it(task, causal, batch):
    seq = build(task, causal.cfg, batch)
    before = causal(seq)
    for position in range(seq.token_ids.shape[1]):
        changed = dataclasses.replace(seq, token_ids=seq.token_ids.clone())
        changed.token_ids[:, position] = (changed.token_ids[:, position] + 1) % 12
        differs = (causal(changed) != before).any(0).any(1)
        assert not differs[:position].any() and differs[position]


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_with_and_without_the_cache_the_tokens_are_the_same(task, causal, batch):
    batch = batch if task == "t2i" else batch | {"text_lengths": torch.full((5,), causal.cfg.text_length)}
    given = batch["image_tokens" if task == "t2i" else "text_tokens"]
    all_tokens = generate(causal, task, batch)
    assert torch.equal(all_tokens, generate(causal, task, batch, use_cache=False))
    assert not torch.equal(all_tokens, generate(causal, task, batch, seed=1))
    assert torch.equal(generate(causal, task, batch, rows=1), all_tokens[:1])
    some = (torch.arange(given.shape[1]) % 2 == 1).expand_as(given)
    assert torch.equal(generate(causal, task, batch, some)[~some], given[~some])
    assert torch.equal(generate(causal, task, batch, torch.zeros_like(some)), given)


def test_states_position_by_position_equal_those_of_one_pass(causal, batch):
    seq = build("t2i", causal.cfg, batch)
    cache, states = causal.new_cache(5, seq.token_ids.shape[1]), []
    for position in range(seq.token_ids.shape[1]):
        states.append(causal(seq, torch.tensor([position]), cache))
    assert torch.allclose(torch.cat(states, 1), causal(seq), atol=1e-5)


def test_an_end_token_ends_a_row(causal, batch):
    end = causal.cfg.text_vocab - 1
    with torch.no_grad():
        causal.output_bias[-1] += 6.0
    text = generate(causal, "i2t", batch | {"text_lengths": torch.full((5,), 6)}, top_k=0)
    over = (text == end).long().cummax(1).values.bool()
    assert over.any() and (text[over] == end).all()


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_the_loss_is_the_next_token_cross_entropy_at_every_position(task, causal, batch):
    """Position by position: the log probability of a token by the state before it, smoothed; 0.9 and 0.1."""
    causal.cfg.label_smoothing = 0.1
    loss, terms = argvlt.losses(causal, task, batch, None)
    seq = build(task, causal.cfg, batch)
    states, found = causal(seq), {"image": [], "text": []}
    for b in range(5):
        for name in found:
            for position in range(seq.slices[name].start, seq.slices[name].stop):
                if seq.is_valid[b, position]:
                    log_p = causal.logits(states[b:b + 1, position - 1:position], name)[0, 0].log_softmax(0)
                    target = seq.token_ids[b, position] - causal.vocab.tokens[name].start
                    found[name].append(-0.9 * log_p[target] - 0.1 * log_p.mean())
    image, text = (torch.stack(found[name]).mean() for name in ("image", "text"))
    generated, condition = (image, text) if task == "t2i" else (text, image)
    assert torch.allclose(terms["generated"], generated, atol=1e-5)
    assert torch.allclose(terms["condition"], condition, atol=1e-5)
    assert torch.allclose(loss, 0.9 * generated + 0.1 * condition, atol=1e-5)


def test_settings_that_a_causal_model_does_not_have():
    base = preset("base", model="argvlt")
    assert set(base.task_shares) == {"t2i", "i2t"} and not base.unroll_mask and base.mixsel == "off"
    for wrong in (dict(model="argvlt", task_weights={"it2it": 1.0}), dict(model="argvlt", mixsel="select"),
                  dict(model="argvlt", condition_dropout=0.1)):
        with pytest.raises(ValueError, match="argvlt"):
            preset("tiny", **wrong)
