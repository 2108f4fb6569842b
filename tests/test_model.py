import dataclasses

import pytest
import torch

from nanomagvlt import sequence
from nanomagvlt.model import MAGVLT, num_parameters, sincos_init


def test_waves_are_alike_at_equal_distances():
    """The product of two places' waves depends on how far apart they are, and is highest for a place with itself."""
    rows = sincos_init(24, 128)
    products = rows @ rows.T                                                                          # (24, 24)
    for distance in range(1, 24):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0], atol=1e-3) and diagonal[0] < 0.99 * products[0, 0]


def test_weights_start_as_small_as_is_said(cfg):
    model = MAGVLT(dataclasses.replace(cfg, width=128, init_std=0.03, position_init="normal"))
    for weight in (model.tokens.weight, model.places.weight, model.blocks[1].attention.qkv.weight):
        assert abs(weight.std() - 0.03) < 0.002 and abs(weight.mean()) < 0.003
    assert not model.blocks[1].attention.qkv.bias.any() and not model.output_bias.any()


def test_positions_start_as_waves_of_the_row_the_column_and_the_text_place(cfg):
    places = MAGVLT(dataclasses.replace(cfg, position_init="sincos")).places.weight
    assert torch.equal(places[0, :8], places[1, :8]) and torch.equal(places[0, 8:], places[2, 8:])    # G = 2, N = 4
    assert torch.allclose(places[4:10], 2 ** 0.5 * cfg.init_std * sincos_init(6, 16))
    assert not torch.equal(places[0, :8], places[2, :8])


def build(task, cfg, batch, hide_text=True):
    g = torch.Generator().manual_seed(2)
    image_mask = torch.rand(5, cfg.image_tokens, generator=g) < 0.5
    is_real = sequence.valid_mask(batch["text_lengths"], cfg.text_length)
    text_mask = (torch.rand(5, cfg.text_length, generator=g) < 0.5) & is_real
    return sequence.build(task, cfg, batch["image_tokens"], image_mask, batch["text_tokens"], text_mask,
                          batch["text_lengths"])


def written_out(attention, x, is_valid, where):
    """Softmax attention, one query, head and sample at a time, with a dense rule of who may attend to whom."""
    b, l, d = x.shape
    h = attention.heads
    q, k, v = (part.view(b, l, h, d // h) for part in attention.qkv(x).split(d, dim=-1))
    y = torch.zeros(b, l, h, d // h)
    for i in range(b):
        for query in range(l):
            may = is_valid[i].clone()
            if query == where.bot and where.text.start > where.image.start:
                may[where.bot + 1:] = False
            for head in range(h):
                weights = (k[i, may, head] @ q[i, query, head] / (d // h) ** 0.5).softmax(0)
                y[i, query, head] = weights @ v[i, may, head]
    return attention.proj(y.view(b, l, d))


@pytest.mark.parametrize("task", sequence.TASKS)
def test_attention_equals_the_written_out_softmax(task, cfg, model, batch):
    seq = build(task, cfg, batch)
    x = torch.randn(*seq.token_ids.shape, cfg.width)
    attention = model.blocks[0].attention
    assert torch.allclose(attention(x, seq.is_valid[:, None, None], seq.layout),
                          written_out(attention, x, seq.is_valid, seq.layout), atol=1e-5)


@pytest.mark.parametrize("task", sequence.TASKS)
def test_padding_and_hidden_tokens_change_nothing(task, cfg, model, batch):
    seq = build(task, cfg, batch)
    text_mask, image_mask = seq.is_masked[:, seq.layout.text], seq.is_masked[:, seq.layout.image]
    other = {
        "image_tokens": torch.where(image_mask, (batch["image_tokens"] + 1) % cfg.codebook_size, batch["image_tokens"]),
        "text_tokens": torch.where(text_mask | ~sequence.valid_mask(batch["text_lengths"], cfg.text_length),
                                   (batch["text_tokens"] + 1) % cfg.text_vocab, batch["text_tokens"])
    }
    assert not torch.equal(other["text_tokens"], batch["text_tokens"])
    seq2 = sequence.build(task, cfg, other["image_tokens"], image_mask, other["text_tokens"], text_mask,
                          batch["text_lengths"])
    a, b = model(seq), model(seq2)
    assert torch.equal(a[seq.is_valid], b[seq.is_valid])


@pytest.mark.parametrize("task", ["i2t", "it2it"])
def test_bot_does_not_look_ahead_in_any_layer(task, cfg, model, batch):
    seq = build(task, cfg, batch)
    x = torch.randn(*seq.token_ids.shape, cfg.width)
    ahead = x.clone()
    ahead[:, seq.layout.bot + 1:] = torch.randn_like(ahead[:, seq.layout.bot + 1:])
    before = x.clone()
    before[:, seq.layout.bot - 1] += 1
    valid, where = seq.is_valid[:, None, None], seq.layout
    for block in model.blocks:
        bot = block.attention(x, valid, where)[:, where.bot]
        assert torch.equal(bot, block.attention(ahead, valid, where)[:, where.bot])
        assert not torch.allclose(bot, block.attention(before, valid, where)[:, where.bot])
    # In t2i, where the text is given, BOT sees it.
    seq = build("t2i", cfg, batch)
    valid, where = seq.is_valid[:, None, None], seq.layout
    a, b = (model.blocks[0].attention(y, valid, where)[:, where.bot] for y in (x, ahead))
    assert not torch.allclose(a, b)


def test_dropout_is_on_residuals_and_in_attention_of_training_alone(cfg, batch):
    model = MAGVLT(dataclasses.replace(cfg, dropout=0.5))
    seq = build("t2i", cfg, batch)
    assert torch.equal(model.eval()(seq), model(seq))
    model.train()
    for block in model.blocks:
        block.dropout.p = 0.0
    assert not torch.equal(model(seq), model(seq))
    for block in model.blocks:
        block.dropout.p, block.attention.dropout = 0.5, 0.0
    assert not torch.equal(model(seq), model(seq))


@pytest.mark.parametrize("task", sequence.TASKS)
def test_a_masked_place_is_its_mask_token_and_two_positions(task, cfg, model, batch):
    """Written out for one place: SPEC of the released code, without which its weights do not work."""
    seq = build(task, cfg, batch)
    model.blocks = torch.nn.ModuleList()
    x = model(seq)
    n, t, special = cfg.image_tokens, cfg.text_length, cfg.codebook_size + cfg.text_vocab
    for where, mask_token, first_place in ((seq.layout.image, sequence.MASK_IMG, 0),
                                           (seq.layout.text, sequence.MASK_TXT, n)):
        for i, p in seq.is_masked[:, where].nonzero().tolist():
            expected = (model.tokens.weight[special + mask_token] + model.places.weight[first_place + p]
                        + model.places.weight[n + t + p])
            assert torch.allclose(x[i, where][p], expected, atol=1e-6)


def test_logits_are_over_their_own_vocabulary(cfg, model, batch):
    seq = build("it2it", cfg, batch)
    states = model(seq)
    head = model.head(states) @ model.tokens.weight[:-10].T + model.output_bias                   # (B, L, V_I + V_T)
    assert torch.allclose(model.image_logits(states, seq.layout), head[:, seq.layout.image, :cfg.codebook_size],
                          atol=1e-5)
    assert torch.allclose(model.text_logits(states, seq.layout), head[:, seq.layout.text, cfg.codebook_size:],
                          atol=1e-5)
    assert torch.allclose(model.length_logits(states, seq.layout), states[:, seq.layout.bot] @ model.length.weight.T,
                          atol=1e-5)


def test_parameters_are_counted_by_the_papers_formula(cfg):
    d, n, t = cfg.width, cfg.image_tokens, cfg.text_length
    block = 12 * d * d + 13 * d
    head = d * d + 3 * d + cfg.codebook_size + cfg.text_vocab
    assert num_parameters(MAGVLT(cfg)) == ((cfg.codebook_size + cfg.text_vocab + 10) * d + (2 * n + 2 * t + 4) * d
                                           + cfg.layers * block + head + t * d)
