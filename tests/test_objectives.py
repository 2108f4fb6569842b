"""The objective, on a real small model where gradients matter, and on tokens alone where numbers do."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from nanomagvlt import objectives, sequence
from nanomagvlt.objectives import (first_half, sample_masks, remask, join_images, join_texts, loss_terms,
                                   masked_cross_entropy, mixsel, partners, total_loss)

WHOLE = dict(length_weight=0.01, unroll_mask=True, mixsel="select", mixsel_separators=1, text_vocab=100)


@pytest.fixture
def whole(cfg):
    """A model whose configuration switches everything on."""
    from nanomagvlt.model import MAGVLT
    torch.manual_seed(0)
    return MAGVLT(dataclasses.replace(cfg, **WHOLE).check()).eval()


def terms_of(model, task, batch, uniform) -> dict[str, torch.Tensor]:
    return {name: term for terms in loss_terms(model, task, batch, uniform) for name, term in terms.items()}


def watched(model, monkeypatch) -> list[sequence.Sequence]:
    """Every sequence that a model is asked about from now on."""
    seen, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, seq: seen.append(seq) or forward(self, seq))
    return seen


@pytest.mark.parametrize("ratio", ["opposite", "same"])
@pytest.mark.parametrize("task", sequence.TASKS)
def test_hides_exactly_the_papers_number_and_never_what_may_not(task, ratio, cfg):
    """For every ratio: ceil(gamma(r) N) image tokens and ceil(gamma(r) length) text tokens."""
    steps, n, t = 1000, 16, 24
    r = torch.arange(steps) / steps
    lengths = torch.arange(steps) % t + 1
    g = torch.Generator().manual_seed(0)
    cfg.it2it_ratio = ratio

    def uniform(purpose: str, *shape: int) -> torch.Tensor:
        return torch.rand(steps, *shape, generator=g) if shape else r
    text_maskable = sequence.valid_mask(lengths, t) & (task != "t2i")
    image, text = sample_masks(task, torch.full((steps, n), task != "i2t"), text_maskable, uniform, "", cfg)
    image_share = torch.cos(r.double() * torch.pi / 2)
    text_share = r.double() if task == "it2it" and ratio == "opposite" else 1 - r.double()
    expected_image = (image_share * n - 1e-6).ceil().clamp(min=1).long() * (task != "i2t")
    expected_text = (text_share * lengths - 1e-6).ceil().clamp(min=1).long() * (task != "t2i")
    assert torch.equal(image.sum(1), expected_image)
    assert torch.equal(text.sum(1), expected_text)
    assert not (text & ~text_maskable).any()


def test_cross_entropy_is_the_mean_over_masked_places_alone():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=g, requires_grad=True)
    targets = torch.randint(11, (5, 7), generator=g)
    is_masked = torch.rand(5, 7, generator=g) < 0.4
    loss = masked_cross_entropy(logits, targets, is_masked, smoothing=0.1)
    log_p = logits.log_softmax(-1)
    smooth = 0.9 * F.one_hot(targets, 11) + 0.1 / 11
    assert torch.allclose(loss, -(smooth * log_p).sum(-1)[is_masked].mean())
    loss.backward()
    assert (logits.grad[~is_masked] == 0).all() and (logits.grad[is_masked] != 0).all()
    assert masked_cross_entropy(logits, targets, torch.zeros_like(is_masked), 0.1) == 0


@pytest.mark.parametrize("task", sequence.TASKS)
def test_the_mask_loss_of_a_model_is_that_of_its_masked_logits(task, cfg, model, batch, uniform, monkeypatch):
    seen = watched(model, monkeypatch)
    terms = terms_of(model, task, batch, uniform)
    seq, expected = seen[0], 0.0
    states = model(seq)
    for name, logits in (("image", model.image_logits(states, seq.layout)),
                         ("text", model.text_logits(states, seq.layout))):
        is_masked = seq.is_masked[:, getattr(seq.layout, name)]
        if is_masked.any():
            expected += F.cross_entropy(logits[is_masked], batch[f"{name}_tokens"][is_masked])
    assert torch.allclose(terms["mask"], expected)
    assert set(terms) == ({"mask"} if task == "t2i" else {"mask", "length"})


@pytest.mark.parametrize("task", sequence.TASKS)
def test_equation_6(task, whole, batch, uniform):
    """The sum, written out; and its gradient, whether back-propagated as one or part by part."""
    terms, cfg = terms_of(whole, task, batch, uniform), whole.cfg
    assert set(terms) == {"t2i": {"mask", "unroll", "mixsel"}, "i2t": {"mask", "length", "unroll", "mixsel"},
                          "it2it": {"mask", "length", "mixsel"}}[task]
    expected = terms["mask"] + 0.5 * terms["mixsel"]
    if task != "t2i":
        expected = expected + 0.01 * terms["length"]
    if task != "it2it":
        expected = expected + terms["unroll"]
    loss = total_loss(task, cfg, **terms)
    assert torch.allclose(loss, expected) and all(term > 0 for term in terms.values())
    parameters = [p for name, p in whole.named_parameters() if task != "t2i" or name != "length.weight"]
    at_once = torch.autograd.grad(loss, parameters)
    whole.zero_grad()
    for part in loss_terms(whole, task, batch, uniform):
        total_loss(task, cfg, **part).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(at_once, parameters))


def test_a_term_that_is_in_no_sum_is_an_error(cfg):
    with pytest.raises(TypeError, match="count"):
        total_loss("t2i", cfg, mask=torch.tensor(1.0), count=torch.tensor(1.0))


@pytest.mark.parametrize("task", sequence.TASKS)
def test_nothing_is_drawn_twice_with_the_same_numbers(task, whole, batch, uniform):
    """Each pass, and in it image and text, has numbers of its own: else UnrollMask would hide the same places first."""
    asked = []
    terms_of(whole, task, batch, lambda purpose, *shape: asked.append(purpose) or uniform(purpose, *shape))
    assert len(set(asked)) == len(asked)
    passes = {"main", "mix"} | ({"unroll"} if task != "it2it" else set())
    assert {purpose.split()[0] for purpose in asked if "places" in purpose} == passes


@pytest.mark.parametrize("setting, value", [("label_smoothing", 0.1), ("dropout", 0.5), ("precision", "bf16")])
def test_a_setting_of_training_is_in_every_term(setting, value, cfg, batch, uniform):
    """Of the same weights and masks: no term of any pass stays what it was."""
    from nanomagvlt.model import MAGVLT
    terms = []
    for changes in ({}, {setting: value}):
        torch.manual_seed(0)
        model = MAGVLT(dataclasses.replace(cfg, **WHOLE, **changes).check()).train()
        terms.append(terms_of(model, "i2t", batch, uniform))
    unsmoothed = {"length"} if setting == "label_smoothing" else set()  # a length is no token
    assert {name for name in terms[0] if terms[0][name] == terms[1][name]} == unsmoothed


@pytest.mark.parametrize("task", sequence.TASKS)
def test_padding_does_not_touch_loss_or_gradient(task, whole, batch, uniform):
    is_padding = ~sequence.valid_mask(batch["text_lengths"], whole.cfg.text_length)
    other = dict(batch, text_tokens=torch.where(is_padding, (batch["text_tokens"] + 7) % 20, batch["text_tokens"]))
    gradients = []
    for b in (batch, other):
        whole.zero_grad()
        total_loss(task, whole.cfg, **terms_of(whole, task, b, uniform)).backward()
        gradients.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("task", sequence.TASKS)
def test_places_that_are_padding_in_all_the_batch_may_be_left_out(task, whole, batch, uniform):
    """Of mixed captions too: nothing is cut there that would not be cut with them."""
    whole.cfg.mixsel_separators, batch["text_lengths"] = 2, torch.tensor([1, 2, 2, 1, 2])
    batch["text_tokens"].scatter_(1, batch["text_lengths"][:, None] - 1, whole.cfg.text_vocab - 1)       # end tokens

    def same(purpose: str, *shape: int) -> torch.Tensor:  # numbers for a place, whatever the places after it
        return uniform(purpose, *[8] * len(shape))[(..., *map(slice, shape))]
    short = dict(batch, text_tokens=batch["text_tokens"][:, :2])
    for name, term in terms_of(whole, task, batch, same).items():
        assert torch.allclose(term, terms_of(whole, task, short, same)[name], rtol=1e-5), name


def test_captions_are_left_out_in_t2i_alone(whole, batch, uniform, monkeypatch):
    """An empty caption is its end token; MixSel, whose contexts must say something, keeps the captions."""
    seen, build = [], objectives.sequence.build
    monkeypatch.setattr(objectives.sequence, "build", lambda *args: seen.append(args) or build(*args))
    whole.cfg.condition_dropout = 0.5
    terms_of(whole.eval(), "t2i", batch, uniform)
    assert torch.equal(seen[0][6], batch["text_lengths"])  # not in validation
    seen.clear()
    whole.train()
    dropped = uniform("captions left out") < 0.5
    assert dropped.any() and not dropped.all()
    terms_of(whole, "t2i", batch, uniform)
    for task, _, _, _, text_tokens, _, lengths in (args[:7] for args in seen[:2]):  # the main pass and UnrollMask's
        assert (lengths[dropped] == 1).all() and (text_tokens[dropped, 0] == whole.cfg.text_vocab - 1).all()
        assert torch.equal(lengths[~dropped], batch["text_lengths"][~dropped])
    assert (seen[2][6] > 2).all()
    seen.clear()
    terms_of(whole, "i2t", batch, uniform)
    assert torch.equal(seen[0][6], batch["text_lengths"])


@pytest.mark.parametrize("length_pass", ["own", "main"])
def test_length_counts_from_one_and_its_own_pass_shows_nothing_of_it(length_pass, cfg, model, batch, uniform,
                                                                     monkeypatch):
    cfg.length_pass, seen = length_pass, watched(model, monkeypatch)
    model.length.weight.data.zero_()
    assert torch.allclose(terms_of(model, "i2t", batch, uniform)["length"], torch.tensor(float(cfg.text_length)).log())
    model.length_logits = lambda states, layout: 100.0 * F.one_hot(batch["text_lengths"] - 1, cfg.text_length)
    assert terms_of(model, "i2t", batch, uniform)["length"] < 1e-6
    seen.clear()
    model.eval()
    terms_of(model, "it2it", batch, uniform)  # of the image no more is shown than in the main pass
    assert torch.equal(seen[-1].is_masked[:, seen[-1].layout.image], seen[0].is_masked[:, seen[0].layout.image])
    assert seen[0].is_masked[:, seen[0].layout.image].any()
    terms_of(model, "i2t", batch, uniform)
    seen_text = seen[-1].is_valid[:, seen[-1].layout.text]
    if length_pass == "own":
        assert (seen_text.sum(1) == cfg.length_positions).all()
        assert (seen[-1].is_masked[:, seen[-1].layout.text] == seen_text).all()
    else:
        assert torch.equal(seen_text.sum(1), batch["text_lengths"])


# ---- UnrollMask

@pytest.mark.parametrize("task, everywhere", [("t2i", False), ("i2t", False), ("i2t", True)])
def test_fewer_are_hidden_again_of_those_that_were(task, everywhere, cfg):
    rows, n = 2000, 16
    cfg.unroll_text = "all" if everywhere else "masked"
    r = torch.arange(rows, dtype=torch.float64) / rows
    was = torch.rand(rows, n, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1) < (
        torch.arange(rows) % n + 1)[:, None]
    g = torch.Generator().manual_seed(1)
    nothing, full = torch.zeros_like(was), {"text_lengths": torch.full((rows,), n)}
    image, text = remask(task, full, *((was, nothing) if task == "t2i" else (nothing, was)),
                             lambda purpose, *shape: torch.rand(rows, n, generator=g) if shape else r, cfg)
    again, shown = (image, text) if task == "t2i" else (text, image)
    share = torch.cos(r * torch.pi / 2) if task == "t2i" else 1 - r
    assert torch.equal(again.sum(1), (share * was.sum(1) + 1e-9).floor().clamp(min=1).long()) and not shown.any()
    assert (again & ~was).any() == everywhere


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_parts_of_a_batch_add_up_to_the_whole(task, whole, batch, uniform):
    """Rows of unequal length, halved; each half's means are over what both score. MixSel needs its partners: off."""
    whole.cfg.mixsel = "off"
    expected = terms_of(whole, task, batch, uniform)
    halves = [({name: tensor[rows] for name, tensor in batch.items()},
               lambda purpose, *shape, rows=rows: uniform(purpose, *shape)[rows])
              for rows in (slice(0, 2), slice(2, 5))]
    each = [objectives.num_scored(task, part, numbers, whole.cfg) for part, numbers in halves]
    counts = {name: each[0][name] + each[1][name] for name in each[0]}
    found = [{name: term for terms in loss_terms(whole, task, part, numbers, counts) for name, term in terms.items()}
             for part, numbers in halves]
    for name in expected:
        assert torch.allclose(found[0][name] + found[1][name], expected[name], atol=1e-6), name


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_what_is_counted_is_what_is_scored(task, whole, batch, uniform, monkeypatch):
    scored, original = [], objectives.masked_cross_entropy
    monkeypatch.setattr(objectives, "masked_cross_entropy", lambda logits, targets, is_masked, smoothing, count: (
        scored.append(int(is_masked.sum())) or original(logits, targets, is_masked, smoothing, count)))
    terms = terms_of(whole, task, batch, uniform)
    counts = objectives.num_scored(task, batch, uniform, whole.cfg)
    wanted = {"t2i": [0], "i2t": [1], "it2it": [0, 1]}[task]
    assert scored == [int(counts[name][i]) for name in ("mask", "unroll", "mixsel") if name in terms for i in wanted]
    assert counts["length"] == 5 and set(terms) <= set(counts)


@pytest.mark.parametrize("text", ["masked", "all"])
@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_unroll_mask_sees_guesses_and_is_asked_for_the_originals(task, text, whole, batch, uniform, monkeypatch):
    whole.cfg.unroll_text, whole.cfg.mixsel = text, "off"
    seen, asked, original = watched(whole, monkeypatch), [], objectives.masked_cross_entropy
    monkeypatch.setattr(objectives, "masked_cross_entropy", lambda logits, targets, is_masked, smoothing, count: (
        asked.append(targets) or original(logits, targets, is_masked, smoothing, count)))
    terms_of(whole, task, batch, uniform)
    name = "image" if task == "t2i" else "text"
    main, unrolled = ({"ids": seq.token_ids[:, getattr(seq.layout, name)],
                       "masked": seq.is_masked[:, getattr(seq.layout, name)]} for seq in (seen[0], seen[-1]))
    offset = 0 if task == "t2i" else whole.cfg.codebook_size
    tokens = batch[f"{name}_tokens"] + offset
    guessed = main["masked"] & ~unrolled["masked"]
    assert all(torch.equal(targets, batch[f"{name}_tokens"]) for targets in asked)                # the originals,
    assert (unrolled["ids"][guessed] != tokens[guessed]).any()                                    # the input differs,
    untouched = ~main["masked"] & ~unrolled["masked"]
    assert torch.equal(unrolled["ids"][untouched], tokens[untouched])                             # but only there
    if not (task == "i2t" and text == "all"):
        assert not (unrolled["masked"] & ~main["masked"]).any()
    assert not (unrolled["masked"] & ~seen[0].is_valid[:, getattr(seen[0].layout, name)]).any()


def test_guesses_are_drawn_not_the_likeliest(whole, batch, uniform, monkeypatch):
    """Two draws of the same logits, at places that stay masked in neither."""
    seen = watched(whole, monkeypatch)
    for number in (0.01, 0.99):
        terms_of(whole, "t2i", batch, lambda purpose, *shape: torch.full((5, *shape), number)
                 if purpose == "unroll guesses" else uniform(purpose, *shape))
    assert torch.equal(seen[0].token_ids, seen[3].token_ids) and not torch.equal(seen[1].token_ids, seen[4].token_ids)


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_no_gradient_flows_through_the_guesses(task, whole, batch, uniform, monkeypatch):
    """The gradient of the second pass is that of the same sequence given as constants."""
    whole.cfg.mixsel, seen = "off", watched(whole, monkeypatch)
    unroll = terms_of(whole, task, batch, uniform)["unroll"]
    parameters = [p for name, p in whole.named_parameters() if name != "length.weight"]
    expected, _ = objectives.score(whole, task, whole(seen[-1]), seen[-1], batch)
    for a, b in zip(torch.autograd.grad(unroll, parameters), torch.autograd.grad(expected, parameters)):
        assert torch.allclose(a, b, atol=1e-7)


# ---- MixSel

def test_nobody_is_mixed_with_itself():
    for size in (2, 3, 8):
        for seed in range(50):
            other = partners(torch.rand(size, generator=torch.Generator().manual_seed(seed)))
            assert sorted(other.tolist()) == list(range(size)) and (other != torch.arange(size)).all()


def test_joined_images_by_hand():
    first = {"tall_tokens": torch.tensor([[1, 2]]), "wide_tokens": torch.tensor([[3, 4]])}            # G = 2
    second = {"tall_tokens": torch.tensor([[5, 6]]), "wide_tokens": torch.tensor([[7, 8]])}
    assert join_images(first, second, torch.tensor([False])).tolist() == [[1, 5, 2, 6]]
    assert join_images(first, second, torch.tensor([True])).tolist() == [[3, 4, 7, 8]]
    assert first_half(16, torch.tensor([False])).view(4, 4).tolist() == [[True, True, False, False]] * 4
    assert first_half(16, torch.tensor([True])).view(4, 4).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize("separators", [1, 2])
def test_joined_texts(separators, cfg):
    """Against a slow way, word by word; for all pairs of lengths, cut captions (without an end token) included."""
    t = 64
    cfg = dataclasses.replace(cfg, text_length=t, text_vocab=1000, mixsel_separators=separators)
    pairs = [(a, b) for a in range(0, t + 1, 3) for b in range(0, t + 1, 3)] + [(t, t), (t - 1, t), (30, 31)]
    words = [([*range(100, 100 + a)], [*range(200, 200 + b)]) for a, b in pairs]

    def side(k):
        texts = [(pair[k] + [999] * t)[:t] for pair in words]
        lengths = [min(len(pair[k]) + 1, t) for pair in words]
        return {"text_tokens": torch.tensor(texts), "text_lengths": torch.tensor(lengths)}
    tokens, lengths, is_first, is_second = join_texts(side(0), side(1), cfg)
    for i, (a, b) in enumerate(words):
        a, b = list(a), list(b)
        half = (t - separators - 1) // 2
        while len(a) + separators + len(b) + 1 > t:
            (a if len(a) >= len(b) and len(a) > half or len(b) <= half else b).pop()
        expected = a + [sequence.SEPARATOR] * separators + b + [999]
        assert tokens[i].tolist() == expected + [999] * (t - len(expected)), pairs[i]
        assert lengths[i] == len(expected)
        assert tokens[i][is_first[i]].tolist() == a and tokens[i][is_second[i]].tolist() == b
        assert len(a) >= min(pairs[i][0], half) and len(b) >= min(pairs[i][1], half)


SIDES = {sequence.LEFT: ("left", True), sequence.RIGHT: ("left", False),
         sequence.TOP: ("top", True), sequence.BOTTOM: ("top", False)}


@pytest.mark.parametrize("direction", [0.1, 0.9])
@pytest.mark.parametrize("task", sequence.TASKS)
def test_the_selector_names_what_is_asked_for(task, direction, whole, batch, uniform, monkeypatch):
    """Every caption and image of the batch has tokens of its own, so whose they are can be read off."""
    cfg, seen = whole.cfg, watched(whole, monkeypatch)
    own = torch.arange(5)[:, None]
    batch = {"image_tokens": own.repeat(1, 4), "tall_tokens": own.repeat(1, 2), "wide_tokens": own.repeat(1, 2),
             "text_tokens": own.repeat(1, 6), "text_lengths": torch.tensor([6, 6, 6, 6, 6])}          # no end tokens
    mixsel(whole, task, batch, lambda purpose, *shape: torch.full((5,), direction) if purpose == "mix direction"
           else uniform(purpose, *shape))
    seq = seen[0]
    bog = [seq.token_ids[0].tolist().index(i) for i in seq.token_ids[0].tolist()
           if i - cfg.codebook_size - cfg.text_vocab in SIDES][0]
    image = torch.where(seq.is_masked, -1, seq.token_ids)[:, seq.layout.image].view(5, 2, 2)
    text = torch.where(seq.is_masked, -1, seq.token_ids - cfg.codebook_size)[:, seq.layout.text]
    for i in range(5):
        how, is_first = SIDES[int(seq.token_ids[i, bog]) - cfg.codebook_size - cfg.text_vocab]
        assert how == ("top" if direction < 0.5 and task != "t2i" else "left")
        if task == "i2t":
            halves = image[i] if how == "top" else image[i].T
            assert (halves[0 if is_first else 1] == i).all() and (halves[1 if is_first else 0] != i).all()
            assert set(text[i].tolist()) <= {-1, i}
        if task == "t2i":
            assert text[i, 0 if is_first else 3] == i and text[i, 3 if is_first else 0] != i
            assert text[i, 2] == sequence.SEPARATOR and set(image[i].flatten().tolist()) <= {-1, i}
        if task == "it2it":
            halves = image[i] if how == "top" else image[i].T
            chosen, others = halves[0 if is_first else 1], halves[1 if is_first else 0]
            assert (chosen == -1).any() and set(chosen.tolist()) <= {-1, i} and (others != i).all()
            assert not (others == -1).any()
            words = (text[i, :2], text[i, 3:5])
            assert set(words[0 if is_first else 1].tolist()) <= {-1, i} and (words[1 if is_first else 0] >= 0).all()
            assert text[i, 2] == sequence.SEPARATOR and text[i, 5] == cfg.text_vocab - 1


def test_of_half_an_image_the_floor_is_hidden(whole, batch, uniform):
    """cos(pi/2 r) of its places, rounded down, at least one: as the authors' code (everywhere else up)."""
    n = whole.cfg.image_tokens // 2
    for r in (0.0, 0.3, 0.6, 0.9):
        mixed = objectives.mix("it2it", batch, lambda purpose, *shape: torch.full((5,), r) if purpose == "mix r" else
                               uniform(purpose, *shape), whole.cfg)
        assert (mixed.hidden[0].sum(1) == max(1, math.floor(n * math.cos(math.pi / 2 * r)))).all()


def test_mixrandom_tells_nobody(whole, batch, uniform, monkeypatch):
    seen = watched(whole, monkeypatch)
    for mode in ("select", "random"):
        whole.cfg.mixsel = mode
        mixsel(whole, "i2t", batch, uniform)
    special = whole.cfg.codebook_size + whole.cfg.text_vocab
    places = seen[0].token_ids != seen[1].token_ids
    assert places.sum() == 5 and (seen[1].token_ids[places] == special + sequence.BOG).all()
    assert torch.equal(seen[0].is_masked, seen[1].is_masked)


@pytest.mark.parametrize("task", sequence.TASKS)
def test_swapping_the_pair_and_the_selector_gives_the_same_loss(task, whole, batch, uniform):
    """With all hidden that may be, and a mock that guesses the same everywhere: it is asked for the same tokens."""
    cfg = dataclasses.replace(whole.cfg, it2it_ratio="same")

    class Mock:
        def __init__(self):
            self.cfg = cfg

        def __call__(self, seq):
            self.selectors = seq.token_ids - cfg.codebook_size - cfg.text_vocab
            return seq.token_ids

        def image_logits(self, states, layout):
            return torch.linspace(0, 1, cfg.codebook_size).expand(5, cfg.image_tokens, -1)

        def text_logits(self, states, layout):
            return torch.linspace(0, 1, cfg.text_vocab).expand(5, cfg.text_length, -1)
    losses, models = [], (Mock(), Mock())
    for model, side in zip(models, (0.1, 0.9)):
        fixed = {"mix side": torch.full((5,), side), "mix r": torch.zeros(5)}
        losses.append(mixsel(model, task, batch, lambda purpose, *shape: fixed.get(purpose, uniform(purpose, *shape))))
    assert torch.allclose(*losses)
    for model, names in zip(models, ((sequence.LEFT, sequence.TOP), (sequence.RIGHT, sequence.BOTTOM))):
        assert sum((model.selectors == name).sum() for name in names) == 5
