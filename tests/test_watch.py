import torch
import torch.nn.functional as F

from nanomagvlt import sequence, watch
from nanomagvlt.decode import draw_image
from nanomagvlt.vqgan import VQGAN


def test_attention_is_what_the_model_computes(model, batch, monkeypatch):
    """With one block and values that are 1 at the keys' places and 0 elsewhere, attention gives the share itself."""
    nothing = torch.zeros_like(batch["text_tokens"], dtype=torch.bool)
    seq = sequence.build("t2i", model.cfg, batch["image_tokens"], ~torch.zeros_like(batch["image_tokens"]).bool(),
                         batch["text_tokens"], nothing, batch["text_lengths"])
    shares, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, dropout_p=0.0):
        is_key = torch.zeros_like(v)
        is_key[:, :, seq.layout.text][:, :, :2] = 1.0
        shares.append(attend(q, k, is_key, attn_mask=attn_mask)[:, :, seq.layout.image, 0].mean(1))  # (B, N)
        return attend(q, k, v, attn_mask=attn_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    maps = watch.attention_maps(model, seq, range(2))
    assert torch.allclose(maps, torch.stack(shares), atol=1e-6) and len(maps) == model.cfg.layers


def test_a_film_has_a_column_and_a_frame_for_every_step(model, batch):
    _, trace = draw_image(model, batch["text_tokens"], batch["text_lengths"], torch.Generator().manual_seed(0))
    strip, frames = watch.film(VQGAN(model.cfg), trace)
    assert len(frames) == len(trace) == model.cfg.image_steps and strip.size == (100 * len(trace) - 4, 3 * 100 - 4)
    black = [sum(strip.getpixel((100 * k + x, 148)) == (0, 0, 0) for x in range(96)) for k in range(len(trace))]
    assert black[0] == 96  # at first all is hidden
