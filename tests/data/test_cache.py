import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.data.cache import (TokenCache, encode_captions, make_batch, rows_of_step, to_images, to_pixels,
                                   tokenise, write_cache)
from nanomagvlt.data.sources import Example, as_example
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.tokenizers.vqgan import VQGAN

BPE_0 = BPE([])  # bytes alone
META = {"vqgan": "abc", "clean_captions": False, "fit": "crop", "made_of": "def"}


@pytest.fixture
def examples() -> list[Example]:
    """Eighty images with one caption each."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 20, 30, 3), dtype=np.uint8)
    return [as_example(str(i), [caption], Image.fromarray(noise[i]), 16)
            for i, caption in enumerate(["red", "größer ☃", "x", "a\tb"] * 20)]


@pytest.fixture
def vqgan(cfg) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(cfg).eval()


def test_pixels_become_images_again():
    images = torch.randint(256, (3, 5, 5, 3), dtype=torch.uint8).numpy()
    pixels = to_pixels(images)
    assert pixels.min() >= -1 and pixels.max() <= 1 and np.array_equal(to_images(pixels), images)


def test_a_cache_holds_the_tokens_and_captions_of_its_examples(cfg, vqgan, examples, tmp_path):
    written = write_cache(tmp_path / "train", iter(examples), vqgan, META)
    rows = np.array([79, 0, 3, 3])
    for cache in (written, TokenCache(tmp_path / "train")):
        assert len(cache) == 80 and cache.meta["vqgan"] == "abc" and cache.num_views == 1
        assert cache.captions(rows) == [examples[i].captions[0] for i in rows]
        assert torch.equal(cache.tokens_of(rows)[0], encoded(vqgan, [examples[i].views[0] for i in rows]))
    for bucket, length in ((1, 4), (3, 6), (6, 6), (64, 6)):
        batch = make_batch(written, BPE_0, rows, dataclasses.replace(cfg, text_bucket=bucket))
        assert batch["image_tokens"].shape == (4, 4) and batch["text_tokens"].shape == (4, length)
        assert batch["text_lengths"].tolist() == [3, 4, 3, 3] and len(batch) == 3


def encoded(vqgan, images: list[np.ndarray]) -> torch.Tensor:
    return torch.cat([vqgan.encode(to_pixels(np.stack([image]))) for image in images])


@pytest.mark.parametrize("count, crops", [(70, 0), (7, 3), (1, 2)])
def test_a_joined_picture_has_the_tokens_of_the_two_images_joined(count, crops, cfg, vqgan, tmp_path):
    """Each image names its captions, so the partner of a row is known by its caption."""
    cfg, noise = dataclasses.replace(cfg, mixsel="select", text_length=9), np.random.default_rng(1)
    of = {str(i): as_example(str(i), [f"{i} {k}" for k in range(1 + i % 3)], Image.fromarray(
        noise.integers(0, 255, (20, 30, 3), dtype=np.uint8)), 16, "crop", crops) for i in range(count)}
    cache, met = write_cache(tmp_path / "c", of.values(), vqgan, META), set()
    rows, num_views = np.arange(len(cache)), max(1, crops)
    assert cache.num_views == num_views and len(cache) == num_views * sum(len(e.captions) for e in of.values())
    for key in range(4):
        batch, others = make_batch(cache, BPE_0, rows, cfg, key=(key,)), cache.captions(rows + cache.partners)
        assert torch.equal(batch["other_text_lengths"], encode_captions(BPE_0, others, 9)[1])
        for row, own, other in zip(rows, cache.captions(rows), others):
            own, other, is_first = of[own.split()[0]], of[other.split()[0]], bool(batch["is_first"][row])
            met.add((own.key, other.key, int(cache.views[row])))
            first, second = (own, other) if is_first else (other, own)
            joined = (np.concatenate([first.wide, second.wide], 0) if batch["is_stacked"][row] else
                      np.concatenate([first.tall, second.tall], 1))
            assert torch.equal(batch["joined_image_tokens"][row], encoded(vqgan, [joined])[0])
    assert all((other, own, view) in met for own, other, view in met) and len(met) == count * num_views
    assert sum(own == other for own, other, _ in met) == count % 2 * num_views


def test_each_epoch_has_the_next_crop_of_every_image(vqgan, examples, tmp_path):
    crops = [example._replace(views=[example.views[0] ^ v for v in range(3)], captions=["a", "b"])
             for example in examples[:7]]
    cache = write_cache(tmp_path / "c", crops, vqgan, META)
    rows = np.concatenate([cache.rows_of_step(step, 7, seed=0) for step in range(8)]).reshape(4, 14)
    views = cache.views[rows]
    assert (views == [[0], [1], [2], [0]]).all() and all(len(set(epoch)) == 14 for epoch in rows)
    assert sorted(rows[3]) == sorted(rows[0]) and not np.array_equal(rows[3], rows[0])


def test_an_error_leaves_the_old_cache_or_none(vqgan, examples, tmp_path):
    def breaks():
        yield from examples
        raise ValueError("no more")
    with pytest.raises(ValueError, match="no more"):
        write_cache(tmp_path, breaks(), vqgan, META)
    with pytest.raises(ValueError, match=str(tmp_path)):
        TokenCache(tmp_path)
    assert not list(tmp_path.iterdir())
    write_cache(tmp_path, examples[:9], vqgan, META)
    with pytest.raises(ValueError, match="no more"):
        write_cache(tmp_path, breaks(), vqgan, META)
    assert len(TokenCache(tmp_path)) == 9


def test_captions_are_cleaned_on_request(vqgan, examples):
    example = examples[0]._replace(captions=["!A Well-known <person>"])
    for clean, text in ((False, b"!A Well-known <person>"), (True, b"a well known person")):
        assert next(tokenise([example], vqgan, clean)).text.tobytes() == text


def test_a_folder_with_other_files_is_not_replaced(vqgan, examples, tmp_path):
    write_cache(tmp_path, examples[:9], vqgan, META)
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_cache(tmp_path, examples, vqgan, META)
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
