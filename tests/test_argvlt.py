import dataclasses
from itertools import product

import pytest
import torch

from nanomagvlt import argvlt, objectives
from nanomagvlt.config import preset
from nanomagvlt.decoding import sampling_config
from nanomagvlt.model import MAGVLT
from nanomagvlt.sequence import KIND, TASKS, build


@pytest.fixture(params=[False, True], ids=["", "segments"])
def causal(cfg, request) -> MAGVLT:
    torch.manual_seed(0)
    return MAGVLT(dataclasses.replace(cfg, model="argvlt", text_window=0, segments=request.param, text_vocab=100,
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
    cache = causal.new_cache(5, seq.token_ids.shape[1])
    states = [causal(seq, torch.tensor([position]), cache) for position in range(seq.token_ids.shape[1])]
    assert torch.allclose(torch.cat(states, 1), causal(seq), atol=1e-5)


def test_an_end_token_ends_a_row(causal, batch):
    end = causal.cfg.text_vocab - 1
    causal.output_bias.data[-1] += 6.0
    text = generate(causal, "i2t", batch | {"text_lengths": torch.full((5,), 6)}, top_k=0)
    over = (text == end).long().cummax(1).values.bool()
    assert over.any() and (text[over] == end).all()


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_visible_first_reads_given_tokens_before_the_holes_at_their_own_positions(task, causal, batch):
    """The oracle orders the columns of each row by hand, reads them in one pass, and samples from the same numbers."""
    (piece,), causal.cfg.visible_first = TASKS[task].generates, True
    causal.output_bias.data[-1] = -99.0  # no end token
    batch |= {"text_tokens": batch["text_tokens"] % 19, "text_lengths": torch.full((5,), 6)}
    n, config = batch[f"{piece}_tokens"].shape[1], sampling_config(causal.cfg, piece, top_k=5)
    fill = torch.stack([torch.arange(n).roll(b) < 2 for b in range(5)])  # each row has other holes
    found, uniform = generate(causal, task, batch, fill), torch.rand(5, n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, generate(causal, task, batch, fill, use_cache=False))
    for b, done in enumerate(zip(*(batch | {f"{piece}_tokens": found}).values())):
        seq = build(task, causal.cfg, {name: tensor[None] for name, tensor in zip(batch, done)})
        start = seq.slices[piece].start
        columns = [*range(start), *(start + i for hole in (False, True) for i in range(n) if fill[b, i] == hole)]
        seq.token_ids, seq.position_ids = seq.token_ids[:, columns], seq.position_ids[columns]
        logits = causal.logits(causal(seq)[:, -3:-1], piece)
        assert torch.equal(config.sample(logits, 1.0, uniform[b:b + 1, -2:])[0][0], found[b, fill[b]])


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_a_hole_sees_given_tokens_right_of_it_only_if_visible_first(task, causal, batch):
    (piece,), found = TASKS[task].generates, []
    tokens = batch[f"{piece}_tokens"] % 11
    tokens[:, 4:5] = causal.cfg.end_token                                # four words, an end token, padding
    batch |= {f"{piece}_tokens": tokens, "text_lengths": torch.full((5,), 5)}
    changed = batch | {f"{piece}_tokens": tokens + (torch.arange(tokens.shape[1]) == 3)}
    first, last = ((torch.arange(tokens.shape[1]) // 2 == i).expand_as(tokens) for i in (0, 1))  # holes
    for causal.cfg.visible_first in (False, True):
        one, other = (generate(causal, task, b, first)[first] for b in (batch, changed))
        assert torch.equal(one, other) != causal.cfg.visible_first
        found.append(generate(causal, task, batch, last))
    assert torch.equal(*found)  # where no word is right of a hole, both are the same


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_the_loss_is_the_next_token_cross_entropy_at_every_position_also_of_mixsel(task, causal, batch, rng):
    """The log probability of a token by the state before it, smoothed; 0.9 and 0.1."""
    causal.cfg.label_smoothing, causal.cfg.mixsel, wanted = 0.1, "select", []
    loss, terms = argvlt.losses(causal, task, batch, rng)
    mixed, _, selector = objectives.mix(task, batch, rng, causal.cfg)
    read = [build(task, causal.cfg, batch), build(task, causal.cfg, mixed, selector=selector)]
    assert torch.equal(*(seq.token_ids[:, seq.bog + 1:] for seq in read))  # MixSel's target is the own image or caption
    for seq, piece in product(read, TASKS[task].generates + TASKS[task].given):
        where = seq.slices[piece]
        log_p = causal.logits(causal(seq)[:, where.start - 1:where.stop - 1], piece).log_softmax(-1)
        target = seq.token_ids[:, where, None] - causal.vocab.tokens[piece].start
        smoothed = -0.9 * log_p.gather(-1, target)[..., 0] - 0.1 * log_p.mean(-1)
        wanted.append(smoothed[seq.is_valid[:, where]].mean())
    wanted = torch.stack([*wanted[:2], 0.9 * wanted[2] + 0.1 * wanted[3]])  # generated, condition, mixsel
    found = torch.stack([terms[name] for name in ("generated", "condition", "mixsel")])
    assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(loss, wanted @ torch.tensor([0.9, 0.1, 0.5]))


def test_settings_that_a_causal_model_does_not_have():
    base = preset("base", model="argvlt")
    assert set(base.task_shares) == {"t2i", "i2t"} and base.image_top_k == 256
    assert not base.unroll_mask and base.mixsel == "off"
    for wrong in (dict(model="argvlt", task_weights={"it2it": 1.0}), dict(model="argvlt", condition_dropout=0.1),
                  dict(model="argvlt", text_window=3), dict(visible_first=True)):
        with pytest.raises(ValueError, match="argvlt"):
            preset("tiny", **wrong)
