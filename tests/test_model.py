import dataclasses

import pytest
import torch

from nanomagvlt.model import MAGVLT, num_parameters, sincos_init
from nanomagvlt.sequence import build, valid_mask


def test_sincos_positions_have_equal_products_at_equal_distances():
    """The product of two positions depends on their distance, and is highest for a position with itself."""
    rows = sincos_init(24, 128)
    products = rows @ rows.T                                                                          # (24, 24)
    for distance in range(1, 24):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0], atol=1e-3) and diagonal[0] < 0.99 * products[0, 0]


def test_weights_start_with_the_given_deviation(cfg):
    model = MAGVLT(dataclasses.replace(cfg, width=128, init_std=0.03, position_init="normal"))
    for weight in (model.token_table.weight, model.position_table.weight, model.blocks[1].attention.qkv.weight):
        assert abs(weight.std() - 0.03) < 0.002 and abs(weight.mean()) < 0.003
    assert not model.blocks[1].attention.qkv.bias.any() and not model.output_bias.any()


def test_positions_start_as_sines_of_row_column_and_text_position(cfg):
    rows = MAGVLT(dataclasses.replace(cfg, position_init="sincos")).position_table.weight
    assert torch.equal(rows[0, :8], rows[1, :8]) and torch.equal(rows[0, 8:], rows[2, 8:])    # G = 2, N = 4
    sines = sincos_init(6, 16) - sincos_init(6, 16).mean(0)
    assert torch.allclose(rows[4:10], 2 * cfg.init_std * sines / sines.std(), atol=1e-6)
    assert not torch.equal(rows[0, :8], rows[2, :8])


def masked(cfg, batch) -> dict[str, torch.Tensor]:
    """Masks of about half of all tokens."""
    g = torch.Generator().manual_seed(2)
    image, text = (torch.rand(5, n, generator=g) < 0.5 for n in (cfg.image_tokens, cfg.text_length))
    return {"image": image, "text": text & valid_mask(batch["text_lengths"], cfg.text_length)}


def written_out(attention, x, seq):
    """Softmax attention, one query, head and sample at a time, with the attention rule written out."""
    b, l, d = x.shape
    h = attention.heads
    q, k, v = (part.view(b, l, h, d // h) for part in attention.qkv(x).split(d, dim=-1))
    y = torch.zeros(b, l, h, d // h)
    for i in range(b):
        for query in range(l):
            keys = seq.is_valid[i].clone()
            if seq.slices["text"].start > seq.slices["image"].start and query == seq.slices["text"].start - 1:  # BOT
                keys[query + 1:] = False
            for head in range(h):
                weights = (k[i, keys, head] @ q[i, query, head] / (d // h) ** 0.5).softmax(0)
                y[i, query, head] = weights @ v[i, keys, head]
    return attention.proj(y.view(b, l, d))


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_attention_equals_the_written_out_softmax(task, cfg, model, batch):
    seq = build(task, cfg, batch, masked(cfg, batch))
    x = torch.randn(*seq.token_ids.shape, cfg.width)
    attention = model.blocks[0].attention
    assert torch.allclose(attention(x, seq.attn_mask, seq.length_row), written_out(attention, x, seq), atol=1e-5)


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_padding_and_masked_tokens_change_nothing(task, cfg, model, batch):
    masks = masked(cfg, batch)
    hidden = masks["text"] | ~valid_mask(batch["text_lengths"], cfg.text_length)
    other = batch | {
        "image_tokens": torch.where(masks["image"], (batch["image_tokens"] + 1) % cfg.codebook_size,
                                    batch["image_tokens"]),
        "text_tokens": torch.where(hidden, (batch["text_tokens"] + 1) % cfg.text_vocab, batch["text_tokens"])}
    assert not torch.equal(other["text_tokens"], batch["text_tokens"])
    seq = build(task, cfg, batch, masks)
    assert torch.equal(model(seq)[seq.is_valid], model(build(task, cfg, other, masks))[seq.is_valid])


@pytest.mark.parametrize("task", ["i2t", "it2it"])
def test_bot_attends_to_nothing_after_it_in_any_layer(task, cfg, model, batch):
    seq = build(task, cfg, batch)
    x = torch.randn(*seq.token_ids.shape, cfg.width)
    after, before = x.clone(), x.clone()
    after[:, seq.length_row + 1:] = torch.randn_like(after[:, seq.length_row + 1:])
    before[:, seq.length_row - 1] += 1
    for block in model.blocks:
        bot, same, other = (block.attention(y, seq.attn_mask, seq.length_row)[:, seq.length_row]
                            for y in (x, after, before))
        assert torch.equal(bot, same) and not torch.allclose(bot, other)
    seq = build("t2i", cfg, batch)  # where the text is given, BOT attends to it
    bot = seq.slices["text"].start - 1
    a, b = (model.blocks[0].attention(y, seq.attn_mask, seq.length_row)[:, bot] for y in (x, after))
    assert not torch.allclose(a, b)


def test_dropout_is_on_residuals_and_in_attention_of_training_alone(cfg, batch):
    model = MAGVLT(dataclasses.replace(cfg, dropout=0.5))
    seq = build("t2i", cfg, batch, masked(cfg, batch))
    assert torch.equal(model.eval()(seq), model(seq))
    model.train()
    for block in model.blocks:
        block.dropout.p = 0.0
    assert not torch.equal(model(seq), model(seq))
    for block in model.blocks:
        block.dropout.p, block.attention.dropout = 0.5, 0.0
    assert not torch.equal(model(seq), model(seq))


@pytest.mark.parametrize("task", ["t2i", "i2t", "it2it"])
def test_a_masked_position_is_its_mask_token_and_two_position_rows(task, cfg, model, batch):
    """Written out position by position, as in the released code, whose weights need it."""
    masks, vocab = masked(cfg, batch), model.vocab
    seq = build(task, cfg, batch, masks)
    model.blocks, model.text_window = torch.nn.ModuleList(), None
    x = model(seq)
    for piece, token, first in (("image", "MASK_IMG", 0), ("text", "MASK_TXT", cfg.image_tokens)):
        for i, p in masks[piece].nonzero().tolist():
            expected = (model.token_table.weight[vocab.special(token)] + model.position_table.weight[first + p]
                        + model.position_table.weight[cfg.image_tokens + cfg.text_length + p])
            assert torch.allclose(x[i, seq.slices[piece]][p], expected, atol=1e-6)


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_with_a_window_of_three_a_word_reads_the_words_beside_it_and_no_padding(task, cfg, model, batch):
    model.blocks, one, tokens = torch.nn.ModuleList(), build(task, cfg, batch), batch["text_tokens"].clone()
    tokens[2:, 2] = (tokens[2:, 2] + 1) % cfg.text_vocab  # the third word, in rows with 3, 5 and 6 words
    tokens[:2, 2:] = 0                                    # padding, in rows with 1 and 2
    changed = (model(one) != model(build(task, cfg, batch | {"text_tokens": tokens}))).any(-1) & one.is_valid  # (B, L)
    where = one.slices["text"]
    assert changed[:, where].nonzero().tolist() == [[2, 1], [2, 2], *([row, i] for row in (3, 4) for i in (1, 2, 3))]
    assert not changed[:, :where.start].any() and not changed[:, where.stop:].any()


def test_logits_are_over_their_own_vocabulary(cfg, model, batch):
    seq = build("it2it", cfg, batch)
    states = model(seq)
    head = model.head(states) @ model.token_table.weight[:-10].T + model.output_bias              # (B, L, V_I + V_T)
    for piece, vocabulary in (("image", slice(0, cfg.codebook_size)), ("text", slice(cfg.codebook_size, None))):
        where = seq.slices[piece]
        assert torch.allclose(model.logits(states[:, where], piece), head[:, where, vocabulary], atol=1e-5)
    expected = states[:, seq.length_row] @ model.length.weight.T
    assert torch.allclose(model.length_logits(states, seq), expected, atol=1e-5)


def test_parameters_are_counted_by_the_papers_formula(cfg):
    cfg.text_window, d, n, t = 0, cfg.width, cfg.image_tokens, cfg.text_length
    block = 12 * d * d + 13 * d
    head = d * d + 3 * d + cfg.codebook_size + cfg.text_vocab
    assert num_parameters(MAGVLT(cfg)) == ((cfg.codebook_size + cfg.text_vocab + 10) * d + (2 * n + 2 * t + 4) * d
                                           + cfg.layers * block + head + t * d)


def test_a_bfloat16_model_gives_exact_log_probabilities_at_a_low_temperature(cfg):
    """Against the product in float64 of the same states, at temperature 0.1. bfloat16 logits are off by up to 0.5."""
    model = MAGVLT(dataclasses.replace(cfg, width=256, codebook_size=2000, init_std=0.2)).to(torch.bfloat16).eval()
    states, rows = torch.randn(2, 8, 256).bfloat16(), slice(0, 2000)
    exact = model.head(states).double() @ model.token_table.weight[rows].double().T
    error = (model.logits(states, "image").double() / 0.1).log_softmax(-1) - (exact / 0.1).log_softmax(-1)
    assert error.abs().max() < 1e-3
