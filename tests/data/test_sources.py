import gzip
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomagvlt.data import sources
from nanomagvlt.tokenizers.bpe import BPE
from nanomagvlt.data.cache import encode_captions
from nanomagvlt.data.sources import (BadSample, DataError, Pair, as_pairs, open_image, pieces_of, random_crop, read_pairs,
                                square)

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


REASONS = {  # of what the manifest says is not to be used
    "images/truncated.jpg": "broken image", "images/truncated.png": "broken image",
    "images/zero_byte.png": "not an image", "images/zero_byte.jpg": "not an image",
    "images/text_named.jpg": "not an image", "images/svg_named.png": "not an image",
    "images/bomb_30000x30000.png": "image has too many pixels",
    "images/bomb_header_only_100000x100000.png": "image has too many pixels",
    "tars/truncated_mid_member.tar": "lost in", "tars/corrupt_member_data.tar": "broken image",
    "tars/empty_file.tar": "lost in", "tars/zip_named.tar": "lost in", "tars/text_named.tar": "lost in",
    "tars/caption_missing.tar": "no caption", "tars/image_missing.tar": "no image",
    "tars/caption_empty.tar": "no caption", "tars/duplicate_members.tar": "two files of one name",
}


def read(source) -> tuple[list[Pair], Counter]:
    """What can be read, without the 5% limit, and the counts."""
    counts = Counter()
    return [pair for piece in pieces_of(str(source)) for pair in sources.pairs_in(piece, 32, counts)], counts


def test_every_file_of_the_manifest_is_used_or_counted(shared, tmp_path):
    folder, shard = shared / "data" / "bad_inputs", tmp_path / "x.tar"
    entries = {entry["file"]: entry for entry in json.loads((folder / "MANIFEST.json").read_text())["files"]}
    assert REASONS.keys() == {name for name, entry in entries.items() if entry["expect"] == "skip" or
                              entry["expect"] == "partial" and "path_traversal" not in name}
    for name, entry in entries.items():
        data = (folder / name).read_bytes()
        if name.startswith("images/"):
            tar(shard, {"x" + Path(name).suffix: data, "x.txt": b"caption"})
            entry |= {"samples": int(entry["expect"] == "accept")} if entry["expect"] != "accept-or-skip" else {}
        elif name.startswith("tars/"):
            shard.write_bytes(data)
        else:
            continue
        pairs, counts = read(shard)
        assert counts["good"] == len(pairs) == entry.get("samples", len(pairs)), name
        assert len(pairs) >= entry.get("samples_at_least", 0), name
        assert all(pair.image.shape == (32, 32, 3) and pair.caption.strip() for pair in pairs)
        bad = " and ".join(reason for reason, n in counts.items() if reason != "good" and n > 0)
        assert REASONS[name] in bad if name in REASONS else entry["expect"] == "accept-or-skip" or not bad, (name, bad)
        assert entry["expect"] != "partial" or not {pair.key for pair in pairs} & set(entry.get("bad_keys", []))
        encode_captions(BPE_0, [pair.caption for pair in pairs] or ["x"], 24)
    assert list(tmp_path.iterdir()) == [shard]  # nothing was unpacked


def test_odd_captions_of_the_manifest(shared, tmp_path):
    odd = json.loads((shared / "data" / "bad_inputs" / "captions.json").read_text())
    name = {"list": "captions"}  # as some sets call it where there are many
    tar(tmp_path / "x.tar", {f"{entry['name']}.{suffix}": data for entry in odd for suffix, data in
                             (("json", f'{{"{name.get(entry["name"], "caption")}": {entry["json"]}}}'.encode()),
                              ("png", png()))})
    pairs, counts = read(tmp_path / "x.tar")
    captions = {entry["name"]: [pair.caption for pair in pairs if pair.key == entry["name"]] for entry in odd}
    assert counts == {"good": len(odd) - 2, "no caption": 2} and captions["null"] == captions["number"] == []
    assert captions["list"] == ["a dog", "one dog"] and len(captions["overlong"][0]) > 19_000


# ---- damaged and hostile shards

def shard_of(count: int) -> dict[str, bytes]:
    return {f"{i:03d}.{suffix}": data for i in range(count) for suffix, data in
            (("jpg", png(size=(i + 1, 20))), ("json", b"{}"), ("txt", str(i).encode()))}


def captions_and_counts(path) -> tuple[list[str], Counter]:
    pairs, counts = read(path)
    return [pair.caption for pair in pairs], counts


def test_a_damaged_header_costs_its_own_sample_alone(tmp_path):
    path = tmp_path / "x.tar"
    sound = Path(tar(path, shard_of(5))).read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    for member in members:
        damaged = bytearray(sound)
        damaged[member.offset:member.offset + 512] = random.Random(0).randbytes(512)
        path.write_bytes(damaged)
        captions, counts = captions_and_counts(path)
        lost = [] if member.name.endswith("json") else [member.name[:3].lstrip("0") or "0"]
        assert captions == [str(i) for i in range(5) if str(i) not in lost], member.name
        assert counts[f"lost in {path}, which is damaged (estimate)"] == 1
        assert sum(counts.values()) == 5 + 1  # what is left of the sample is counted under its own reason, too


def test_a_cut_shard_is_noticed_wherever_it_was_cut(tmp_path):
    path = tmp_path / "x.tar"
    sound = Path(tar(path, shard_of(5))).read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    for cut in range(0, last.offset_data + 512 + 1, 256):
        path.write_bytes(sound[:cut])
        captions, counts = captions_and_counts(path)
        assert captions == [str(i) for i in range(len(captions))]
        assert counts[f"lost in {path}, which is damaged (estimate)"] >= 1, cut
    assert len(captions) == 5  # cut behind the last member, all is there but the end mark


def test_a_lost_shard_counts_as_all_its_samples(tmp_path):
    for i in range(10):
        tar(tmp_path / f"{i:05d}.tar", shard_of(20))
    (tmp_path / "00003.tar").write_bytes(b"\x01" * 7000)
    with pytest.raises(DataError, match="20 of 200 samples are bad.*20 x lost in .*00003.tar"):
        (tmp_path / "00003_stats.json").write_text('{"count": 25, "successes": 20}')
        list(read_pairs(str(tmp_path), 32, Counter()))
    (tmp_path / "00003_stats.json").unlink()  # then by its size
    (tmp_path / "00003.tar").write_bytes(b"\x01" * 30 * sources.SAMPLE_BYTES)
    assert sum(read(tmp_path)[1].values()) == 180 + 30


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, sparse: int = 0) -> bytes:
    """Of a member, or what claims to be one; sparse: the bytes that its holes make of it."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if sparse:
        block[483:495] = tarfile.itn(sparse, 12, tarfile.GNU_FORMAT)
        block[148:155] = b"%06o\0" % tarfile.calc_chksums(block)[0]
    return bytes(block)


@pytest.mark.parametrize("member, reason", [
    (header("x.jpg", 1 << 40), "lost in"),
    (header("x.jpg", -512), "lost in"),
    (header("x.jpg", 0, tarfile.GNUTYPE_SPARSE, sparse=1 << 42), "sparse file in a tar"),
    (header("x.jpg", 10_240) + b"x" * 10_240, "file is too large"),
    (header("x", 0, tarfile.XHDTYPE) * 3000, "lost in"),
    (header("x.jpg", 0, tarfile.SYMTYPE), "no image"),
])
def test_hostile_members(member, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    sound, behind = (Path(tar(tmp_path / name, files)).read_bytes()
                     for name, files in (("x.tar", shard_of(3)), ("y.tar", {"x.txt": b"x"})))
    (tmp_path / "x.tar").write_bytes(sound[:9 * 1024] + member + behind)
    captions, counts = captions_and_counts(tmp_path / "x.tar")
    assert captions == ["0", "1", "2"] and reason in " and ".join(counts), counts


def test_what_lies_beside_the_image(tmp_path):
    """Other files come first, folders have dots, JSON is nested deeper than Python can read."""
    deep = b'{"caption": ' + b"[" * 100_000
    tar(tmp_path / "x.tar", {"a.b/v1.0/1.cls": b"7", "a.b/v1.0/1.jpg": png("red"), "a.b/v1.0/1.txt": b"one",
                             "a.b/v1.1/1.cls": b"", "a.b/v1.1/1.jpg": png("blue"), "a.b/v1.1/1.txt": b"two",
                             "c.d/2.json": deep, "c.d/2.jpg": png(), "c.d/2.txt": b"three",
                             "c.d/3.json": deep, "c.d/3.jpg": png(),
                             "c.d/4.seg.png": b"no", "c.d/4.jpg": png(), "c.d/4.txt": b"four"})
    captions, counts = captions_and_counts(tmp_path / "x.tar")
    assert captions == ["one", "two", "three", "four"] and counts == {"good": 4, "no caption": 1}


def test_a_shard_that_cannot_be_opened_is_not_taken_for_a_damaged_one(tmp_path):
    path = tmp_path / "x.tar"
    [piece] = pieces_of(tar(path, shard_of(1)))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(piece.samples(Counter()))


def test_two_shards_in_one_file_and_gzip(tmp_path):
    both = [Path(tar(tmp_path / name, {f"{name}.png": png(), f"{name}.txt": name.encode()})).read_bytes()
            for name in "ab"]
    for name in "ab":
        (tmp_path / name).unlink()
    (tmp_path / "x.tar").write_bytes(both[0] + both[1])
    (tmp_path / "y.tar").write_bytes(gzip.compress(both[1]))
    assert captions_and_counts(tmp_path) == (["a", "b", "b"], {"good": 3})


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
    names = ("1", "1.5x", "1.6x", "1.p")  # 1.png, 1.p.png, 1.txt: sorted by name alone, 1 is torn apart
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / f"{name}.png").write_bytes(png())
        (tmp_path / "folder" / f"{name}.txt").write_text(name)
    assert [(p.key, p.caption) for p in read_pairs(str(tmp_path / "folder"), 32, Counter())] == [(n, n) for n in names]
    shard = tar(tmp_path / "x.tar", {"v1.2/cat.photo.PNG": png(), "v1.2/cat.photo.txt": b"cat"})
    assert [(pair.key, pair.caption) for pair in read_pairs(shard, 32, Counter())] == [("cat", "cat")]


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"text")
    tar(tmp_path / "y.tar", {f"{i:03d}.{suffix}": data for i in range(100)
                             for suffix, data in (("png", png() if i % 15 else b"no"), ("txt", b"red"))})
    for source, message in ((tmp_path / "none", "no such folder"),
                            (tmp_path / "x.tar", "no usable pair.*1 x lost in .*x.tar, which is damaged"),
                            (tmp_path / "y.tar", "7 of 100 samples are bad.*7 x not an image"),
                            ("shapes:tinny", "did you mean 'tiny'")):
        with pytest.raises(DataError, match=message):
            list(read_pairs(str(source), 32, Counter(), 10))
    with pytest.raises(DataError, match="image_size is 64"):
        list(read_pairs("shapes:tiny", 64, Counter(), 10))


def test_ranges_and_lists(tmp_path):
    for i in (8, 9, 10, 11):
        tar(tmp_path / f"{i:05d}.tar", {"x.png": png(), "x.txt": str(i).encode()})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").write_bytes(png())
    (tmp_path / "more" / "a.txt").write_text("a")
    t = tmp_path
    for source, captions in ((t / "{00009..00011}.tar", "9 10 11"),
                             (f"{t}/0001*.tar,{t}/more,{t}/00008.tar", "10 11 a 8"),
                             (f"{t}/{{00008..00008}}.tar,{t}/0000{{9..9}}.tar", "8 9"), (t, "8 9 10 11")):
        assert " ".join(captions_and_counts(source)[0]) == captions
    with pytest.raises(DataError, match="00012.tar: no such"):
        pieces_of(str(t / "{00011..00012}.tar"))


# ---- COCO

@pytest.fixture
def coco(tmp_path):
    for folder, names in (("val", "ab"), ("test", "c")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.jpg").write_bytes(png(size=(40, 30)))
    return tmp_path


def test_coco_captions(coco):
    content = {"images": [{"id": 7, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}, {"id": 3, "file_name": "n"},
                          {"id": 4, "file_name": "../test/c.jpg"}, {"id": 5, "file_name": "a.jpg "},
                          {"id": 6, "file_name": str(coco / "test" / "c.jpg")}],
               "annotations": [{"image_id": i, "caption": caption} for i, caption in
                               ((2, "one"), (7, " a\ncat "), (3, "none"), (2, "two"), (2, ""), (4, "out"), (6, "out"))]}
    (coco / "captions.json").write_text(json.dumps(content))
    captions, counts = captions_and_counts(f"coco:{coco}/captions.json:{coco}/val")
    assert captions == ["a cat", "one", "two"]
    assert counts == {"good": 2, "no image": 1, "image outside of its folder": 2, "no caption": 1}
    for text in ("[]", "{", "[" * 100_000, '{"images": 3}', json.dumps({**content, "annotations": [{"image_id": 2}]})):
        (coco / "captions.json").write_text(text)
        with pytest.raises(DataError, match="captions.json: neither COCO's captions"):
            pieces_of(f"coco:{coco}/captions.json:{coco}/val")
    for source in (f"coco:{coco}/no.json:{coco}/val", f"coco:{coco}/captions.json:{coco}/no", "coco:x"):
        with pytest.raises(DataError, match="give coco:CAPTIONS.json:FOLDER"):
            pieces_of(source)


def test_karpathys_splits(coco):
    files = ("val", "a", "restval"), ("test", "c", "test"), ("val", "b", "train")
    images = [{"filepath": folder, "filename": f"{name}.jpg", "split": split,
               "sentences": [{"raw": name}, {"raw": split}]} for folder, name, split in files]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for split, captions in (("train", "a restval b train"), ("test", "c test")):
        pairs = read_pairs(f"coco:{coco}/dataset_coco.json:{coco}", 32, Counter(), split=split)
        assert " ".join(pair.caption for pair in pairs) == captions


# ---- crops

def test_crops_are_windows_of_the_image():
    """Where nothing is scaled, since the image is as small as the crop, its pixels say where it was cut."""
    x, y = np.meshgrid(np.arange(96), np.arange(16))
    wide = Image.fromarray(np.stack([x, y, x + y], axis=2).astype(np.uint8))
    for image, axis in ((wide, 1), (wide.transpose(Image.Transpose.TRANSPOSE), 0)):
        offsets, whole = set(), np.asarray(image)
        for seed in range(400):
            crop = random_crop(image, 16, random.Random(seed))
            offset = int(crop[0, 0, 0])
            assert np.array_equal(crop, np.take(whole, range(offset, offset + 16), axis))
            offsets.add(offset)
        assert offsets == set(range(3 * 80 // 8, 5 * 80 // 8))


def test_a_large_image_is_scaled_to_between_one_and_nine_eighths():
    """A ramp from 0 to 255: how much of it a crop shows tells the scale, 32 / t with t = 32..36."""
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 320).astype(np.uint8)[None, :, None], 320, 0).repeat(3, 2))
    crops = [random_crop(ramp, 32, random.Random(seed)).astype(float) for seed in range(200)]
    slopes = [(crop[16, 24, 0] - crop[16, 8, 0]) / 16 for crop in crops]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    assert abs(max(slopes) - 255 / 32) < 0.2 and abs(min(slopes) - 255 / 36) < 0.2
    assert random_crop(ramp.resize((5, 9)), 32, random.Random(0)).shape == (32, 32, 3)


def test_crops_follow_from_seed_and_key():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))

    def views(key, seed, crops=3):
        return [pair.image.tobytes() for pair in as_pairs(key, ["a", "b"], noise, 32, crops, seed)]
    assert views("k", 0) == views("k", 0) and views("k", 0)[:4] == views("k", 0, 2)
    assert len(set(views("k", 0) + views("k", 1) + views("j", 0))) == 9
    pairs = list(as_pairs("k", ["a", "b"], noise, 32, 2))
    assert [pair.caption for pair in pairs] == ["a", "b"] * 2
    assert all(pair.tall is pairs[0].tall and pair.tall.shape == (32, 16, 3) for pair in pairs)
