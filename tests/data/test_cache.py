import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.data.cache import (TokenCache, encode_captions, make_batch, rows_of_step, to_images, to_pixels,
                                   tokenise, write_cache)
from nanomagvlt.data.sources import Pair, as_pairs
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN

BPE_0 = BPE([])  # bytes alone
META = {"vqgan": "abc", "clean_captions": False, "fit": "crop", "made_of": "def"}


@pytest.fixture
def pairs() -> list[Pair]:
    noise = np.random.default_rng(0).integers(0, 255, (80, 20, 30, 3), dtype=np.uint8)
    return [pair for i, caption in enumerate(["red", "größer ☃", "x", "a\tb"] * 20)
            for pair in as_pairs(str(i), [caption], Image.fromarray(noise[i]), 16)]


@pytest.fixture
def vqgan(cfg) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(cfg).eval()


def test_pixels_become_images_again():
    images = torch.randint(256, (3, 5, 5, 3), dtype=torch.uint8).numpy()
    pixels = to_pixels(images)
    assert pixels.min() >= -1 and pixels.max() <= 1 and np.array_equal(to_images(pixels), images)


def test_a_cache_holds_the_tokens_and_captions_of_its_pairs(cfg, vqgan, pairs, tmp_path):
    written = write_cache(tmp_path / "train", iter(pairs), vqgan, META)
    rows = np.array([79, 0, 3, 3])
    for cache in (written, TokenCache(tmp_path / "train")):
        assert len(cache) == 80 and cache.meta["vqgan"] == "abc"
        assert cache.captions(rows) == [pairs[i].caption for i in rows]
        for name, tokens in zip(("image", "tall", "wide"), cache.tokens_of(rows), strict=True):
            assert torch.equal(tokens, vqgan.encode(to_pixels(np.stack([getattr(pairs[i], name) for i in rows]))))
    for bucket, length in ((1, 4), (3, 6), (6, 6), (64, 6)):
        batch = make_batch(written, BPE_0, rows, dataclasses.replace(cfg, text_bucket=bucket))
        assert batch["image_tokens"].shape == (4, 4) and batch["text_tokens"].shape == (4, length)
        assert batch["text_lengths"].tolist() == [3, 4, 3, 3]


def test_an_image_is_encoded_once_for_all_its_captions(vqgan, pairs, monkeypatch):
    encode, seen = VQGAN.encode, []
    monkeypatch.setattr(VQGAN, "encode", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels))
    some = [Pair("k", pairs[i].image, pairs[0].tall, pairs[i].wide, "a") for i in (0, 0, 1, 0)]
    [rows] = tokenise(some, vqgan, False)
    assert seen == [2, 1, 2] and rows.text.tobytes() == b"aaaa"
    for name, tokens in zip(("image", "tall", "wide"), np.split(rows.tokens, [4, 6], axis=1), strict=True):
        alone = [encode(vqgan, to_pixels(getattr(pair, name)[None].copy())).numpy()[0] for pair in some]
        assert np.array_equal(tokens, alone)


def test_an_error_leaves_the_old_cache_or_none(vqgan, pairs, tmp_path):
    def breaks():
        yield from pairs
        raise ValueError("no more")
    with pytest.raises(ValueError, match="no more"):
        write_cache(tmp_path, breaks(), vqgan, META)
    with pytest.raises(ValueError, match=str(tmp_path)):
        TokenCache(tmp_path)
    assert not list(tmp_path.iterdir())
    write_cache(tmp_path, pairs[:9], vqgan, META)
    with pytest.raises(ValueError, match="no more"):
        write_cache(tmp_path, breaks(), vqgan, META)
    assert len(TokenCache(tmp_path)) == 9


def test_captions_are_cleaned_on_request(vqgan, pairs):
    pair = pairs[0]._replace(caption="!A Well-known <person>")
    for clean, text in ((False, b"!A Well-known <person>"), (True, b"a well known person")):
        assert next(tokenise([pair], vqgan, clean)).text.tobytes() == text


def test_a_folder_with_other_files_is_not_replaced(vqgan, pairs, tmp_path):
    write_cache(tmp_path, pairs[:9], vqgan, META)
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_cache(tmp_path, pairs, vqgan, META)
    assert len(TokenCache(tmp_path)) == 9 and (tmp_path / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize("num_items, batch_size", [(100, 7), (5, 12), (64, 64)])
def test_every_row_comes_once_per_epoch(num_items, batch_size):
    rows = np.concatenate([rows_of_step(step, batch_size, num_items, 0) for step in range(4 * num_items)])
    epochs = rows[:4 * num_items].reshape(4, num_items)
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert not np.array_equal(rows_of_step(0, num_items, num_items, 0), rows_of_step(0, num_items, num_items, 1))


def test_captions_end_and_are_padded():
    tokens, lengths = encode_captions(BPE_0, ["ab", "abcdefgh", "", "word " * 2000], 5)
    assert lengths.tolist() == [3, 5, 1, 5]
    assert tokens[0, 2:].tolist() == [BPE_0.end] * 3 and BPE_0.end not in tokens[1].tolist()
