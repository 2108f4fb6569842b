import pytest
import torch
import torch.nn.functional as F

from nanomagvlt import sequence
from nanomagvlt.objectives import hide, loss_terms, masked_cross_entropy, total_loss


@pytest.mark.parametrize("task", sequence.TASKS)
def test_hides_exactly_the_papers_number_and_never_padding(task):
    """For every ratio: ceil(gamma(r) N) image tokens and ceil(gamma(r) length) text tokens."""
    steps, n, t = 1000, 16, 24
    r = torch.arange(steps) / steps
    lengths = torch.arange(steps) % t + 1
    g = torch.Generator().manual_seed(0)

    def draw(purpose: str, *shape: int) -> torch.Tensor:
        return r if purpose == "r" else torch.rand(steps, *shape, generator=g)
    image, text = hide(task, n, lengths, t, draw)
    image_share = torch.cos(r.double() * torch.pi / 2)
    text_share = 1 - r.double() if task == "i2t" else r.double()
    expected_image = (image_share * n - 1e-6).ceil().clamp(min=1).long() * (task != "i2t")
    expected_text = (text_share * lengths - 1e-6).ceil().clamp(min=1).long() * (task != "t2i")
    assert torch.equal(image.sum(1), expected_image)
    assert torch.equal(text.sum(1), expected_text)
    assert not (text & ~sequence.real_places(lengths, t)).any()


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


@pytest.mark.parametrize("task", sequence.TASKS)
def test_the_loss_of_a_model_is_that_of_its_masked_logits(task, cfg, model, batch, draw):
    """With the batch flattened to single captions, so that no padding is near: the terms are the same."""
    terms = loss_terms(model, task, batch, draw)
    image, text = hide(task, cfg.image_tokens, batch["text_lengths"], cfg.text_length, draw)
    seq = sequence.build(task, cfg, batch["image_tokens"], image, batch["text_tokens"], text, batch["text_lengths"])
    states = model(seq)
    expected = 0.0
    for name, is_masked, logits in (("image_tokens", image, model.image_logits(states, seq.layout)),
                                    ("text_tokens", text, model.text_logits(states, seq.layout))):
        if is_masked.any():
            expected += F.cross_entropy(logits[is_masked], batch[name][is_masked])
    assert torch.allclose(terms["mask"], expected)
    assert ("length" in terms) == (task != "t2i")
    assert torch.allclose(total_loss(terms, 0.5), terms["mask"] + 0.5 * terms.get("length", torch.tensor(0.0)))


@pytest.mark.parametrize("task", sequence.TASKS)
def test_padding_does_not_touch_loss_or_gradient(task, cfg, model, batch, draw):
    is_padding = ~sequence.real_places(batch["text_lengths"], cfg.text_length)
    other = dict(batch, text_tokens=torch.where(is_padding, (batch["text_tokens"] + 7) % cfg.text_vocab,
                                                batch["text_tokens"]))
    gradients = []
    for b in (batch, other):
        model.zero_grad()
        total_loss(loss_terms(model, task, b, draw), 0.01).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_length_is_read_where_the_text_is_still_to_come(cfg, model, batch, draw):
    """The loss of lengths i counts class i - 1: a model whose length head knows the answer has none."""
    model.length.weight.data.zero_()
    assert torch.allclose(loss_terms(model, "i2t", batch, draw)["length"], torch.tensor(float(cfg.text_length)).log())
    model.length_logits = lambda states, layout: 100.0 * F.one_hot(batch["text_lengths"] - 1, cfg.text_length)
    assert loss_terms(model, "i2t", batch, draw)["length"] < 1e-6
