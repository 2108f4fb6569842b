import dataclasses

import pytest
import torch

from nanomagvlt import argvlt, sequence
from nanomagvlt.config import preset
from nanomagvlt.model import MAGVLT


@pytest.fixture(params=[False, True], ids=["", "segments"])
def causal(cfg, request) -> MAGVLT:
    torch.manual_seed(0)
    return MAGVLT(dataclasses.replace(cfg, model="argvlt", segments=request.param, init_std=0.3)).eval()


def whole(model, task, batch):
    return argvlt.whole_sequence(task, model.cfg, batch["image_tokens"], batch["text_tokens"], batch["text_lengths"])


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_no_place_sees_what_comes_after_it(task, causal, batch):
    seq = whole(causal, task, batch)
    before = causal(seq)
    for place in range(seq.token_ids.shape[1]):
        changed = dataclasses.replace(seq, token_ids=seq.token_ids.clone())
        changed.token_ids[:, place] = (changed.token_ids[:, place] + 1) % 12
        differs = (causal(changed) != before).any(0).any(1)
        assert not differs[:place].any() and differs[place]


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_with_and_without_the_cache_the_tokens_are_the_same(task, causal, batch):
    to_fill = torch.ones_like(batch["image_tokens" if task == "t2i" else "text_tokens"], dtype=torch.bool)
    lengths = batch["text_lengths"] if task == "t2i" else torch.full((5,), causal.cfg.text_length)

    def tokens(seed=0, fill=to_fill, rows=5, **options):
        return argvlt.generate(causal, task, batch["image_tokens"][:rows], batch["text_tokens"][:rows], lengths[:rows],
                               fill[:rows], torch.Generator().manual_seed(seed), top_k=5, **options)
    assert torch.equal(tokens(), tokens(use_cache=False)) and not torch.equal(tokens(), tokens(seed=1))
    assert torch.equal(tokens(rows=1), tokens()[:1])
    some = torch.arange(to_fill.shape[1]) % 2 == 1
    given = batch["image_tokens" if task == "t2i" else "text_tokens"]
    assert torch.equal(tokens(fill=some.expand_as(to_fill))[:, ~some], given[:, ~some])
    assert torch.equal(tokens(fill=~to_fill), given)


def test_the_cache_holds_what_the_whole_sequence_gives(causal, batch):
    """States place by place equal those of one pass."""
    seq = whole(causal, "t2i", batch)
    cache, states = causal.new_cache(5, seq.token_ids.shape[1]), []
    for place in range(seq.token_ids.shape[1]):
        states.append(causal(seq, torch.tensor([place]), cache))
    assert torch.allclose(torch.cat(states, 1), causal(seq), atol=1e-5)


def test_an_end_token_ends_a_row(causal, batch):
    end = causal.cfg.text_vocab - 1
    with torch.no_grad():
        causal.output_bias[-1] += 6.0
    text = argvlt.generate(causal, "i2t", batch["image_tokens"], batch["text_tokens"], torch.full((5,), 6),
                           torch.ones(5, 6, dtype=torch.bool), torch.Generator().manual_seed(0))
    over = (text == end).long().cummax(1).values.bool()
    assert over.any() and (text[over] == end).all()


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_the_loss_is_that_of_each_next_token(task, causal, batch):
    """Place by place: the log probability of a token by the state before it, smoothed; 0.9 and 0.1."""
    causal.cfg.label_smoothing = 0.1
    terms = {name: term for part in argvlt.loss_terms(causal, task, batch, None) for name, term in part.items()}
    seq = whole(causal, task, batch)
    states, where, split = causal(seq), seq.layout, causal.cfg.codebook_size
    losses = {"image": [], "text": []}
    for b in range(5):
        for name in losses:
            places = getattr(where, name)
            for place in range(places.start, places.stop):
                if seq.is_valid[b, place]:
                    log_p = causal.score(states[b:b + 1, place - 1:place], name)[0, 0].log_softmax(0)
                    target = seq.token_ids[b, place] - (0 if name == "image" else split)
                    losses[name].append(-0.9 * log_p[target] - 0.1 * log_p.mean())
    image, text = (torch.stack(losses[name]).mean() for name in ("image", "text"))
    generated, condition = (image, text) if task == "t2i" else (text, image)
    assert torch.allclose(terms["generated"], generated, atol=1e-5)
    assert torch.allclose(terms["condition"], condition, atol=1e-5)
    assert torch.allclose(argvlt.total_loss(task, causal.cfg, **terms), 0.9 * generated + 0.1 * condition, atol=1e-5)


def test_what_a_causal_model_has_not():
    base = preset("base", model="argvlt")
    assert base.task_weights == (8.0, 2.0, 0.0) and not base.unroll_mask and base.mixsel == "off"
    for wrong in (dict(model="argvlt", task_weights=(1.0, 1.0, 1.0)), dict(model="argvlt", mixsel="select"),
                  dict(segments=True)):
        with pytest.raises(ValueError, match="argvlt"):
            preset("tiny", **wrong)
    with pytest.raises(ValueError, match="no it2it"):
        next(argvlt.loss_terms(None, "it2it", {}, None))
    assert sequence.layout("t2i", 4, 3).bog == 5 and sequence.layout("i2t", 4, 3).bog == 6
