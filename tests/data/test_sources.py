import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from nanomagvlt.data import sources
from nanomagvlt.data.sources import (Example, as_example, open_image, pieces_of, random_crop, read_caption_file,
                                     read_examples, usable)
from nanomagvlt.tokenizers.bpe import BPE


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def png(colour="red", size=(20, 20)) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(colour) if isinstance(colour, np.ndarray) else Image.new("RGB", size, colour)
    image.save(file, "PNG")
    return file.getvalue()


def tar(path: str, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


def captioned(images: dict[str, bytes]) -> dict[str, bytes]:
    """Files of these images; the caption of each is its key."""
    return {f"{key}.{suffix}": data for key, image in images.items()
            for suffix, data in (("png", image), ("txt", key.encode()))}


def shard_of(count: int) -> dict[str, bytes]:
    return captioned({str(i): png(size=(i + 1, 20)) for i in range(count)})


class Pair(NamedTuple):
    key: str
    image: np.ndarray
    caption: str


def pairs_of(examples: Iterable[Example]) -> list[Pair]:
    return [Pair(example.key, image, caption)
            for example in examples for image in example.views for caption in example.captions]


def read(source: str) -> tuple[list[Pair], Counter]:
    """The pairs of a source, without the 5% limit, and the counts."""
    counts = {}
    pairs = pairs_of([as_example(*sample, 32) for piece in pieces_of(source) for sample in usable(piece, counts)])
    return pairs, Counter({reason: number for reason, (number, _) in counts.items()})


def pairs_in(source: str, side: int = 32, *details, **more) -> list[Pair]:
    """The pairs of a source as training reads them."""
    return pairs_of(read_examples(source, pieces_of(source, side, *details, **more), side, {}))


def captions_and_counts(source: str) -> tuple[list[str], Counter]:
    pairs, counts = read(source)
    return [pair.caption for pair in pairs], counts


# ---- the shared bad inputs

@pytest.fixture
def manifest(shared) -> dict[str, dict]:
    """The manifest's entry of each file, with the file's content."""
    folder = shared / "data" / "bad_inputs"
    entries = json.loads((folder / "MANIFEST.json").read_text())["files"]
    return {entry["file"]: entry | {"content": (folder / entry["file"]).read_bytes()} for entry in entries}


def test_images_of_the_manifest_are_upright_rgb_of_their_size(manifest):
    images = {name.removeprefix("images/"): open_image(entry["content"]) for name, entry in manifest.items()
              if name.startswith("images/") and entry["expect"] == "accept"}
    for name, image in images.items():
        assert image.mode == "RGB" and list(image.size) == manifest["images/" + name]["size"], name
    assert images["rgba.png"].getpixel((0, 0)) == (255, 255, 255)
    assert np.asarray(images["rgb16.png"]).std() > 10  # not clipped to white
    rotated, upright = (np.asarray(images[name], float) for name in ("exif_rotated.jpg", "exif_rotated.upright.png"))
    assert abs(rotated - upright).mean() < 5


REASONS = {  # of the samples that the manifest excludes
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


def test_every_file_of_the_manifest_is_used_or_counted(manifest):
    assert REASONS.keys() == {name for name, entry in manifest.items() if entry["expect"] == "skip" or
                              entry["expect"] == "partial" and "path_traversal" not in name}
    for name, entry in manifest.items():
        if name.startswith("images/"):
            tar("x.tar", {"x" + Path(name).suffix: entry["content"], "x.txt": b"caption"})
            entry |= {"samples": int(entry["expect"] == "accept")} if entry["expect"] != "accept-or-skip" else {}
        elif name.startswith("tars/"):
            write({"x.tar": entry["content"]})
        else:
            continue
        pairs, counts = read("x.tar")
        assert counts["good"] == len(pairs) == entry.get("samples", len(pairs)), name
        assert len(pairs) >= entry.get("samples_at_least", 0), name
        assert all(pair.image.shape == (32, 32, 3) and pair.caption.strip() for pair in pairs)
        bad = " and ".join(reason for reason, n in counts.items() if reason != "good" and n > 0)
        assert REASONS[name] in bad if name in REASONS else entry["expect"] == "accept-or-skip" or not bad, (name, bad)
        assert entry["expect"] != "partial" or not {pair.key for pair in pairs} & set(entry.get("bad_keys", []))
    assert list(Path().iterdir()) == [Path("x.tar")]  # nothing was unpacked


def test_odd_captions_of_the_manifest(manifest):
    odd = json.loads(manifest["captions.json"]["content"])
    field = {"list": "captions"}  # some data sets have this name for several captions
    tar("x.tar", {f"{entry['name']}.{suffix}": data for entry in odd for suffix, data in
                  (("json", f'{{"{field.get(entry["name"], "caption")}": {entry["json"]}}}'.encode()), ("png", png()))})
    pairs, counts = read("x.tar")
    captions = {entry["name"]: [pair.caption for pair in pairs if pair.key == entry["name"]] for entry in odd}
    assert counts == {"good": len(odd) - 2, "no caption": 2} and captions["null"] == captions["number"] == []
    assert captions["list"] == ["a dog", "one dog"] and len(captions["overlong"][0]) > 19_000


# ---- damaged and hostile shards

def test_a_shard_is_read_up_to_its_first_damage_and_a_cut_between_two_files_is_none():
    sound = Path(tar("x.tar", shard_of(5))).read_bytes()
    with tarfile.open("x.tar") as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + 512
    cuts = {cut: sound[:cut] for cut in range(0, end + 1024 + 1, 256)}
    headers = {-m.offset: sound[:m.offset] + random.Random(0).randbytes(512) + sound[m.offset + 512:] for m in members}
    for position, content in {**cuts, **headers}.items():
        write({"x.tar": content})
        captions, counts = captions_and_counts("x.tar")
        assert captions == [str(i) for i in range(5) if members[2 * i + 1].offset_data < abs(position)]
        is_whole = position >= end or position in [member.offset for member in members[1:]]
        assert counts["lost in x.tar, which is damaged or no tar file"] == int(not is_whole), position


def test_a_lost_shard_counts_as_all_its_samples():
    for i in range(10):
        tar(f"{i:05d}.tar", shard_of(20))
    write({"00003.tar": b"\x01" * 7000})
    pairs_in(".")  # without _stats.json: 1 of 181, which is few enough
    Path("00003_stats.json").write_text('{"count": 25, "successes": 20}')
    with pytest.raises(ValueError, match="180 of 200.*20 x lost in .*00003.tar"):
        pairs_in(".")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, sparse: int = 0) -> bytes:
    """The header of a member that claims this size; sparse: its size with the holes."""
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
    (header("x.jpg", 0, tarfile.GNUTYPE_SPARSE, sparse=1 << 42), "lost in"),
    (header("x.jpg", -5120, tarfile.GNUTYPE_SPARSE, sparse=1 << 10), "lost in"),
    (header("x.jpg", 10_240) + b"x" * 10_240, "file is too large"),
    (header("x", 0, tarfile.XHDTYPE) * 3000, "lost in"),
    (header("x.jpg", 0, tarfile.SYMTYPE), "a link, not a file"),
    (header("x.jpg", 0, tarfile.LNKTYPE), "a link, not a file"),
])
def test_hostile_members(member, reason, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    sound, caption = (Path(tar("x.tar", files)).read_bytes() for files in (shard_of(3), {"x.txt": b"x"}))
    Path("x.tar").write_bytes(sound[:6 * 1024] + member + caption)
    captions, counts = captions_and_counts("x.tar")
    assert captions == ["0", "1", "2"] and reason in " and ".join(counts), counts


# ---- samples

def test_other_files_beside_the_image_are_ignored():
    """Some come first, folders have dots, and JSON is nested deeper than Python can read."""
    deep = b'{"caption": ' + b"[" * 100_000
    tar("x.tar", {"a.b/v1.0/1.cls": b"7", "a.b/v1.0/1.jpg": png(), "a.b/v1.0/1.txt": b"one",
                  "a.b/v1.1/1.cls": b"", "a.b/v1.1/1.jpg": png(), "a.b/v1.1/1.txt": b"two",
                  "c.d/2.json": deep, "c.d/2.jpg": png(), "c.d/2.txt": b"three", "c.d/3.json": deep, "c.d/3.jpg": png(),
                  "c.d/4.seg.png": b"no", "c.d/4.jpg": png(), "c.d/4.txt": b"four"})
    captions, counts = captions_and_counts("x.tar")
    assert captions == ["one", "two", "three", "four"] and counts == {"good": 4, "no caption": 1}


def test_in_a_folder_the_last_dot_begins_the_suffix_and_in_a_shard_the_first_dot_ends_the_key():
    red = {"1": 10, "1.5x": 20, "1.6x": 30, "1.p": 40}  # sorted by name alone, 1.p.png comes between 1.png and 1.txt
    write(captioned({name: png((red[name], 0, 0)) for name in red}))
    assert [(pair.key, pair.caption, pair.image[0, 0, 0]) for pair in read(".")[0]] == [
        (name, name, red[name]) for name in red]
    shard = tar("x.tar", {"v1.2/cat.photo.PNG": png(), "v1.2/cat.photo.txt": b"cat"})
    assert [(pair.key, pair.caption) for pair in read(shard)[0]] == [("cat", "cat")]


# ---- sources

def test_a_source_that_cannot_be_used_is_named():
    write({"x.tar": b"text"})
    tar("y.tar", captioned({str(i): png() if i % 15 else b"no" for i in range(100)}))
    for source, message in (("none", "none"), ("x.tar", "x.tar: 0 of 1 .*1 x lost"), ("coco:no.json:.", "coco:"),
                            ("y.tar", "y.tar: 93 of 100 .*7 x not an image"), ("shapes:tinny", "'tiny'"),
                            ("coco:x", "coco:x"), ("shapes:tiny", "image_size")):
        with pytest.raises(ValueError, match=message):
            pairs_in(source, 64, 10)


def test_shards_by_folder_range_pattern_and_list():
    for i in (8, 9, 10, 11):
        tar(f"{i:05d}.tar", captioned({str(i): png()}))
    write(captioned({"more/a": png()}))
    for source, captions in (("{00009..00011}.tar", "9 10 11"), (".", "8 9 10 11 more/a"),
                             ("0001*.tar,more,0000{8..8}.tar", "10 11 more/a 8")):
        assert " ".join(captions_and_counts(source)[0]) == captions
    with pytest.raises(ValueError, match="00012.tar"):
        pieces_of("{00011..00012}.tar")


@pytest.fixture
def photos():
    write({f"{name}.jpg": png(size=(40, 30)) for name in ("val/a", "val/b", "test/c")})


def test_coco_captions(photos):
    names = {7: "b.jpg", "2": "a.jpg", 3: "n", 4: "../test/c.jpg", 5: "a.jpg ", 6: os.path.abspath("test/c.jpg")}
    texts = ((2, "one"), (7, " a\ncat "), (3, "none"), (2, "two"), (2, ""), (4, "out"), (6, "out"))
    Path("captions.json").write_text(json.dumps({
        "images": [{"id": id, "file_name": name} for id, name in names.items()],
        "annotations": [{"image_id": id, "caption": text} for id, text in texts]}))
    captions, counts = captions_and_counts("coco:captions.json:val")
    assert captions == ["a cat", "one", "two"]
    assert counts == {"good": 2, "file is absent or unreadable": 1, "image outside of its folder": 2, "no caption": 1}
    rows, has_splits = read_caption_file(Path("captions.json"), None)
    assert not has_splits and [row.id for row in rows] == list(names) and rows[1].captions == ["one", "two"]


@pytest.mark.parametrize("content", [
    "[]", "{", "[" * 100_000, '{"images": 3}', '{"images": [], "annotations": [{"image_id": 2}]}',
    '{"images": [{"id": 7, "file_name": "a"}, {"id": "7", "file_name": "b"}], "annotations": []}',
    '{"images": [], "annotations": [{"image_id": 8, "caption": "x"}]}'])
def test_a_bad_caption_file_is_named(content):
    Path("captions.json").write_text(content)
    with pytest.raises(ValueError, match="captions.json: "):
        read_caption_file(Path("captions.json"), None)


def test_karpathys_splits(photos):
    images = [{"filepath": folder, "filename": f"{name}.jpg", "split": split,
               "sentences": [{"raw": name}, {"raw": split}]}
              for folder, name, split in (("val", "a", "restval"), ("test", "c", "test"), ("val", "b", "train"))]
    images[1]["cocoid"] = 5
    Path("dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for split, captions in (("train", "a restval b train"), ("test", "c test")):
        pairs = pairs_in("coco:dataset_coco.json:.", split=split)
        assert " ".join(pair.caption for pair in pairs) == captions
    [row], has_splits = read_caption_file(Path("dataset_coco.json"), None)
    assert has_splits and (row.id, row.file, row.captions) == (5, "test/c.jpg", ["c", "test"])


# ---- crops

def test_crops_are_windows_of_the_image():
    """The image is as high as the crop, so nothing is scaled, and the pixels give the offset."""
    x, y = np.meshgrid(np.arange(96), np.arange(16))
    whole = np.stack([x, y, x + y], axis=2).astype(np.uint8)
    crops = [random_crop(Image.fromarray(whole), 16, random.Random(seed)) for seed in range(400)]
    assert all(np.array_equal(crop, whole[:, crop[0, 0, 0]:crop[0, 0, 0] + 16]) for crop in crops)
    assert {int(crop[0, 0, 0]) for crop in crops} == set(range(3 * 80 // 8, 5 * 80 // 8))


def test_a_large_image_is_scaled_to_between_one_and_nine_eighths():
    """The image is a ramp from 0 to 255: the slope of a crop is that of the scale, 32 / t with t = 32..36."""
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 320).astype(np.uint8)[None, :, None], 320, 0).repeat(3, 2))
    crops = [random_crop(ramp, 32, random.Random(seed)).astype(float) for seed in range(200)]
    slopes = [(crop[16, 24, 0] - crop[16, 8, 0]) / 16 for crop in crops]
    assert abs(max(slopes) - 255 / 32) < 0.2 and abs(min(slopes) - 255 / 36) < 0.2
    assert random_crop(ramp.resize((5, 9)), 32, random.Random(0)).shape == (32, 32, 3)


def test_crops_depend_on_seed_and_key():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))

    def views(key, seed, crops=3):
        example = as_example(key, ["a", "b"], noise, 32, "crop", crops, seed)
        return [pair.image.tobytes() for pair in pairs_of([example])]
    assert views("k", 0) == views("k", 0) and views("k", 0)[:4] == views("k", 0, 2)
    assert len(set(views("k", 0) + views("k", 1) + views("j", 0))) == 9
    assert [pair.caption for pair in pairs_of([as_example("k", ["a", "b"], noise, 32, "crop", 2)])] == ["a", "b"] * 2


# ---- what a source lists is read or counted

KINDS = {"png": png(), "jpg": png("blue"), "txt": b"a dog", "json": b'{"caption": "a cat"}', "md": b"# Read me",
         "db": b"\0\1", "jpeg": png()[:60], "gif": b"<html>"}


@pytest.mark.parametrize("seed", range(10))
def test_every_name_in_a_folder_or_shard_is_read_or_counted(seed):
    """Made-up samples: of each name any of KINDS. The expected counts follow from which of them it has."""
    chance, expected, samples = random.Random(seed), Counter(), {}
    for i in range(40):
        has = chance.sample(sorted(KINDS), chance.randint(1, 5))
        samples |= {f"{chance.choice(['d', 'd/sub', 'far'])}/{i}": has}
        images, captions = {"png", "jpg"} & set(has), {"txt", "json"} & set(has)
        if images:
            expected["good" if captions else "no caption"] += 1
            expected["further image of a name"] += len({"jpeg"} & set(has) | images) - 1 if captions else 0
        else:
            expected["neither image nor caption" if not captions else "bad image" if set(has) - captions else
                     "no image"] += 1
    files = {f"{name}.{suffix}": KINDS[suffix] for name, has in samples.items() for suffix in has}
    write(files | {"d/.hidden/1.png": png(), "d/.2.txt": b"x"})
    Path("d/sub/linked").symlink_to(Path("far").absolute())
    Path("far/back").symlink_to(Path("d").absolute())
    tar("x.tar", {f"{name}.{suffix}": KINDS[suffix] for name, has in samples.items() for suffix in sorted(has)})
    for source in ("d", "x.tar"):
        pairs, counts = read(source)
        counts["bad image"] = sum(counts.pop(reason, 0) for reason in ("broken image", "not an image"))
        assert counts == expected and len(pairs) == expected["good"]
    order = chance.sample(sorted(files), len(files))
    tar("y.tar", {name: files[name] for name in order})
    keys = [name.rpartition(".")[0] for name in order]
    counts, blocks = read("y.tar")[1], 1 + sum(a != b for a, b in zip(keys, keys[1:]))
    assert counts.total() - counts["further image of a name"] == blocks
    assert counts[sources.APART] == blocks - len(set(keys))


@pytest.mark.parametrize("seed", range(10))
def test_every_image_in_a_caption_file_is_read_or_counted(seed):
    chance = random.Random(seed)
    write({f"val/{i}.png": png() for i in range(0, 20, 2)})
    rows = [{"id": chance.choice([i, str(i)]), "file_name": f"{i}.png"} for i in range(20)]
    texts = [{"image_id": chance.choice([i, str(i)]), "caption": f"{i}"} for i in range(20) for _ in range(i % 4)]
    listed = {"images": rows + chance.choices(rows, k=5), "annotations": chance.sample(texts, len(texts))}
    Path("captions.json").write_text(json.dumps(listed))
    pairs, counts = read("coco:captions.json:val")
    assert counts == {"good": 5, "no caption": 5, "file is absent or unreadable": 10}
    assert Counter(int(pair.caption) for pair in pairs) == {i: i % 4 for i in range(2, 20, 4)}


@pytest.mark.parametrize("text", [
    "größer naïve", "Привет", "ลูกบอลสีแดง ที่นี่", "लाल गेंद", "👨\u200d👩\u200d👧", "می\u200cخواهم"])
def test_a_caption_is_what_was_written_or_is_counted(text):
    encodings = {name: text.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32")}
    write({f"d/{name}.txt": data for name, data in encodings.items()} | {f"d/{name}.png": png() for name in encodings})
    assert captions_and_counts("d") == ([text] * 4, {"good": 4})
    write({"d/lines.txt": f"{text}\r\nb\n\n".encode(), "d/lines.png": png(), "d/old.png": png(), "d/bare.png": png(),
           "d/old.txt": "caf\u00e9".encode("cp1252"), "d/bare.txt": "cat".encode("utf-16-le")})
    captions, counts = captions_and_counts("d")
    assert captions[:2] == [text, "b"] and counts == {"caption is not UTF-8": 2, "good": 5}
    own = BPE.train([text], 30)
    assert own.decode(own.encode(text)) == own.from_text(own.to_text()).decode(own.encode(text)) == text.lower()


def test_files_that_are_no_samples_are_no_reason_to_refuse_and_a_refusal_names_a_file():
    write(captioned({f"d/{i}": png() for i in range(10)}))
    write({f"d/{name}": b"x" for name in ("README.md", "LICENSE", "Thumbs.db", "0_stats.json", "0.parquet")})
    assert len(pairs_in("d")) == 10
    write({"d/9.png": b"<html>"})
    with pytest.raises(ValueError, match="9 of 10 samples.* 1 x not an image .first: 'd/9'"):
        pairs_in("d")
