import dataclasses
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from nanomagvlt.bpe import BPE
from nanomagvlt.data import (BadSample, DataError, Pair, TokenCache, encode_captions, keyed_seed, make_batch,
                             open_image, read_pairs, rows_of_step, square, to_images, to_pixels, write_cache)
from nanomagvlt.vqgan import VQGAN

BPE_0 = BPE([])  # bytes alone


def png(colour="red", size=(20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def test_every_image_of_the_manifest(shared):
    folder = shared / "data" / "bad_inputs"
    for entry in json.loads((folder / "MANIFEST.json").read_text())["files"]:
        if not entry["file"].startswith("images/") or entry["expect"] == "accept-or-skip":
            continue
        data = (folder / entry["file"]).read_bytes()
        if entry["expect"] == "skip":
            with pytest.raises(BadSample):
                open_image(data)
            continue
        image = open_image(data)
        assert image.mode == "RGB" and list(image.size) == entry["size"], entry["file"]
        assert square(image, 32).shape == (32, 32, 3)
        if "corner_rgb" in entry:
            assert list(image.getpixel((0, 0))) == entry["corner_rgb"]
    rotated, upright = (np.asarray(open_image((folder / "images" / name).read_bytes()), dtype=float)
                        for name in ("exif_rotated.jpg", "exif_rotated.upright.png"))
    assert abs(rotated - upright).mean() < 5
    assert np.asarray(open_image((folder / "images/rgb16.png").read_bytes())).std() > 10  # not clipped to white


def test_every_tar_of_the_manifest(shared, tmp_path):
    """Among 200 good pairs, so that the 5% limit is not what is tested."""
    folder = shared / "data" / "bad_inputs"
    members = {"png": png(), "txt": b"a red square"}
    good = {f"{i:06d}.{suffix}": data for i in range(200) for suffix, data in members.items()}
    tar(tmp_path / "a_good.tar", good)
    for entry in json.loads((folder / "MANIFEST.json").read_text())["files"]:
        if not entry["file"].startswith("tars/"):
            continue
        (tmp_path / "b.tar").write_bytes((folder / entry["file"]).read_bytes())
        counts = Counter()
        pairs = list(read_pairs(str(tmp_path / "*.tar"), 32, counts))[200:]
        assert counts["good"] == 200 + len(pairs)
        if "samples" in entry:
            assert len(pairs) == entry["samples"], entry["file"]
        assert len(pairs) >= entry.get("samples_at_least", 0), entry["file"]
        assert all(pair.image.shape == (32, 32, 3) and pair.caption.strip() for pair in pairs)
        if entry["expect"] == "partial" and "samples" in entry:
            assert sum(counts.values()) > counts["good"], entry["file"]  # what is left out is counted
            assert not {pair.key for pair in pairs} & set(entry.get("bad_keys", []))
        encode_captions(BPE_0, [pair.caption for pair in pairs] or ["x"], 24)


def test_a_folder_and_a_tar_give_the_same_pairs(tmp_path):
    files = {f"{name}.{suffix}": data for name, colour in (("a", "red"), ("b", "blue"))
             for suffix, data in (("png", png(colour)), ("txt", colour.encode() + b"\n"))}
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    sources = tar(tmp_path / "x.tar", files), str(tmp_path / "folder")
    a, b = ([(pair.key, pair.caption, pair.image[0, 0].tolist()) for pair in read_pairs(source, 32, Counter())]
            for source in sources)
    assert a == b == [("a", "red", [255, 0, 0]), ("b", "blue", [0, 0, 255])]


def test_dots_in_names(tmp_path):
    """In a folder the last dot begins the suffix; in a shard the first dot ends the key (webdataset)."""
    files = {"1.5x.png": png(), "1.5x.txt": b"1.5x", "1.6x.png": png(), "1.6x.txt": b"1.6x"}
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    assert [pair.key for pair in read_pairs(str(tmp_path / "folder"), 32, Counter())] == ["1.5x", "1.6x"]
    shard = tar(tmp_path / "x.tar", {"v1.2/cat.photo.PNG": png(), "v1.2/cat.photo.txt": b"cat"})
    assert [(pair.key, pair.caption) for pair in read_pairs(shard, 32, Counter())] == [("cat", "cat")]


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"text")
    tar(tmp_path / "y.tar", {f"{i:03d}.{suffix}": data for i in range(100)
                             for suffix, data in (("png", png() if i % 15 else b"no"), ("txt", b"red"))})
    for source, message in ((tmp_path / "none", "no such folder"),
                            (tmp_path / "x.tar", "no usable pair.*1 x broken or truncated shard"),
                            (tmp_path / "y.tar", "7 of 100 samples are bad.*7 x not an image"),
                            ("shapes:tinny", "did you mean 'tiny'")):
        with pytest.raises(DataError, match=message):
            list(read_pairs(str(source), 32, Counter(), 10))
    with pytest.raises(DataError, match="image_size is 64"):
        list(read_pairs("shapes:tiny", 64, Counter(), 10))


def test_pixels_there_and_back():
    images = torch.randint(256, (3, 5, 5, 3), dtype=torch.uint8).numpy()
    pixels = to_pixels(images)
    assert pixels.min() >= -1 and pixels.max() <= 1 and np.array_equal(to_images(pixels), images)


@pytest.fixture
def pairs() -> list[Pair]:
    noise = np.random.default_rng(0).integers(0, 255, (80, 20, 30, 3), dtype=np.uint8)
    return [Pair.of(str(i), Image.fromarray(noise[i]), 16, caption)
            for i, caption in enumerate(["red", "größer ☃", "x", "a\tb"] * 20)]


def test_cache_holds_what_went_in(cfg, pairs, tmp_path):
    torch.manual_seed(0)
    vqgan = VQGAN(cfg).eval()
    written = write_cache(tmp_path / "train", iter(pairs), vqgan, {"vqgan": "abc"}, batch_size=7)
    for cache in (written, TokenCache(tmp_path / "train")):
        rows = np.array([79, 0, 3, 3])
        assert len(cache) == 80 and cache.meta["vqgan"] == "abc"
        assert cache.captions(rows) == [pairs[i].caption for i in rows]
        for name, tokens in zip(("image", "tall", "wide"), cache.tokens_of(rows), strict=True):
            assert torch.equal(tokens, vqgan.encode(to_pixels(np.stack([getattr(pairs[i], name) for i in rows]))))
        assert torch.equal(cache.image_tokens(rows), cache.tokens_of(rows)[0])
    for bucket, places in ((1, 4), (3, 6), (6, 6), (64, 6)):
        batch = make_batch(written, BPE_0, rows, dataclasses.replace(cfg, text_bucket=bucket))
        assert batch["image_tokens"].shape == (4, 4) and batch["text_tokens"].shape == (4, places)
        assert batch["text_lengths"].tolist() == [3, 4, 3, 3]


def test_a_cache_is_whole_or_absent(cfg, pairs, tmp_path):
    def breaks():
        yield from pairs
        raise DataError("no more")
    with pytest.raises(DataError, match="no more"):
        write_cache(tmp_path / "train", breaks(), VQGAN(cfg), {})
    with pytest.raises(DataError, match="no pair"):
        write_cache(tmp_path / "train", iter([]), VQGAN(cfg), {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    with pytest.raises(DataError, match="nothing in it was touched"):
        write_cache(tmp_path / "photos", iter(pairs), VQGAN(cfg), {})
    write_cache(tmp_path / "mine", iter(pairs), VQGAN(cfg), {})
    (tmp_path / "mine" / "a.jpg").write_text("precious")
    with pytest.raises(DataError, match="nothing in it was touched"):
        write_cache(tmp_path / "mine", iter(pairs), VQGAN(cfg), {})
    assert (tmp_path / "photos" / "a.jpg").exists() and (tmp_path / "mine" / "a.jpg").exists()
    with pytest.raises(DataError, match="no whole token cache"):
        TokenCache(tmp_path / "train")


@pytest.mark.parametrize("num_items, batch_size", [(100, 7), (5, 12), (64, 64)])
def test_every_row_once_an_epoch(num_items, batch_size):
    rows = np.concatenate([rows_of_step(step, batch_size, num_items, 0) for step in range(4 * num_items)])
    epochs = rows[:4 * num_items].reshape(4, num_items)
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert not np.array_equal(rows_of_step(0, num_items, num_items, 0), rows_of_step(0, num_items, num_items, 1))


def test_captions_end_and_are_padded():
    tokens, lengths = encode_captions(BPE_0, ["ab", "abcdefgh", ""], 5)
    assert lengths.tolist() == [3, 5, 1]
    assert tokens[0, 2:].tolist() == [BPE_0.end] * 3 and BPE_0.end not in tokens[1].tolist()
    assert keyed_seed(0, "x") == keyed_seed(0, "x") != keyed_seed(1, "x") and 0 <= keyed_seed(0) < 2 ** 63


def test_captions_are_cleaned_on_request(cfg, pairs, tmp_path):
    pairs[0].caption = "!A Well-known <person>"
    for clean, expected in ((False, "!A Well-known <person>"), (True, "a well known person")):
        cache = write_cache(tmp_path / str(clean), iter(pairs), VQGAN(cfg), {}, clean)
        assert cache.captions([0]) == [expected] and cache.meta["clean_captions"] == clean
