import numpy as np
import torch
import torch.nn.functional as F

from nanomagvlt.decoding import Step, blank, generate, sampling_config
from nanomagvlt.sampling import visualize
from nanomagvlt.sequence import build


def test_attention_maps_are_the_attention_of_the_model(model, batch, monkeypatch):
    """With values that are 1 at the keys and 0 elsewhere, attention returns its own weights."""
    one = {name: tensor[-1:] for name, tensor in batch.items()}
    _, traces = generate(model, "t2i", one, {"image": blank(model.cfg, 1)[1]},
                         {"image": sampling_config(model.cfg, "image")}, torch.Generator().manual_seed(0))
    trace, where = traces["image"], build("t2i", model.cfg, one).slices
    weights, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, dropout_p=0.0):
        is_key = torch.zeros_like(v)
        is_key[:, :, where["text"]][:, :, 1:3] = 1.0
        weights.append(attend(q, k, is_key, attn_mask=attn_mask)[:, :, where["image"], 0].mean(1))      # (K, N)
        return attend(q, k, v, attn_mask=attn_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    maps = visualize.attention_maps(model, trace, one["text_tokens"], one["text_lengths"], range(1, 3))
    assert torch.allclose(maps, torch.stack(weights).mean(0), atol=1e-6) and len(maps) == len(trace)


def test_a_film_shows_what_is_masked_and_the_probabilities():
    trace = [Step(torch.tensor([[1, m, m, m]]).bool(), torch.zeros(1, 4), torch.tensor([[p, 0.5, 0.5, 0.5]]).log())
             for m, p in ((1, 0.5), (0, 1.0))]
    strip, frames = visualize.film(np.full((2, 16, 16, 3), 7, np.uint8), trace)
    rows = [[strip.getpixel((x, y))[0] for x in (20, 70, 120, 170)] for y in (20, 120, 170, 220, 270)]
    assert rows == [[7] * 4, [0, 0, 0, 255], [0, 0, 255, 255], [128, 128, 255, 128], [128] * 4]
    assert [frames[0].getpixel((x, y))[0] for y in (40, 140) for x in (40, 140)] == [128, 7, 7, 7]
    assert frames[1].getcolors() == [(192 * 192, (7, 7, 7))]
