import numpy as np
import torch
import torch.nn.functional as F

from nanomagvlt import sequence
from nanomagvlt.sampling import visualize
from nanomagvlt.decoding import Step, draw_image


def test_attention_is_what_the_model_computes(model, batch, monkeypatch):
    """With values that are 1 at the keys' places and 0 elsewhere, attention gives the share itself."""
    text, length = batch["text_tokens"][-1:], batch["text_lengths"][-1:]
    _, trace = draw_image(model, text, length, torch.Generator().manual_seed(0))
    shares, attend, where = [], F.scaled_dot_product_attention, sequence.layout("t2i", 4, 6)

    def watched(q, k, v, attn_mask=None, dropout_p=0.0):
        is_key = torch.zeros_like(v)
        is_key[:, :, where.text][:, :, 1:3] = 1.0
        shares.append(attend(q, k, is_key, attn_mask=attn_mask)[:, :, where.image, 0].mean(1))       # (K, N)
        return attend(q, k, v, attn_mask=attn_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    maps = visualize.attention_maps(model, trace, text, length, range(1, 3))
    assert torch.allclose(maps, torch.stack(shares).mean(0), atol=1e-6) and len(maps) == len(trace)


def test_a_film_shows_what_is_hidden_and_how_sure_the_rest_is():
    hidden = torch.tensor([[[True] * 4], [[True, False, False, False]]])
    p = torch.tensor([[[0.5] * 4], [[1.0, 0.5, 0.5, 0.5]]])
    trace = [Step(m, torch.zeros(1, 4, dtype=torch.long), q.log()) for m, q in zip(hidden, p)]
    strip, frames = visualize.film(np.full((2, 16, 16, 3), 7, np.uint8), trace)
    assert strip.size == (2 * 100 - 4, 3 * 100 - 4) and len(frames) == 2

    def cells(step, row):
        return [strip.getpixel((100 * step + x, 100 * row + y))[0] for y in (20, 70) for x in (20, 70)]
    assert cells(0, 0) == [7] * 4 and cells(0, 1) == [0] * 4 and cells(1, 1) == [0, 255, 255, 255]
    assert cells(0, 2) == [128] * 4 and cells(1, 2) == [255, 128, 128, 128]
    assert [frames[0].getpixel((x, y))[0] for y in (40, 140) for x in (40, 140)] == [128, 7, 7, 7]
    assert frames[1].getcolors() == [(192 * 192, (7, 7, 7))]
