"""The objective, on a real small model where gradients matter, and on tokens alone where numbers do."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from nanomagvlt import objectives
from nanomagvlt.model import MAGVLT
from nanomagvlt.objectives import (first_half, join_texts, losses, masked_cross_entropy, maskable, mix,
                                   remask, run_pass, sample_masks, score_pass, total_loss)
from nanomagvlt.sequence import SEPARATOR, SPECIAL_TOKENS, TASKS, Sequence, valid_mask

WHOLE = dict(length_weight=0.01, unroll_mask=True, unroll_step="fresh", unroll_top_k=0, mixsel="select",
             mixsel_separators=1, text_vocab=100)


@pytest.fixture
def whole(cfg):
    """A model whose configuration switches everything on."""
    torch.manual_seed(0)
    return MAGVLT(dataclasses.replace(cfg, **WHOLE).check()).eval()


def watched(model, monkeypatch) -> list[Sequence]:
    """Every sequence that a model reads from now on."""
    seen, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, seq: seen.append(seq) or forward(self, seq))
    return seen


@pytest.mark.parametrize("ratio", ["opposite", "same"])
@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_exactly_the_papers_number_of_tokens_is_masked_and_no_padding(task, ratio, cfg):
    """For every ratio: ceil(gamma(r) N) image tokens and ceil(gamma(r) length) text tokens."""
    steps, n, t = 1000, 16, 24
    r, lengths = torch.arange(steps) / steps, torch.arange(steps) % t + 1
    g = torch.Generator().manual_seed(0)
    cfg.it2it_ratio = ratio
    batch = {"image_tokens": torch.zeros(steps, n), "text_tokens": torch.zeros(steps, t), "text_lengths": lengths}
    masks = sample_masks(maskable(task, batch), lambda purpose, *shape: torch.rand(steps, *shape, generator=g) if shape
                         else r, "", cfg)
    assert set(masks) == set(TASKS[task].generates)
    if "image" in masks:
        assert torch.equal(masks["image"].sum(1),
                           (torch.cos(r.double() * torch.pi / 2) * n - 1e-6).ceil().clamp(min=1).long())
    if "text" in masks:
        share = r.double() if task == "it2it" and ratio == "opposite" else 1 - r.double()
        assert torch.equal(masks["text"].sum(1), (share * lengths - 1e-6).ceil().clamp(min=1).long())
        assert not (masks["text"] & ~valid_mask(lengths, t)).any()


def test_cross_entropy_is_the_mean_over_masked_positions_alone():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=g, requires_grad=True)
    targets = torch.randint(11, (5, 7), generator=g)
    is_masked = torch.rand(5, 7, generator=g) < 0.4
    loss = masked_cross_entropy(logits, targets, is_masked, smoothing=0.1)
    smooth = 0.9 * F.one_hot(targets, 11) + 0.1 / 11
    assert torch.allclose(loss, -(smooth * logits.log_softmax(-1)).sum(-1)[is_masked].mean())
    loss.backward()
    assert (logits.grad[~is_masked] == 0).all() and (logits.grad[is_masked] != 0).all()
    assert masked_cross_entropy(logits, targets, torch.zeros_like(is_masked), 0.1) == 0


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_the_mask_loss_of_a_model_is_that_of_its_masked_logits(task, model, batch, rng, monkeypatch):
    seen = watched(model, monkeypatch)
    _, terms = losses(model, task, batch, rng)
    seq, expected = seen[0], 0.0
    states = model(seq)
    for piece in ("image", "text"):
        where = seq.slices[piece]
        is_masked = seq.is_masked[:, where]
        if is_masked.any():
            expected += F.cross_entropy(model.logits(states[:, where], piece)[is_masked],
                                        batch[f"{piece}_tokens"][is_masked])
    assert torch.allclose(terms["mask"], expected)
    assert set(terms) == ({"mask"} if task == "t2i" else {"mask", "length"})


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_equation_6_and_its_gradient_whether_at_once_or_pass_by_pass(task, whole, batch, rng):
    (loss, terms), cfg = losses(whole, task, batch, rng), whole.cfg
    assert set(terms) == {"t2i": {"mask", "unroll", "mixsel"}, "i2t": {"mask", "length", "unroll", "mixsel"},
                          "it2it": {"mask", "length", "mixsel"}}[task]
    expected = terms["mask"] + 0.5 * terms["mixsel"] + 0.01 * terms.get("length", 0.0) + terms.get("unroll", 0.0)
    assert torch.allclose(loss, expected) and all(term > 0 for term in terms.values())
    parameters = [p for name, p in whole.named_parameters() if task != "t2i" or name != "length.weight"]
    at_once = torch.autograd.grad(loss, parameters)

    def run_and_free(*args):  # as training does
        terms, logits = run_pass(*args)
        total_loss(cfg, **terms).backward()
        return {name: term.detach() for name, term in terms.items()}, logits
    whole.zero_grad()
    assert torch.allclose(losses(whole, task, batch, rng, run_and_free)[0], expected)
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(at_once, parameters))


def test_a_term_that_is_in_no_sum_is_an_error(cfg):
    with pytest.raises(TypeError, match="count"):
        total_loss(cfg, mask=torch.tensor(1.0), count=torch.tensor(1.0))


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_no_random_numbers_are_used_twice(task, whole, batch, rng):
    """Each pass, and in it image and text, has numbers of its own: else UnrollMask would mask the same positions."""
    asked = []
    losses(whole, task, batch, lambda purpose, *shape: asked.append(purpose) or rng(purpose, *shape))
    assert len(set(asked)) == len(asked)
    passes = {"main", "mix"} | ({"unroll"} if task != "it2it" else set())
    assert {purpose.split()[0] for purpose in asked if "places" in purpose} == passes


@pytest.mark.parametrize("setting, value", [("label_smoothing", 0.1), ("dropout", 0.5), ("precision", "bf16")])
def test_a_setting_of_training_changes_every_term(setting, value, cfg, batch, rng):
    """With the same weights and masks: no term of any pass stays the same."""
    terms = []
    for changes in ({}, {setting: value}):
        torch.manual_seed(0)
        model = MAGVLT(dataclasses.replace(cfg, **WHOLE, **changes).check()).train()
        terms.append(losses(model, "i2t", batch, rng)[1])
    unsmoothed = {"length"} if setting == "label_smoothing" else set()  # a length is no token
    assert {name for name in terms[0] if terms[0][name] == terms[1][name]} == unsmoothed


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_padding_changes_neither_loss_nor_gradient(task, whole, batch, rng):
    is_padding = ~valid_mask(batch["text_lengths"], whole.cfg.text_length)
    other = batch | {"text_tokens": torch.where(is_padding, (batch["text_tokens"] + 7) % 20, batch["text_tokens"])}
    gradients = []
    for b in (batch, other):
        whole.zero_grad()
        losses(whole, task, b, rng)[0].backward()
        gradients.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_columns_that_are_padding_in_every_row_may_be_left_out(task, whole, batch, rng):
    """Also of joined captions: nothing is cut there that would not be cut with them."""
    whole.cfg.mixsel_separators, end = 2, whole.cfg.text_vocab - 1
    for text, lengths in (("text", [1, 2, 2, 1, 2]), ("other_text", [2, 2, 1, 1, 2])):
        batch[f"{text}_lengths"] = torch.tensor(lengths)
        batch[f"{text}_tokens"].scatter_(1, batch[f"{text}_lengths"][:, None] - 1, end)

    def same(purpose: str, *shape: int) -> torch.Tensor:  # numbers of a position, whatever the positions after it
        return rng(purpose, *[8] * len(shape))[(..., *map(slice, shape))]
    short = batch | {f"{text}_tokens": batch[f"{text}_tokens"][:, :2] for text in ("text", "other_text")}
    (_, a), (_, b) = (losses(whole, task, x, same) for x in (batch, short))
    assert all(torch.allclose(a[name], b[name], rtol=1e-5) for name in a)


def test_captions_are_dropped_in_training_in_t2i_alone(whole, batch, rng, monkeypatch):
    """An empty caption is its end token. MixSel, whose contexts must not be empty, keeps the captions."""
    seen, lengths = watched(whole, monkeypatch), batch["text_lengths"]
    whole.cfg.condition_dropout, dropped = 0.5, rng("captions left out") < 0.5
    assert dropped.any() and not dropped.all()

    def shown(task: str) -> list[torch.Tensor]:
        seen.clear()
        losses(whole, task, batch, rng)
        return [seq.is_valid[:, seq.slices["text"]].sum(1) for seq in seen]
    assert torch.equal(shown("t2i")[0], lengths)  # not in validation
    whole.train()
    main, unroll, mixsel = shown("t2i")
    assert torch.equal(main, torch.where(dropped, 1, lengths)) and torch.equal(unroll, main) and (mixsel > 2).all()
    first = seen[0].token_ids[dropped][:, seen[0].slices["text"].start]
    assert (first == whole.vocab.tokens["text"].start + whole.cfg.end_token).all()
    assert torch.equal(shown("i2t")[0], lengths)


@pytest.mark.parametrize("length_pass", ["own", "main"])
def test_length_counts_from_one_and_its_own_pass_does_not_show_it(length_pass, cfg, model, batch, rng, monkeypatch):
    cfg.length_pass, seen = length_pass, watched(model, monkeypatch)
    model.length.weight.data.zero_()
    uniform = losses(model, "i2t", batch, rng)[1]["length"]
    assert torch.allclose(uniform, torch.tensor(float(cfg.text_length)).log())
    model.length_logits = lambda states, seq: 100.0 * F.one_hot(batch["text_lengths"] - 1, cfg.text_length)
    assert losses(model, "i2t", batch, rng)[1]["length"] < 1e-6
    seen.clear()
    losses(model, "it2it", batch, rng)  # the image is masked as in the main pass
    first, last = (seq.is_masked[:, seq.slices["image"]] for seq in (seen[0], seen[-1]))
    assert torch.equal(first, last) and first.any()
    losses(model, "i2t", batch, rng)
    shown = seen[-1].is_valid[:, seen[-1].slices["text"]]
    if length_pass == "own":
        assert (shown.sum(1) == cfg.length_positions).all()
        assert (seen[-1].is_masked[:, seen[-1].slices["text"]] == shown).all()
    else:
        assert torch.equal(shown.sum(1), batch["text_lengths"])


# ---- UnrollMask

@pytest.mark.parametrize("step", ["fresh", "next", "confident"])
@pytest.mark.parametrize("task, everywhere", [("t2i", False), ("i2t", False), ("i2t", True)])
def test_fewer_positions_are_masked_again_among_those_masked_before(task, everywhere, step, cfg):
    """fresh: gamma(r') of those masked before. next, confident: gamma(r + 1/K) of all. confident: the least likely."""
    rows, n = 2000, 16
    cfg.unroll_text, cfg.unroll_step, cfg.image_steps, cfg.text_steps = "all" if everywhere else "masked", step, 10, 10
    r = torch.arange(rows, dtype=torch.float64) / rows
    was = torch.rand(rows, n, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1) < (
        torch.arange(rows) % n + 1)[:, None]
    g, (piece,) = torch.Generator().manual_seed(1), TASKS[task].generates
    batch = {f"{piece}_tokens": torch.zeros(rows, n), "text_lengths": torch.full((rows,), n)}
    p = torch.rand(rows, n, generator=g)
    again = remask(task, batch, {piece: was}, p, lambda purpose, *shape: torch.rand(rows, n, generator=g) if shape else
                   r, cfg)[piece]
    u = r if step == "fresh" else (r + 0.1).clamp(max=1)
    share = torch.sin((1 - u) * torch.pi / 2) if task == "t2i" else 1 - u
    count = (share * was.sum(1) + 1e-9).floor() if step == "fresh" else (share * n - 1e-9).ceil().minimum(was.sum(1))
    assert torch.equal(again.sum(1), count.clamp(min=1).long())
    assert (again & ~was).any() == everywhere
    if step == "confident":
        allowed = torch.ones_like(was) if everywhere else was
        assert (p.where(again, 0).amax(1) < p.where(allowed & ~again, 2).amin(1)).all()


@pytest.mark.parametrize("text", ["masked", "all"])
@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_unroll_mask_sees_predictions_and_its_targets_are_the_originals(task, text, whole, batch, rng, monkeypatch):
    whole.cfg.unroll_text, whole.cfg.mixsel, (piece,) = text, "off", TASKS[task].generates
    seen, asked, original = watched(whole, monkeypatch), [], objectives.masked_cross_entropy
    monkeypatch.setattr(objectives, "masked_cross_entropy", lambda logits, targets, is_masked, smoothing: (
        asked.append(targets) or original(logits, targets, is_masked, smoothing)))
    losses(whole, task, batch, rng)
    main, unrolled = ({"ids": seq.token_ids[:, seq.slices[piece]], "masked": seq.is_masked[:, seq.slices[piece]]}
                      for seq in (seen[0], seen[-1]))
    tokens = batch[f"{piece}_tokens"] + whole.vocab.tokens[piece].start
    predicted = main["masked"] & ~unrolled["masked"]
    assert all(torch.equal(targets, batch[f"{piece}_tokens"]) for targets in asked)               # the originals,
    assert (unrolled["ids"][predicted] != tokens[predicted]).any()                                # the input differs,
    untouched = ~main["masked"] & ~unrolled["masked"]
    assert torch.equal(unrolled["ids"][untouched], tokens[untouched])                             # but only there
    if not (task == "i2t" and text == "all"):
        assert not (unrolled["masked"] & ~main["masked"]).any()
    assert not (unrolled["masked"] & ~seen[0].is_valid[:, seen[0].slices[piece]]).any()


def test_guesses_are_drawn_at_their_temperature_among_the_likeliest(whole, batch, rng, monkeypatch):
    """At a high temperature all of the top k come, and no other token."""
    whole.cfg.unroll_top_k, whole.cfg.unroll_temperature, whole.cfg.mixsel = 3, 100.0, "off"
    seen, ranks = watched(whole, monkeypatch), set()
    for number in torch.arange(0.05, 1, 0.1):
        losses(whole, "t2i", batch, lambda purpose, *shape: torch.full((5, *shape), float(number))
               if purpose == "unroll guesses" else rng(purpose, *shape))
        main, unrolled = seen[-2:]
        logits = whole.logits(whole(main)[:, main.slices["image"]], "image")                          # (B, N, V)
        rank = (-logits).argsort(-1).argsort(-1).gather(-1, unrolled.token_ids[:, main.slices["image"], None].clamp(
            max=whole.cfg.codebook_size - 1))[..., 0]
        is_guess = (main.is_masked & ~unrolled.is_masked)[:, main.slices["image"]]
        ranks |= set(rank[is_guess].tolist())
        del seen[-1]
    assert ranks == {0, 1, 2}


def test_predictions_are_drawn_not_the_most_likely(whole, batch, rng, monkeypatch):
    """Two draws from the same logits."""
    seen = watched(whole, monkeypatch)
    for number in (0.01, 0.99):
        losses(whole, "t2i", batch, lambda purpose, *shape: torch.full((5, *shape), number)
               if purpose == "unroll guesses" else rng(purpose, *shape))
    assert torch.equal(seen[0].token_ids, seen[3].token_ids) and not torch.equal(seen[1].token_ids, seen[4].token_ids)


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_no_gradient_flows_through_the_predictions(task, whole, batch, rng, monkeypatch):
    """The gradient of the second pass is that of the same sequence given as constants."""
    whole.cfg.mixsel, seen = "off", watched(whole, monkeypatch)
    unroll = losses(whole, task, batch, rng)[1]["unroll"]
    parameters = [p for name, p in whole.named_parameters() if name != "length.weight"]
    expected, *_ = score_pass(whole, seen[-1], batch)
    for a, b in zip(torch.autograd.grad(unroll, parameters), torch.autograd.grad(expected, parameters)):
        assert torch.allclose(a, b, atol=1e-7)


# ---- MixSel

def test_halves_by_hand():
    halves = first_half(16, torch.tensor([False, True])).view(2, 4, 4).tolist()
    assert halves == [[[True, True, False, False]] * 4, [[True] * 4] * 2 + [[False] * 4] * 2]


@pytest.mark.parametrize("separators", [1, 2])
def test_joined_texts_equal_those_joined_word_by_word(separators, cfg):
    """For all pairs of lengths, cut captions (without an end token) included."""
    t = 64
    cfg = dataclasses.replace(cfg, text_length=t, text_vocab=1000, mixsel_separators=separators)
    pairs = [(a, b) for a in range(0, t + 1, 3) for b in range(0, t + 1, 3)] + [(t, t), (t - 1, t), (30, 31)]
    words = [([*range(100, 100 + a)], [*range(200, 200 + b)]) for a, b in pairs]

    def side(k):
        texts = [(pair[k] + [999] * t)[:t] for pair in words]
        lengths = [min(len(pair[k]) + 1, t) for pair in words]
        return {"text_tokens": torch.tensor(texts), "text_lengths": torch.tensor(lengths)}
    tokens, lengths, is_first, is_second = join_texts(side(0), side(1), "text", cfg)
    for i, (a, b) in enumerate(words):
        a, b = list(a), list(b)
        half = (t - separators - 1) // 2
        while len(a) + separators + len(b) + 1 > t:
            (a if len(a) >= len(b) and len(a) > half or len(b) <= half else b).pop()
        expected = a + [SEPARATOR] * separators + b + [999]
        assert tokens[i].tolist() == expected + [999] * (t - len(expected)), pairs[i]
        assert lengths[i] == len(expected)
        assert tokens[i][is_first[i]].tolist() == a and tokens[i][is_second[i]].tolist() == b
        assert len(a) >= min(pairs[i][0], half) and len(b) >= min(pairs[i][1], half)


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_the_selector_selects_the_context_of_the_target(task, whole, batch, rng, monkeypatch):
    """Sample i has tokens i, its partner tokens 6: they tell where each is. G = 2."""
    cfg, seen, own = whole.cfg, watched(whole, monkeypatch), torch.arange(5)[:, None]
    first, second = torch.where(batch["is_first"], own.T, 6).T, torch.where(batch["is_first"], 6, own.T).T    # (B, 1)
    joined = torch.where(batch["is_stacked"][:, None], torch.cat([first, first, second, second], 1),
                         torch.cat([first, second] * 2, 1))
    full = torch.tensor([6] * 5)                                                                      # no end tokens
    losses(whole, task, {**batch, "image_tokens": own.repeat(1, 4), "joined_image_tokens": joined,
                         "text_tokens": own.repeat(1, 6), "text_lengths": full,
                         "other_text_tokens": torch.full((5, 6), 6), "other_text_lengths": full}, rng)
    seq = seen[-1]
    image = torch.where(seq.is_masked, -1, seq.token_ids)[:, seq.slices["image"]].view(5, 2, 2)
    text = torch.where(seq.is_masked, -1, seq.token_ids - cfg.codebook_size)[:, seq.slices["text"]]
    for i in range(5):
        selector = SPECIAL_TOKENS[int(seq.token_ids[i, seq.bog]) - whole.vocab.tokens["text"].stop]
        is_first, is_stacked = selector in ("LEFT", "TOP"), selector in ("TOP", "BOTTOM")
        assert is_first == batch["is_first"][i] and is_stacked == (batch["is_stacked"][i] and task != "t2i")
        halves = image[i] if is_stacked else image[i].T
        chosen, others = halves[0 if is_first else 1], halves[1 if is_first else 0]
        words = (text[i, :2], text[i, 3:5])
        if task == "i2t":
            assert (chosen == i).all() and (others == 6).all() and set(text[i].tolist()) <= {-1, i}
        else:
            own_words, other_words = words[0 if is_first else 1], words[1 if is_first else 0]
            assert set(own_words.tolist()) <= ({i} if task == "t2i" else {-1, i}) and (other_words == 6).all()
            assert text[i, 2] == SEPARATOR
        if task == "t2i":
            assert set(image[i].flatten().tolist()) <= {-1, i}
        if task == "it2it":
            assert (chosen == -1).any() and set(chosen.tolist()) <= {-1, i} and (others == 6).all()
            assert text[i, 5] == cfg.text_vocab - 1


def test_of_half_an_image_the_floor_is_masked(whole, batch, rng):
    """cos(pi/2 r) of its positions, rounded down, at least one: as the authors' code (everywhere else up)."""
    n = whole.cfg.image_tokens // 2
    for r in (0.0, 0.3, 0.6, 0.9):
        _, masks, _ = mix("it2it", batch, lambda purpose, *shape: torch.full((5,), r) if purpose == "mix r" else
                          rng(purpose, *shape), whole.cfg)
        assert (masks["image"].sum(1) == max(1, math.floor(n * math.cos(math.pi / 2 * r)))).all()


def test_mixrandom_has_the_same_mixes_and_a_selector_that_says_nothing(whole, batch, rng):
    (mixed, masks, selector), (random_mixed, random_masks, drawn) = (
        mix("i2t", batch, rng, dataclasses.replace(whole.cfg, mixsel=mixsel)) for mixsel in ("select", "random"))
    assert all(torch.equal(mixed[name], random_mixed[name]) for name in mixed)
    assert torch.equal(masks["text"], random_masks["text"])
    names = [[SPECIAL_TOKENS[i - whole.vocab.tokens["text"].stop] for i in ids.tolist()] for ids in (selector, drawn)]
    expected = [{True: ("LEFT", "TOP"), False: ("RIGHT", "BOTTOM")}[u < 0.5] for u in rng("mix selector").tolist()]
    assert all(name in either for name, either in zip(names[1], expected)) and names[0] != names[1]
    assert [name in ("TOP", "BOTTOM") for name in names[1]] == batch["is_stacked"].tolist()
