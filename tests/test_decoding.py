from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nanomagvlt.decoding as decode_module
from nanomagvlt.data import shapes
from nanomagvlt.evaluation import small_world
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.config import preset
from nanomagvlt.decoding import (DecodeState, SamplingConfig, blank_image, blank_text, decode, draw_image, draw_pair, image_recipe,
                               predict_length, text_recipe, write_text)
from nanomagvlt.masking import ORDERS, decoding_counts, halton_rank, sample
from nanomagvlt.sequence import valid_mask

IMAGE, TEXT = replace(image_recipe(preset("base")), rows=4), text_recipe(preset("base"))
V = 9


def oracle(answer: torch.Tensor):
    """A model that knows the answer."""
    return lambda tokens, is_masked: 100.0 * F.one_hot(answer, V)


def unsure(seed: int = 0):
    """A model whose opinion is random, and depends on what is visible."""
    table = torch.randn(V + 1, 16, V, generator=torch.Generator().manual_seed(seed))

    def tokens_to_logits(tokens, is_masked):
        seen = tokens.masked_fill(is_masked, V)
        return table[seen, torch.arange(seen.shape[1])] + table[seen.roll(1, 1), torch.arange(seen.shape[1])]
    return tokens_to_logits


def canvas(rows=4, n=16, share=0.7):
    g = torch.Generator().manual_seed(3)
    to_fill = torch.rand(rows, n, generator=g) < share
    return torch.randint(V, (rows, n), generator=g), to_fill


def run(model, tokens, to_fill, recipe, seed=0):
    one = DecodeState(tokens, to_fill, recipe)
    decode(lambda: [model(one.tokens, one.is_masked)], [one], torch.Generator().manual_seed(seed))
    return one.tokens, one.trace


def with_steps(recipe: SamplingConfig, steps: int) -> SamplingConfig:
    return replace(recipe, steps=steps)


@pytest.mark.parametrize("recipe", [IMAGE, TEXT], ids=["image", "text"])
def test_an_oracle_is_recovered_in_any_number_of_steps(recipe):
    answer = torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(1))
    for steps in range(1, 17):
        tokens, trace = run(oracle(answer), torch.zeros_like(answer), torch.ones_like(answer, dtype=torch.bool),
                            with_steps(recipe, steps))
        assert torch.equal(tokens, answer) and len(trace) == steps


@pytest.mark.parametrize("recipe", [IMAGE, TEXT], ids=["image", "text"])
def test_known_tokens_stay_and_counts_are_followed_step_by_step(recipe):
    tokens, to_fill = canvas()
    recipe = with_steps(recipe, 5)
    filled, trace = run(unsure(), tokens, to_fill, recipe)
    counts = decoding_counts(to_fill.sum(1), 5, recipe.schedule, recipe.can_remask)
    assert torch.equal(torch.stack([step.is_masked.sum(1) for step in trace], 1), counts)
    assert torch.equal(filled[~to_fill], tokens[~to_fill])
    for step in trace:
        assert not (step.is_masked & ~to_fill).any()
        assert torch.equal(step.tokens[~to_fill], tokens[~to_fill])
    assert torch.equal(trace[-1].tokens, filled)


def test_an_image_token_once_drawn_stays_and_a_text_token_may_change():
    tokens, to_fill = canvas(rows=50, share=1.1)
    _, trace = run(unsure(), tokens, to_fill, with_steps(IMAGE, 10))
    for before, after in zip(trace, trace[1:]):
        assert not (after.is_masked & ~before.is_masked).any()
        assert (after.is_masked.sum(1) < before.is_masked.sum(1)).all()
        kept = ~after.is_masked
        assert torch.equal(before.tokens[kept], after.tokens[kept])
        assert torch.equal(before.confidence[kept], after.confidence[kept])  # as sure as when it was drawn
    _, trace = run(unsure(), tokens, to_fill, with_steps(TEXT, 10))
    assert any((after.is_masked & ~before.is_masked).any() for before, after in zip(trace, trace[1:]))


def test_more_steps_than_image_tokens_is_an_error_for_text_it_is_not():
    tokens, to_fill = canvas(share=0.3)
    with pytest.raises(ValueError, match="17 decoding steps"):
        run(unsure(), tokens, to_fill, with_steps(IMAGE, 17))
    assert run(unsure(), tokens, to_fill, with_steps(TEXT, 17))[0].shape == tokens.shape


@pytest.mark.parametrize("recipe", [IMAGE, TEXT], ids=["image", "text"])
def test_a_seed_gives_one_result_whatever_the_batch(recipe):
    tokens, to_fill = canvas(rows=3, share=1.1)
    first, again, other = (run(unsure(), tokens, to_fill, recipe, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(run(unsure(), tokens[:1], to_fill[:1], recipe)[0], first[:1])


def test_without_noise_the_most_confident_are_kept():
    """A model whose confidence falls from left to right."""
    logits = torch.zeros(1, 16, V)
    logits[0, :, 4] = torch.linspace(14, 7, 16)
    for recipe in (IMAGE, TEXT):
        still = replace(recipe, steps=4, order="confidence", temperature=(1.0, 1.0))
        _, trace = run(lambda tokens, is_masked: logits, torch.zeros(1, 16, dtype=torch.long),
                       torch.ones(1, 16, dtype=torch.bool), still)
        for step in trace[1:]:
            hidden = int(step.is_masked.sum())
            assert step.is_masked[0].tolist() == [False] * (16 - hidden) + [True] * hidden


def test_text_places_are_hidden_in_proportion_to_their_doubt():
    """SPEC 7: the places to mask again are drawn with weights softmax(-log p) = (1/p) / sum(1/p)."""
    p = torch.tensor([0.9, 0.6, 0.3])
    logits = torch.stack([torch.tensor([q, 1 - q, 1e-30]).log() for q in p]).expand(20_000, 3, 3)
    recipe = replace(TEXT, steps=2, temperature=(1.0, 1.0))
    _, trace = run(lambda tokens, is_masked: logits, torch.zeros(20_000, 3, dtype=torch.long),
                   torch.ones(20_000, 3, dtype=torch.bool), recipe)
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
    tokens, to_fill = canvas(share=1.1)
    logits = torch.randn(4, 16, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(lambda *_: logits, tokens, to_fill, replace(IMAGE, top_k=1))[0], logits.argmax(-1))


def test_images_and_captions_of_a_real_model(cfg, model, batch):
    image_tokens, trace = draw_image(model, batch["text_tokens"], batch["text_lengths"],
                                     torch.Generator().manual_seed(0))
    assert image_tokens.shape == (5, cfg.image_tokens) and len(trace) == cfg.image_steps
    assert (0 <= image_tokens).all() and (image_tokens < cfg.codebook_size).all()
    text_tokens, lengths, trace = write_text(model, image_tokens, torch.Generator().manual_seed(0))
    assert torch.equal(lengths, predict_length(model, image_tokens, torch.zeros_like(image_tokens, dtype=torch.bool)))
    assert ((1 <= lengths) & (lengths <= cfg.text_length)).all()
    assert (0 <= text_tokens).all() and (text_tokens < cfg.text_vocab).all() and len(trace) == cfg.text_steps
    given = torch.tensor([1, 2, 3, 4, 6])
    assert torch.equal(write_text(model, image_tokens, torch.Generator().manual_seed(0), given)[1], given)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recipe", [IMAGE, TEXT], ids=["image", "text"])
def test_every_order_fills_all_and_touches_nothing_else(recipe, order):
    tokens, to_fill = canvas()
    filled, trace = run(unsure(), tokens, to_fill, replace(recipe, order=order, steps=5))
    assert torch.equal(filled[~to_fill], tokens[~to_fill])
    masks = torch.stack([step.is_masked for step in trace])                                          # (K, B, N)
    assert masks[0].equal(to_fill)
    if order == "halton":  # those kept have lower ranks than those hidden
        rank = halton_rank(recipe.rows, 16 // recipe.rows)
        for mask in masks[1:]:
            assert (rank.where(to_fill & ~mask, -1).max(1).values < rank.where(mask, 99).min(1).values).all()
    others = [run(unsure(), tokens, to_fill, replace(recipe, order=o, steps=5))[1] for o in ORDERS if o != order]
    assert not any(torch.equal(torch.stack([step.is_masked for step in other]), masks) for other in others)


def test_an_image_all_of_which_is_to_be_made_anew_is_a_new_image(model, batch):
    """Inpainting is drawing: what is hidden does not matter, what is known stays, and is seen."""
    text, chance = (batch["text_tokens"], batch["text_lengths"]), torch.Generator
    drawn, _ = draw_image(model, *text, chance().manual_seed(0))
    all_hidden = DecodeState(*blank_image(model.cfg, 5), image_recipe(model.cfg))
    all_hidden.tokens = batch["image_tokens"]
    assert torch.equal(draw_image(model, *text, chance().manual_seed(0), all_hidden)[0], drawn)
    half = torch.arange(model.cfg.image_tokens) % 2 == 0
    recipe = replace(image_recipe(model.cfg), steps=2)
    painted, _ = draw_image(model, *text, chance().manual_seed(0),
                            DecodeState(batch["image_tokens"], half.expand(5, -1), recipe))
    assert torch.equal(painted[:, ~half], batch["image_tokens"][:, ~half])
    assert not torch.equal(painted[:, half], drawn[:, half])


def test_given_words_stay(model, batch):
    lengths = batch["text_lengths"]
    to_fill = valid_mask(lengths, model.cfg.text_length) & (torch.arange(model.cfg.text_length) % 2 == 0)
    written, same, _ = write_text(model, batch["image_tokens"], torch.Generator().manual_seed(0), lengths,
                                  DecodeState(batch["text_tokens"], to_fill, text_recipe(model.cfg)))
    assert torch.equal(written[~to_fill], batch["text_tokens"][~to_fill]) and torch.equal(same, lengths)
    assert not torch.equal(written, batch["text_tokens"])
    with pytest.raises(ValueError, match="wants text_lengths"):
        write_text(model, batch["image_tokens"], torch.Generator(), canvas=DecodeState(written, to_fill, TEXT))


def test_guidance_of_one_is_none_and_more_goes_away_from_the_empty_caption(model, batch):
    rows = []
    model.register_forward_hook(lambda module, given, out: rows.append(len(out)))

    def draw(guidance, tokens=batch["text_tokens"], lengths=batch["text_lengths"]):
        rows.clear()
        return draw_image(model, tokens, lengths, torch.Generator().manual_seed(0), guidance=guidance)[0]
    draw(1.0)
    assert rows == [5] * model.cfg.image_steps       # no second branch
    draw(2.0)
    assert rows == [10] * model.cfg.image_steps      # both in one pass
    empty = torch.full_like(batch["text_tokens"], model.cfg.text_vocab - 1), torch.ones_like(batch["text_lengths"])
    assert torch.equal(draw(0.0), draw(1.0, *empty))     # all null, none of what is given
    assert torch.equal(draw(5.0, *empty), draw(1.0, *empty))
    assert not torch.equal(draw(5.0), draw(1.0))


def test_a_pair_is_drawn_together_its_length_read_again(cfg, model, batch, monkeypatch):
    """The length first grows from 3 to 6, then falls to 2: new places are masked and filled, lost ones are dropped."""
    said = iter([6, 6, 2])

    def predict(model, tokens, is_masked):
        assert tokens is image.tokens and is_masked is image.is_masked and is_masked.any()
        return torch.full((5,), next(said))
    monkeypatch.setattr("nanomagvlt.decoding.predict_length", predict)
    image = DecodeState(*blank_image(cfg, 5), replace(image_recipe(cfg), steps=4))
    start = torch.full((5,), 3)
    text = DecodeState(*blank_text(cfg, start), replace(text_recipe(cfg), steps=4))
    _, _, lengths = draw_pair(model, image, text, start, torch.Generator().manual_seed(0))
    seen = [step.is_masked[0].tolist() for step in text.trace]
    assert seen[0][:4] == [True] * 3 + [False] and seen[1][3:6] == [True] * 3
    assert not any(any(row[2:]) for row in seen[3:]) and lengths.tolist() == [2] * 5
    assert len(image.trace) == 4 and (image.tokens < cfg.codebook_size).all()
    assert text.to_fill[0].tolist() == [True] * 2 + [False] * (cfg.text_length - 2)
    assert sum(seen[2]) == 3 == decoding_counts(torch.tensor([6]), 4, "linear", True)[0, 2]  # of the six there are then
    with pytest.raises(StopIteration):
        next(said)


def test_of_a_pair_what_is_given_stays(cfg, model, batch):
    lengths = batch["text_lengths"]
    holes, gaps = (torch.arange(n) % 2 == 0 for n in (cfg.image_tokens, cfg.text_length))
    image = DecodeState(batch["image_tokens"], holes.expand(5, -1), replace(image_recipe(cfg), steps=2))
    gaps = gaps & valid_mask(lengths, cfg.text_length)                                              # (B, T)
    text, given = DecodeState(batch["text_tokens"], gaps, replace(text_recipe(cfg), steps=2)), ~gaps
    image_tokens, text_tokens, same = draw_pair(model, image, text, lengths, torch.Generator().manual_seed(0), True)
    assert torch.equal(image_tokens[:, ~holes], batch["image_tokens"][:, ~holes]) and torch.equal(same, lengths)
    assert torch.equal(text_tokens[given], batch["text_tokens"][given])
    image.recipe = replace(image.recipe, steps=1)
    with pytest.raises(ValueError, match="one number of steps, not 1 and 2"):
        draw_pair(model, image, text, lengths, torch.Generator(), True)


def test_decoding_rules_are_those_of_the_release():
    assert image_recipe(preset("base")) == SamplingConfig(10, "cosine", "gumbel", False, (1.4, 0.6), (2.0, 0.2), 0, 2 ** -10,
                                                  16)
    assert text_recipe(preset("large")) == SamplingConfig(12, "linear", "gumbel", True, (0.1, 0.1), (-1.0, -1.0), 32,
                                                  torch.finfo(torch.float32).tiny, 1)
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
    """Refuses what makes a GPU wait for the CPU: a tensor read as a number, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
        assert not any(word in str(func) for word in waits), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["gumbel", "halton"])
@pytest.mark.parametrize("task", ["draw", "write", "guided", "pair"])
def test_a_decoding_step_waits_for_nothing_and_makes_no_large_mask(task, order, cfg, model, batch, monkeypatch):
    length, attend, no_sync = cfg.image_tokens + cfg.text_length + 4, F.scaled_dot_product_attention, NoSync()
    masks, entered = [], []

    def watched(*args, attn_mask=None, **options):
        if not entered:  # from the first look at the model on
            entered.append(no_sync.__enter__())
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attend(*args, attn_mask=attn_mask, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    # What is worked out on the CPU must be so before the first step: a copy to a GPU waits too.
    for name in ("decoding_counts", "halton_rank"):
        def in_time(*args, original=getattr(decode_module, name)):
            assert not entered
            return original(*args)
        monkeypatch.setattr(decode_module, name, in_time)
    chance, lengths = torch.Generator().manual_seed(0), torch.tensor([1, 2, 3, 5, 6])
    image = DecodeState(*blank_image(cfg, 5), replace(image_recipe(cfg), order=order, steps=3))
    text = DecodeState(*blank_text(cfg, lengths), replace(text_recipe(cfg), order=order, steps=3))
    if task in ("draw", "guided"):
        draw_image(model, batch["text_tokens"], batch["text_lengths"], chance, image, 1.0 if task == "draw" else 2.0)
    elif task == "write":
        write_text(model, batch["image_tokens"], chance, lengths, text)
    else:
        draw_pair(model, image, text, lengths, chance)
    no_sync.__exit__(None, None, None)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():  # it does see what it is to see
        bool(batch["text_lengths"].min() > 0)
    shorter = length - cfg.text_length + cfg.length_positions
    assert set(masks) <= {(5, 1, 1, length), (10, 1, 1, length), (5, 1, 1, shorter), None} and len(masks) > cfg.layers


def test_where_probabilities_are_exact_every_caption_is_right():
    """In the model's place all captions that are true of a scene and have the length asked for, equally likely. A token
    a step, as the tiny preset decodes: what is wrong in a trained model's captions is then not the loop's doing."""
    rng, recipe, wrong = Random(0), text_recipe(preset("tiny")), 0
    scenes = small_world.unseen_scenes(shapes.get_level("tiny"), 1000)
    bpe = BPE.train([shapes.describe(scene, "tiny", rng) for scene in scenes], 100)
    for seed, scene in enumerate(scenes):
        texts = [bpe.encode(caption) for caption in shapes.captions(scene, "tiny")]
        length = len(rng.choice(texts))
        texts = torch.tensor([text for text in texts if len(text) == length])                        # (C, length)
        one = DecodeState(torch.zeros_like(texts[:1]), torch.ones_like(texts[:1], dtype=torch.bool), recipe)

        def guess():
            fits = ((texts == one.tokens) | one.is_masked).all(dim=1)                                # (C,)
            return [F.one_hot(texts[fits], bpe.vocab_size).float().mean(0)[None].log()]              # (1, length, V)
        decode(guess, [one], torch.Generator().manual_seed(seed))
        wrong += not shapes.judge(shapes.parse(bpe.decode(one.tokens[0].tolist())), scene).exact
    assert wrong == 0 and len(scenes) == 184
