from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanomagvlt import decoding
from nanomagvlt.config import preset
from nanomagvlt.data import shapes
from nanomagvlt.decoding import DecodeState, SamplingConfig, blank, decode, generate, predict_length, sampling_config
from nanomagvlt.evaluation import small_world
from nanomagvlt.masking import ORDERS, decoding_counts, halton_rank, sample
from nanomagvlt.sequence import KIND, TASKS, valid_mask
from nanomagvlt.tokenizers.bpe import BPE

IMAGE, TEXT = sampling_config(preset("base"), "image", rows=4), sampling_config(preset("base"), "text")
V = 9


def oracle(answer: torch.Tensor):
    """A model that knows the answer."""
    return lambda tokens, is_masked: 100.0 * F.one_hot(answer, V)


def unsure(seed: int = 0):
    """A model with random logits that depend on the visible tokens."""
    table = torch.randn(V + 1, 16, V, generator=torch.Generator().manual_seed(seed))

    def tokens_to_logits(tokens, is_masked):
        seen = tokens.masked_fill(is_masked, V)
        return table[seen, torch.arange(seen.shape[1])] + table[seen.roll(1, 1), torch.arange(seen.shape[1])]
    return tokens_to_logits


def known(rows=4, n=16, share=0.7):
    g = torch.Generator().manual_seed(3)
    to_fill = torch.rand(rows, n, generator=g) < share
    return torch.randint(V, (rows, n), generator=g), to_fill


def run(model, tokens, to_fill, config, seed=0):
    one = DecodeState(tokens, to_fill, config)
    decode(lambda k: [model(one.tokens, one.is_masked)], [one], torch.Generator().manual_seed(seed))
    return one.tokens, one.trace


@pytest.mark.parametrize("config", [IMAGE, TEXT], ids=["image", "text"])
def test_an_oracle_is_recovered_in_any_number_of_steps(config):
    answer = torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(1))
    for steps in range(1, 17):
        tokens, trace = run(oracle(answer), torch.zeros_like(answer), torch.ones_like(answer, dtype=torch.bool),
                            replace(config, steps=steps))
        assert torch.equal(tokens, answer) and len(trace) == steps


@pytest.mark.parametrize("config", [IMAGE, TEXT], ids=["image", "text"])
def test_known_tokens_stay_and_counts_are_followed_step_by_step(config):
    tokens, to_fill = known()
    config = replace(config, steps=5)
    filled, trace = run(unsure(), tokens, to_fill, config)
    counts = decoding_counts(to_fill.sum(1), 5, config.schedule, config.can_remask)
    assert torch.equal(torch.stack([step.is_masked.sum(1) for step in trace], 1), counts)
    assert torch.equal(filled[~to_fill], tokens[~to_fill])
    for step in trace:
        assert not (step.is_masked & ~to_fill).any()
        assert torch.equal(step.tokens[~to_fill], tokens[~to_fill])
    assert torch.equal(trace[-1].tokens, filled)


def test_a_kept_image_token_stays_and_a_text_token_can_change():
    tokens, to_fill = known(rows=50, share=1.1)
    _, trace = run(unsure(), tokens, to_fill, replace(IMAGE, steps=10))
    for before, after in zip(trace, trace[1:]):
        assert not (after.is_masked & ~before.is_masked).any()
        assert (after.is_masked.sum(1) < before.is_masked.sum(1)).all()
        kept = ~after.is_masked
        assert torch.equal(before.tokens[kept], after.tokens[kept])
        assert torch.equal(before.confidence[kept], after.confidence[kept])  # as when it was sampled
    _, trace = run(unsure(), tokens, to_fill, replace(TEXT, steps=10))
    assert any((after.is_masked & ~before.is_masked).any() for before, after in zip(trace, trace[1:]))


def test_more_steps_than_tokens_is_an_error_for_images_only():
    tokens, to_fill = known(share=0.3)
    with pytest.raises(ValueError, match="17 decoding steps"):
        run(unsure(), tokens, to_fill, replace(IMAGE, steps=17))
    assert run(unsure(), tokens, to_fill, replace(TEXT, steps=17))[0].shape == tokens.shape


@pytest.mark.parametrize("config", [IMAGE, TEXT], ids=["image", "text"])
def test_a_seed_gives_one_result_whatever_the_batch(config):
    tokens, to_fill = known(rows=3, share=1.1)
    first, again, other = (run(unsure(), tokens, to_fill, config, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(run(unsure(), tokens[:1], to_fill[:1], config)[0], first[:1])


def test_without_noise_the_most_confident_are_kept():
    """A model whose confidence falls from left to right."""
    logits = torch.zeros(1, 16, V)
    logits[0, :, 4] = torch.linspace(14, 7, 16)
    for config in (IMAGE, TEXT):
        still = replace(config, steps=4, order="confidence", temperature=(1.0, 1.0))
        _, trace = run(lambda tokens, is_masked: logits, torch.zeros(1, 16, dtype=torch.long),
                       torch.ones(1, 16, dtype=torch.bool), still)
        for step in trace[1:]:
            hidden = int(step.is_masked.sum())
            assert step.is_masked[0].tolist() == [False] * (16 - hidden) + [True] * hidden


def test_order_inverse_masks_in_proportion_to_one_over_p():
    """The positions to mask again are drawn with probabilities softmax(-log p) = (1/p) / sum(1/p)."""
    p = torch.tensor([0.9, 0.6, 0.3])
    logits = torch.stack([torch.tensor([q, 1 - q, 1e-30]).log() for q in p]).expand(20_000, 3, 3)
    config = replace(TEXT, steps=2, temperature=(1.0, 1.0))
    _, trace = run(lambda tokens, is_masked: logits, torch.zeros(20_000, 3, dtype=torch.long),
                   torch.ones(20_000, 3, dtype=torch.bool), config)
    chosen_p = trace[0].confidence.exp()                                                          # (M, 3)
    expected = ((1 / chosen_p) / (1 / chosen_p).sum(1, keepdim=True)).mean(0)
    assert torch.allclose(trace[1].is_masked.float().mean(0), expected, atol=0.012)


def test_sample_follows_the_distribution_and_top_k():
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    uniform = torch.rand(50_000, 1, generator=torch.Generator().manual_seed(0))
    logits = p.log().expand(50_000, 1, 5)
    token, chosen_p = sample(logits, uniform)
    assert torch.allclose(token.flatten().bincount(minlength=5) / 50_000, p, atol=0.01)
    assert torch.allclose(chosen_p, p[token])
    token, chosen_p = sample(logits, uniform, top_k=2)
    assert torch.allclose(token.flatten().bincount(minlength=5) / 50_000, torch.tensor([0.625, 0, 0.375, 0, 0]),
                          atol=0.01)
    edges = torch.tensor([[0.0], [1 - 2 ** -24]])
    assert sample(logits[:2], edges)[0].flatten().tolist() == [0, 4]


def test_with_top_k_1_only_the_likeliest_is_put_in():
    tokens, to_fill = known(share=1.1)
    logits = torch.randn(4, 16, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(lambda *_: logits, tokens, to_fill, replace(IMAGE, top_k=1))[0], logits.argmax(-1))


def fill(model, task, batch, to_fill=None, seed=0, steps=None, **options):
    """generate() with the model's settings; every generated piece is filled whole, or at to_fill."""
    pieces, cfg = TASKS[task].generates, model.cfg
    lengths = batch.get("text_lengths")
    everything = {piece: blank(cfg, 5, lengths if piece == "text" else None)[1] for piece in pieces}
    sampling = {piece: sampling_config(cfg, KIND[piece], **({"steps": steps} if steps else {})) for piece in pieces}
    return generate(model, task, batch, everything | (to_fill or {}), sampling, torch.Generator().manual_seed(seed),
                    **options)


def test_images_and_captions_of_a_real_model(cfg, model, batch):
    drawn, traces = fill(model, "t2i", batch)
    image_tokens = drawn["image_tokens"]
    assert image_tokens.shape == (5, cfg.image_tokens) and len(traces["image"]) == cfg.image_steps
    assert (0 <= image_tokens).all() and (image_tokens < cfg.codebook_size).all()
    lengths = predict_length(model, "i2t", {"image_tokens": image_tokens})
    assert ((1 <= lengths) & (lengths <= cfg.text_length)).all()
    written, traces = fill(model, "i2t", drawn | {"text_lengths": lengths})
    text_tokens = written["text_tokens"]
    assert (0 <= text_tokens).all() and (text_tokens < cfg.text_vocab).all() and len(traces["text"]) == cfg.text_steps


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", [IMAGE, TEXT], ids=["image", "text"])
def test_every_order_fills_all_and_touches_nothing_else(config, order):
    tokens, to_fill = known()
    filled, trace = run(unsure(), tokens, to_fill, replace(config, order=order, steps=5, noise=(1.0, 1.0)))
    assert torch.equal(filled[~to_fill], tokens[~to_fill])
    masks = torch.stack([step.is_masked for step in trace])                                          # (K, B, N)
    assert masks[0].equal(to_fill)
    if order == "halton":  # those kept have lower ranks than those hidden
        rank = halton_rank(config.rows, 16 // config.rows)
        for mask in masks[1:]:
            assert (rank.where(to_fill & ~mask, -1).max(1).values < rank.where(mask, 99).min(1).values).all()
    others = [run(unsure(), tokens, to_fill, replace(config, order=o, steps=5, noise=(1.0, 1.0)))[1] for o in ORDERS
              if o != order]
    assert not any(torch.equal(torch.stack([step.is_masked for step in other]), masks) for other in others)


def test_inpainting_keeps_the_known_tokens_and_ignores_the_masked_ones(model, batch):
    drawn = fill(model, "t2i", batch)[0]["image_tokens"]
    assert torch.equal(fill(model, "t2i", batch | {"image_tokens": drawn})[0]["image_tokens"], drawn)
    half = torch.arange(model.cfg.image_tokens) % 2 == 0
    painted = fill(model, "t2i", batch, {"image": half.expand(5, -1)}, steps=2)[0]["image_tokens"]
    assert torch.equal(painted[:, ~half], batch["image_tokens"][:, ~half])
    assert not torch.equal(painted[:, half], drawn[:, half])


def test_infilling_keeps_the_given_words(model, batch):
    to_fill = valid_mask(batch["text_lengths"], model.cfg.text_length) & (torch.arange(model.cfg.text_length) % 2 == 0)
    written = fill(model, "i2t", batch, {"text": to_fill})[0]
    assert torch.equal(written["text_tokens"][~to_fill], batch["text_tokens"][~to_fill])
    assert torch.equal(written["text_lengths"], batch["text_lengths"])
    assert not torch.equal(written["text_tokens"], batch["text_tokens"])


def test_guidance_of_one_is_none_and_zero_is_the_empty_caption(model, batch):
    rows = []
    model.register_forward_hook(lambda module, given, out: rows.append(len(out)))

    def draw(guidance, batch=batch):
        rows.clear()
        return fill(model, "t2i", batch, guidance=guidance)[0]["image_tokens"]
    draw(1.0)
    assert rows == [5] * model.cfg.image_steps       # no second branch
    draw(2.0)
    assert rows == [10] * model.cfg.image_steps      # both in one pass
    empty = batch | {"text_tokens": torch.full_like(batch["text_tokens"], model.cfg.end_token),
                     "text_lengths": torch.ones_like(batch["text_lengths"])}
    assert torch.equal(draw(0.0), draw(1.0, empty)) and torch.equal(draw(5.0, empty), draw(1.0, empty))
    assert not torch.equal(draw(5.0), draw(1.0))


def test_of_a_pair_the_length_is_predicted_again_before_each_step(cfg, model, batch, monkeypatch):
    """It first grows from 3 to 6, then falls to 2: new positions are masked and filled, lost ones are dropped."""
    predicted = iter([6, 6, 2])

    def predict(model, task, shown, masks):
        assert masks["image"].any() and (shown["image_tokens"] < cfg.codebook_size).all()
        return torch.full((5,), next(predicted))
    monkeypatch.setattr(decoding, "predict_length", predict)
    batch = batch | {"text_lengths": torch.full((5,), 3)}
    done, traces = fill(model, "it2it", batch, steps=4, update_length=True)
    seen = [step.is_masked[0].tolist() for step in traces["text"]]
    assert seen[0][:4] == [True] * 3 + [False] and seen[1][3:6] == [True] * 3
    assert not any(any(row[2:]) for row in seen[3:]) and done["text_lengths"].tolist() == [2] * 5
    assert len(traces["image"]) == 4 and (done["image_tokens"] < cfg.codebook_size).all()
    assert sum(seen[2]) == 3 == decoding_counts(torch.tensor([6]), 4, "linear", True)[0, 2]  # of the six there are then
    assert next(predicted, None) is None


def test_of_a_pair_what_is_given_stays(cfg, model, batch):
    holes, gaps = (torch.arange(n) % 2 == 0 for n in (cfg.image_tokens, cfg.text_length))
    gaps = gaps & valid_mask(batch["text_lengths"], cfg.text_length)                                 # (B, T)
    done, _ = fill(model, "it2it", batch, {"image": holes.expand(5, -1), "text": gaps}, steps=2)
    assert torch.equal(done["image_tokens"][:, ~holes], batch["image_tokens"][:, ~holes])
    assert torch.equal(done["text_tokens"][~gaps], batch["text_tokens"][~gaps])
    assert torch.equal(done["text_lengths"], batch["text_lengths"])
    with pytest.raises(ValueError, match="one number of steps"):
        fill(model, "it2it", batch)


def test_decoding_rules_are_those_of_the_release():
    assert sampling_config(preset("base"), "image") == SamplingConfig(
        10, "cosine", "gumbel", (1.4, 0.6), (2.0, 0.2), 0, can_remask=False, p_floor=2 ** -10, rows=16)
    assert sampling_config(preset("large"), "text") == SamplingConfig(
        12, "linear", "inverse", (0.1, 0.1), (0.0, 0.0), 32, can_remask=True,
        p_floor=torch.finfo(torch.float32).tiny, rows=1)
    assert preset("base").length_positions == 16


def test_temperature_at_both_ends_and_the_floor_of_confidence():
    """Tokens drawn at 1.4 in the first step and at 0.6 in the last; log p no lower than that of 2^-10."""
    logits = torch.tensor([0.0, -1.0, -12.0]).expand(4000, 16, 3)
    _, trace = run(lambda tokens, is_masked: logits, torch.zeros(4000, 16, dtype=torch.long),
                   torch.ones(4000, 16, dtype=torch.bool), IMAGE)
    for step, temperature in ((trace[0], 1.4), (trace[5], 1.4 - 0.8 * 5 / 9), (trace[-1], 0.6)):
        p = (logits[0, 0] / temperature).softmax(0)
        drawn, confidence = step.tokens[step.is_masked], step.confidence[step.is_masked]
        assert torch.allclose(confidence, p.clamp(min=2.0 ** -10).log()[drawn])
        assert abs((drawn == 0).float().mean() - p[0]) < 0.02
    assert (trace[0].tokens == 2).any() and p[2] < 2.0 ** -10


class NoSync(TorchDispatchMode):
    """Refuses what makes the CPU wait for a GPU: a tensor read as a number, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
        assert not any(word in str(func) for word in waits), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["gumbel", "halton"])
@pytest.mark.parametrize("task, guidance", [("t2i", 1.0), ("t2i", 2.0), ("i2t", 1.0), ("it2it", 1.0)])
def test_a_decoding_step_waits_for_nothing_and_builds_no_large_mask(task, guidance, order, cfg, model, batch,
                                                                    monkeypatch):
    length, attend, no_sync = cfg.image_tokens + cfg.text_length + 4, F.scaled_dot_product_attention, NoSync()
    masks, entered = [], []

    def watched(*args, attn_mask=None, **options):
        if not entered:  # from the first pass through the model on
            entered.append(no_sync.__enter__())
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attend(*args, attn_mask=attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for name in ("decoding_counts", "halton_rank"):  # computed on the CPU, so before the first step
        def in_time(*args, original=getattr(decoding, name)):
            assert not entered
            return original(*args)
        monkeypatch.setattr(decoding, name, in_time)
    model.cfg = replace(cfg, image_order=order, text_order=order)
    fill(model, task, batch, steps=3, guidance=guidance, update_length=task == "it2it")
    no_sync.__exit__(None, None, None)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():  # it does notice a wait
        bool(batch["text_lengths"].min() > 0)
    shorter, up_to_bot = length - cfg.text_length + cfg.length_positions, cfg.image_tokens + 4
    assert set(masks) <= {(5, 1, 1, length), (10, 1, 1, length), (5, 1, 1, shorter), (5, 1, 1, up_to_bot)}


def test_where_probabilities_are_exact_every_caption_is_right():
    """The model is replaced by all true captions of a scene that have the given length, equally likely. A token a step,
    as the tiny preset decodes: so errors in a trained model's captions do not come from the loop."""
    rng, config, level = Random(0), sampling_config(preset("tiny"), "text"), shapes.get_level("tiny")
    wrong = 0
    scenes = small_world.unseen_scenes(level, 1000)
    bpe = BPE.train([shapes.describe(scene, level, rng) for scene in scenes], 100)
    for seed, scene in enumerate(scenes):
        texts = [bpe.encode(caption) for caption in shapes.captions(scene, level)]
        length = len(rng.choice(texts))
        texts = torch.tensor([text for text in texts if len(text) == length])                        # (C, length)
        one = DecodeState(torch.zeros_like(texts[:1]), torch.ones_like(texts[:1], dtype=torch.bool), config)

        def predict_logits(k):
            fits = ((texts == one.tokens) | one.is_masked).all(dim=1)                                # (C,)
            return [F.one_hot(texts[fits], bpe.vocab_size).float().mean(0)[None].log()]              # (1, length, V)
        decode(predict_logits, [one], torch.Generator().manual_seed(seed))
        wrong += not shapes.judge(shapes.parse(bpe.decode(one.tokens[0].tolist())), scene).exact
    assert wrong == 0 and len(scenes) == 184
