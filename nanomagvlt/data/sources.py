"""Chapter 11 - From files to pairs.

Where pairs come from is one string; several sources are written with commas between:
  shapes:LEVEL                 the small world, drawn on the fly
  a folder                     images with a .txt (or .json with "caption" or "captions") of the same name beside them
  tar shards                   as img2dataset and webdataset write them, KEY.jpg KEY.txt KEY.json: a path, a folder of
                               .tar files, or a quoted pattern, 'shards/*.tar' or 'shards/{00000..00331}.tar'
  coco:CAPTIONS.json:IMAGES/   COCO's captions_*.json or Karpathy's dataset_coco.json; a pair for each caption

    source --pieces_of--> pieces --usable--> images with captions --pairs_in--> pairs

A piece is a shard, or ten thousand images: what can be read without the rest, and is done anew if it was interrupted.
Reading is where hostile input is met, once: an image is known by its content, never by its name, its size is read
before it is decoded, nothing is unpacked to disk, and what cannot be used is counted by reason, never fatal and never
silent. Read on in data.py.

Shapes: S image side in pixels.
"""
import contextlib
import glob
import io
import json
import lzma
import os
import random
import re
import tarfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nanomagvlt.data import shapes
from nanomagvlt.rng import keyed_seed

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000   # more is refused unread: a few bytes of PNG can claim gigabytes
MAX_ASPECT = 20           # a longer strip has nothing to show after a square crop
MAX_BYTES = 100_000_000   # no image of MAX_PIXELS needs more, and a header may claim anything
MAX_BAD_SHARE = 0.05      # a source worse than this is a mistake, not bad luck
PIECE = 10_000            # samples in a piece of a folder, of a COCO file or of shapes, as in a shard of img2dataset
CHUNK = 1 << 20           # bytes
SAMPLE_BYTES = 20_000     # of a shard, taken for one sample where nothing tells better: a JPEG of 256 pixels
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error,
              lzma.LZMAError)  # what tarfile raises on broken files

Content = Callable[[], bytes]                             # what is in a file, read when asked; raises BadSample
Load = Callable[[], tuple[list[str], Image.Image]]        # captions and image, read when asked; raises BadSample


@dataclass(frozen=True)
class Piece:
    """A share of a source: samples(counts) yields key and Load of each, and counts what is lost on the way."""
    identity: tuple  # what tells whether it is still the same: names, sizes and times of change
    samples: Callable[[Counter], Iterator[tuple[str, Load]]]


@dataclass
class Pair:
    """An image, its caption, and the whole image squeezed into half the room, as MixSel joins two of them."""
    key: str
    image: np.ndarray  # uint8 (S, S, 3)
    tall: np.ndarray   # uint8 (S, S/2, 3)
    wide: np.ndarray   # uint8 (S/2, S, 3)
    caption: str


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason it is counted under."""


class NotAnImage(BadSample):
    """A file of some other kind."""


class DataError(ValueError):
    """A source that cannot be used; the message is one line that names it and says what to do."""


# ---------------------------------------------------------------------------------------------- images

def open_image(data: bytes) -> Image.Image:
    """An upright RGB picture from the bytes of an image file, transparency laid on white. Raises BadSample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata; the size is checked here
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise BadSample("image has too many pixels")
            if max(w, h) > MAX_ASPECT * min(w, h):
                raise BadSample("image is too long and thin")
            image.load()
            with contextlib.suppress(Exception):  # broken orientation data: show it as it is stored
                image = ImageOps.exif_transpose(image)
        except Image.DecompressionBombError:
            raise BadSample("image has too many pixels") from None
        except UnidentifiedImageError:
            raise NotAnImage("not an image") from None
        except (OSError, SyntaxError, ValueError, EOFError, zlib.error):  # what Pillow raises on broken files
            raise BadSample("broken image") from None
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: plain conversion would clip it to white
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> np.ndarray:
    """The shorter side scaled to `side`, then the centre: uint8 (side, side, 3)."""
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def random_crop(image: Image.Image, side: int, rng: random.Random) -> np.ndarray:
    """DALL-E's augmentation: a square near the centre, scaled to at most 9/8 of `side`, and a random part of that,
    uint8 (side, side, 3). Never mirrored: captions say left and right."""
    s = min(image.size)
    x, y = (rng.randrange(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))
            for slack in (image.width - s, image.height - s))
    t = rng.randint(side, max(side, min(s, 9 * side // 8)))
    scaled = image.crop((x, y, x + s, y + s)).resize((t, t), Image.Resampling.LANCZOS)
    x, y = rng.randint(0, t - side), rng.randint(0, t - side)
    return np.asarray(scaled.crop((x, y, x + side, y + side)))


# ---------------------------------------------------------------------------------------------- samples and pairs

def read_pairs(source: str, image_size: int, counts: Counter, num_shapes: int = 0, split: str = "train",
               seed: int = 0) -> Iterator[Pair]:
    """The usable pairs of a source, in an order that never changes; counts gains "good" samples, and bad by reason.

    num_shapes and seed matter to `shapes:LEVEL` alone, split ("train", "val", "test") to it and to Karpathy's file.
    Raises DataError for a source that is not there, holds nothing, or of which more than 5% is bad.
    """
    for piece in pieces_of(source, image_size, num_shapes, split, seed):
        yield from pairs_in(piece, image_size, counts)
    refuse_bad(source, counts)


def usable(piece: Piece, counts: Counter) -> Iterator[tuple[str, list[str], Image.Image]]:
    """Key, captions and image of the samples that can be used; counts gains what read_pairs() says."""
    for key, load in piece.samples(counts):
        try:
            captions, image = load()
        except BadSample as reason:
            counts[str(reason)] += 1
            continue
        counts["good"] += 1
        yield key, captions, image


def pairs_in(piece: Piece, side: int, counts: Counter, crops: int = 0, seed: int = 0) -> Iterator[Pair]:
    """A pair for each caption of each sample: of its centre or, `crops` times, of a random crop of it.

    Which crops follows from the seed and the sample's key. The squeezed images are always of the whole.
    """
    for key, captions, image in usable(piece, counts):
        yield from as_pairs(key, captions, image, side, crops, seed)


def as_pairs(key: str, captions: list[str], image: Image.Image, side: int, crops: int = 0,
             seed: int = 0) -> Iterator[Pair]:
    """The pairs of one sample; those of one view of the image share its arrays."""
    tall, wide = (np.asarray(image.resize(size, Image.Resampling.LANCZOS))
                  for size in ((side // 2, side), (side, side // 2)))
    rngs = (random.Random(keyed_seed(seed, "crop", key, i)) for i in range(crops))
    for view in [random_crop(image, side, rng) for rng in rngs] or [square(image, side)]:
        for caption in captions:
            yield Pair(key, view, tall, wide, caption)


def refuse_bad(source: str, counts: Counter) -> None:
    """Raises DataError where nothing could be used, or more than 5% could not."""
    bad = sum(counts.values()) - counts["good"]
    if counts["good"] == 0:
        raise DataError(f"{source}: no usable pair of an image and a caption{left_out(counts)}")
    if bad > MAX_BAD_SHARE * (bad + counts["good"]):
        raise DataError(f"{source}: {bad} of {bad + counts['good']} samples are bad, more than {MAX_BAD_SHARE:.0%}: "
                        f"mend or remove them{left_out(counts)}")


def left_out(counts: Counter) -> str:
    """'; left out: 3 x not an image' and so on, or nothing."""
    bad = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common() if reason != "good")
    return f"; left out: {bad}" if bad else ""


# ---------------------------------------------------------------------------------------------- sources

def pieces_of(source: str, image_size: int = 0, num_shapes: int = 0, split: str = "train",
              seed: int = 0) -> list[Piece]:
    """The pieces of a source; what the arguments mean, and what is raised, says read_pairs(). image_size 0: any."""
    if source.startswith("shapes:"):
        return _shapes_pieces(source, image_size, num_shapes, split, seed)
    pieces = []
    for part in [source] if os.path.exists(source) else source.split(","):
        if part.startswith("coco:"):
            pieces += _coco_pieces(part, split)
        elif os.path.isdir(part) and not glob.glob(f"{glob.escape(part)}/*.tar"):
            pieces += _folder_pieces(part)
        else:
            pieces += [Piece(_stamp(shard), partial(_tar_samples, shard)) for shard in _shards(part)]
    return pieces


def _stamp(path: str | Path) -> tuple[str, int, int]:
    """A file's name, size and time of change."""
    about = os.stat(path)
    return str(path), about.st_size, about.st_mtime_ns


def _shapes_pieces(source: str, image_size: int, num_shapes: int, split: str, seed: int) -> list[Piece]:
    try:
        level = shapes.get_level(source.removeprefix("shapes:"))
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None
    if image_size not in (0, shapes.IMAGE):
        raise DataError(f"{source} draws {shapes.IMAGE} pixels a side, but image_size is {image_size}: set it so")

    def samples(start: int, counts: Counter) -> Iterator[tuple[str, Load]]:
        for i in range(start, min(start + PIECE, num_shapes)):
            yield f"{i:09d}", partial(draw, i)

    def draw(i: int) -> tuple[list[str], Image.Image]:
        rng = random.Random(keyed_seed(seed, split, i))
        scene = shapes.random_scene(level, rng, split)
        image = Image.fromarray(shapes.draw_scene(scene, level, rng))
        return [shapes.describe(scene, level, rng)], image
    return [Piece((source, split, seed, num_shapes, start), partial(samples, start))
            for start in range(0, num_shapes, PIECE)]


def _folder_pieces(folder: str) -> list[Piece]:
    """A key is a file's path without its suffix, which begins at the last dot."""
    paths = (path for path in Path(folder).rglob("*")
             if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = sorted((str(path.with_suffix("")), path.suffix[1:].lower(), path) for path in paths)
    groups = [list(group) for _, group in groupby(files, key=lambda file: file[0])]

    def samples(groups: list, counts: Counter) -> Iterator[tuple[str, Load]]:
        return _assembled((key, suffix, partial(_read, path)) for group in groups for key, suffix, path in group)
    return [Piece(tuple(_stamp(path) for group in share for _, _, path in group), partial(samples, share))
            for share in (groups[i:i + PIECE] for i in range(0, len(groups), PIECE))]


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadSample("no image") from None
    except (OSError, ValueError):  # the latter: a name that no file can have
        raise BadSample("unreadable file") from None
    if len(data) > MAX_BYTES:
        raise BadSample("file is too large")
    return data


def _coco_pieces(source: str, split: str) -> list[Piece]:
    path, _, folder = source.removeprefix("coco:").rpartition(":")
    if not path or not os.path.isfile(path) or not os.path.isdir(folder):
        raise DataError(f"{source}: give coco:CAPTIONS.json:FOLDER, a file and the folder of its images")
    try:
        images = list(_coco_captions(json.loads(Path(path).read_bytes()), split).items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{path}: neither COCO's captions (images, annotations with captions) nor Karpathy's (images "
                        "with sentences)") from None

    def samples(share: list, counts: Counter) -> Iterator[tuple[str, Load]]:
        for name, captions in share:
            yield name, partial(load, name, captions)

    def load(name: str, captions: list) -> tuple[list[str], Image.Image]:
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise BadSample("image outside of its folder")
        if not (captions := _as_captions(captions)):
            raise BadSample("no caption")
        return captions, open_image(_read(os.path.join(folder, name)))
    return [Piece((*_stamp(path), folder, split, i), partial(samples, images[i:i + PIECE]))
            for i in range(0, len(images), PIECE)]


def _coco_captions(content: dict, split: str) -> dict[str, list[str]]:
    """The captions of each image file. Karpathy's splits: most train on his train and restval."""
    if "annotations" in content:
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return {str(image["file_name"]): captions[image["id"]] for image in content["images"]}
    splits = ("train", "restval") if split == "train" else (split,)
    return {os.path.join(image.get("filepath", ""), image["filename"]): [s["raw"] for s in image["sentences"]]
            for image in content["images"] if image["split"] in splits}


# ---------------------------------------------------------------------------------------------- tar shards

def _shards(pattern: str) -> list[str]:
    """The files of a path, a folder of shards, or a pattern with * ? or {first..last}; a range must be there whole."""
    if os.path.isdir(pattern):
        return sorted(glob.glob(f"{glob.escape(pattern)}/*.tar"))
    if (numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)) and not os.path.exists(pattern):
        first, last = numbers.groups()
        return [shard for i in range(int(first), int(last) + 1) for shard in
                _shards(f"{pattern[:numbers.start()]}{i:0{len(first)}d}{pattern[numbers.end():]}")]
    shards = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not shards:
        raise DataError(f"{pattern}: no such folder or tar file (shards may be given as a quoted pattern, "
                        "'path/*.tar' or 'path/{00000..00331}.tar')")
    return shards


def _tar_samples(shard: str, counts: Counter) -> Iterator[tuple[str, Load]]:
    damage, found = Counter(), 0
    for found, sample in enumerate(_assembled(_tar_files(shard, damage)), 1):
        yield sample
    if damage:
        counts[f"lost in {shard}, which is damaged (estimate)"] += _lost_samples(shard, found, damage["bytes"])


def _tar_files(shard: str, damage: Counter) -> Iterator[tuple[str, str, Content]]:
    """Group, suffix and content of the files in a shard. A group is all up to the first dot, as webdataset has it.

    tarfile takes a damaged header for the archive's end; told to ignore zeros, it looks for the next sound one. What
    it skipped then lies between the end of one member and the beginning of the next: damage["bytes"], if any.
    """
    end = 0  # of the last member
    with open(shard, "rb") as file:  # a shard that may not be read is no damaged one: that error is the caller's
        try:
            tar = tarfile.open(fileobj=file, mode="r:*", ignore_zeros=True)
            for member in tar:
                if member.size < 0 or member.offset < end:
                    raise tarfile.ReadError("a member that ends before it begins")
                _note_damage(tar.fileobj, end, member.offset, damage)
                end = tar.offset
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                if member.isfile() and key:  # no key: a hidden file, such as some systems strew about
                    yield f"{folder}/{key}", suffix.lower(), _content(tar.fileobj, member)
            if not _note_damage(tar.fileobj, end, None, damage):
                raise tarfile.ReadError("no end mark: it was cut between two members")
        except TAR_ERRORS:
            damage["bytes"] += max(0, os.path.getsize(shard) - end)


def _content(file: io.BufferedIOBase, member: tarfile.TarInfo) -> Content:
    def refuse(reason: str) -> bytes:
        raise BadSample(reason)
    if member.issparse():  # a few bytes can claim terabytes of zeros
        return partial(refuse, "sparse file in a tar")
    if member.size > MAX_BYTES:
        return partial(refuse, "file is too large")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise EOFError
    return lambda: data


def _note_damage(file: io.BufferedIOBase, start: int, stop: int | None, damage: Counter) -> int:
    """How many bytes lie from start to stop, or to the end; up to the last that is not zero, damage gains them."""
    if start == stop:
        return 0
    file.seek(start)
    position = last = start
    while chunk := file.read(CHUNK if stop is None else min(CHUNK, stop - position)):
        if not_zero := chunk.rstrip(b"\0"):
            last = position + len(not_zero)
        position += len(chunk)
    if last > start:
        damage["bytes"] += last - start
    return position - start


def _lost_samples(shard: str, found: int, lost_bytes: int) -> int:
    """How many samples a damaged shard has lost: img2dataset's note beside it tells how many it had; else by size."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return max(1, json.loads(Path(shard.removesuffix(".tar") + "_stats.json").read_bytes())["successes"] - found)
    sound_bytes = os.path.getsize(shard) - lost_bytes
    return max(1, round(lost_bytes / (sound_bytes / found if found and sound_bytes > 0 else SAMPLE_BYTES)))


# ---------------------------------------------------------------------------------------------- files of one name

def _assembled(files: Iterable[tuple[str, str, Content]]) -> Iterator[tuple[str, Load]]:
    """Neighbouring files of one group make a sample; its key is the group's name without folders."""
    for group, members in groupby(files, key=lambda file: file[0]):
        yield group.rpartition("/")[2], partial(_load, [(suffix, content) for _, suffix, content in members])


def _load(members: list[tuple[str, Content]]) -> tuple[list[str], Image.Image]:
    """The captions are those of the .txt or else of the .json, the image is the first file that is one."""
    contents = dict(members)
    if len(contents) < len(members):
        raise BadSample("two files of one name")
    kinds = {suffix: suffix.rpartition(".")[2] for suffix in contents}
    texts = {kind: contents[suffix] for suffix, kind in kinds.items() if kind in ("txt", "json")}
    captions = _as_captions(texts["txt"]().decode("utf-8", errors="replace")) if "txt" in texts else []
    if not captions and "json" in texts:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # broken JSON, or no object
            about = json.loads(texts["json"]())
            captions = _as_captions(about.get("caption") or about.get("captions"))
    if not captions:
        raise BadSample("no caption")
    others = [content for suffix, content in contents.items() if kinds[suffix] not in ("txt", "json")]
    for content in others:
        with contextlib.suppress(NotAnImage):  # a .cls or .npy, say
            return captions, open_image(content())
    raise BadSample("not an image" if others else "no image")


def _as_captions(value) -> list[str]:
    """A string or a list of them, white space made single blanks; what is empty or no string goes."""
    texts = value if isinstance(value, list) else [value]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
