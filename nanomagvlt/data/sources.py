"""Chapter 11 - From files to pairs of an image and a caption.

A source of pairs is one string. Several sources are written with commas between them:
  shapes:LEVEL                 the small world of chapter 10, drawn when it is read
  a folder                     images, each with a .txt (or .json with "caption" or "captions") of the same name
  tar shards                   KEY.jpg KEY.txt KEY.json, as img2dataset and webdataset write them: a path, a folder of
                               .tar files, or a quoted pattern, 'shards/*.tar' or 'shards/{00000..00331}.tar'
  coco:CAPTIONS.json:IMAGES/   COCO's captions_*.json or Karpathy's dataset_coco.json; one pair per caption

    source --pieces_of--> pieces --usable--> captions and images --as_example--> examples

A piece is a shard or ten thousand images: a share of the source that is read without the rest. Hostile input is met
here and nowhere else: an image is recognised by its content, its size is checked before it is decoded, and nothing is
unpacked to disk. What a source lists is read, or counted by reason. S is the image side in pixels. Read on in cache.py.
"""
import codecs
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nanomagvlt.data import shapes
from nanomagvlt.rng import keyed_seed

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000  # a few bytes of PNG can claim gigabytes
MAX_ASPECT = 20          # a square crop shows little of a longer strip
MAX_BYTES = 100_000_000  # of one file: enough for any image of MAX_PIXELS
MAX_BAD_SHARE = 0.05     # of a source
PIECE = 10_000           # samples in a piece, as in a shard of img2dataset
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error,
              lzma.LZMAError)  # raised by tarfile for damaged files
JSON_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # damaged, or of another structure
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's begins with UTF-16's
APART = "the files of a key are not together, see tar --sort=name"
NO_SAMPLE = ("neither image nor caption", "no image", "further image of a name")  # counted, but not as bad samples


class BadSample(Exception):
    """A sample that cannot be used. The message is the reason under which it is counted."""
    count = 1  # more if the message stands for all samples that a damaged shard has lost


Counts = dict[str, tuple[int, str]]               # "good", or the reason -> how many, and the name of the first
File = tuple[str, str, Path | bytes | BadSample]  # group, suffix, and the content or the reason why there is none
Sample = tuple[str, list[str], Image.Image]       # key, captions, image


class Piece(NamedTuple):
    """A share of a source: load(item, counts) turns each of items() into a sample, or raises BadSample."""
    identity: tuple  # names, sizes and times of change of the files: it changes if the content does, not if it moves
    items: Callable[[], Iterable]
    load: Callable[..., Sample]


class Example(NamedTuple):
    """A sample as training reads it. MixSel joins two images that are squeezed to half the width or half the height."""
    key: str
    captions: list[str]
    views: list[np.ndarray]  # uint8 (S, S, 3): the image made square, or random crops of it
    tall: np.ndarray         # uint8 (S, S/2, 3): the whole image
    wide: np.ndarray         # uint8 (S/2, S, 3): the whole image


class CaptionedImage(NamedTuple):
    """An image in a caption file. `file` is a path in the folder of images; `domain` is NoCaps' own, else ""."""
    file: str
    id: int | str
    domain: str
    captions: list[str]


# ---------------------------------------------------------------------------------------------- images and examples

def open_image(data: bytes) -> Image.Image:
    """The upright RGB image in the bytes of a file, with transparent parts white. Raises BadSample."""
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise BadSample("image has too many pixels")
            if max(w, h) > MAX_ASPECT * min(w, h):
                raise BadSample("image is too long and thin")
            image.load()
            with contextlib.suppress(Exception):  # a damaged orientation tag: the image stays as it is stored
                image = ImageOps.exif_transpose(image)
        except Image.DecompressionBombError:
            raise BadSample("image has too many pixels") from None
        except UnidentifiedImageError:
            raise BadSample("not an image") from None
        except (OSError, SyntaxError, ValueError, EOFError, zlib.error):  # raised by Pillow for damaged files
            raise BadSample("broken image") from None
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: convert("RGB") would clip it to white
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, side: int, fit: str) -> np.ndarray:
    """An image as uint8 (side, side, 3): its centre (fit "crop"), all of it squeezed ("squeeze"), or all of it between
    white bars ("pad")."""
    to_square = {"crop": ImageOps.fit, "squeeze": Image.Image.resize, "pad": partial(ImageOps.pad, color="white")}[fit]
    return np.asarray(to_square(image, (side, side), Image.Resampling.LANCZOS))


def random_crop(image: Image.Image, side: int, rng: random.Random) -> np.ndarray:
    """DALL-E's augmentation: a square near the centre is scaled to between 1 and 9/8 of `side`, and a random part of it
    is cut out, uint8 (side, side, 3). It is never mirrored: captions contain "left" and "right"."""
    s = min(image.size)
    x, y = (rng.randrange(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))
            for slack in (image.width - s, image.height - s))
    t = rng.randint(side, max(side, min(s, 9 * side // 8)))
    scaled = image.crop((x, y, x + s, y + s)).resize((t, t), Image.Resampling.BILINEAR)  # as the release
    x, y = rng.randint(0, t - side), rng.randint(0, t - side)
    return np.asarray(scaled.crop((x, y, x + side, y + side)))


def read_examples(source: str, pieces: list[Piece], side: int, counts: Counts, fit: str = "crop") -> Iterator[Example]:
    """The examples of a source, of which these are the pieces, always in the same order. counts gains the number of
    samples under "good", and of all else under the reason. Raises ValueError if there are too many bad samples."""
    for piece in pieces:
        for sample in usable(piece, counts):
            yield as_example(*sample, side, fit)
    check_bad_share(source, counts)


def usable(piece: Piece, counts: Counts) -> Iterator[Sample]:
    """The usable samples of a piece; counts as in read_pairs()."""
    for item in piece.items():
        try:
            sample = piece.load(item, counts)
        except BadSample as error:
            count(counts, str(error), str(item[0]), error.count)
        else:
            count(counts, "good", sample[0])
            yield sample


def count(counts: Counts, reason: str, name: str, number: int = 1) -> None:
    """Adds so many to a reason. name is of the first of them, and is kept if it is the first of all."""
    before, first = counts.get(reason, (0, name))
    counts[reason] = before + number, first


def as_example(key: str, captions: list[str], image: Image.Image, side: int, fit: str = "crop", crops: int = 0,
               seed: int = 0) -> Example:
    """An example with one view, square(image), or with `crops` random crops by seed and key."""
    half = side // 2
    tall, wide = (np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for size in ((half, side), (side, half)))
    views = [random_crop(image, side, random.Random(keyed_seed(seed, "crop", key, i))) for i in range(crops)]
    return Example(key, captions, views or [square(image, side, fit)], tall, wide)


def check_bad_share(source: str, counts: Counts) -> None:
    """Raises ValueError if no sample is good, more than 5% are bad, or more captions have no image than are good."""
    good, total, least = counts.get("good", (0, ""))[0], num_samples(counts), 1 - MAX_BAD_SHARE
    if good == 0 or total - good > MAX_BAD_SHARE * total or counts.get("no image", (0, ""))[0] > good:
        raise ValueError(f"{source}: {good} of {total} samples are good, {least:.0%} must be{left_out(counts)}")


def num_samples(counts: Counts) -> int:
    """The samples of a source, good and bad."""
    return sum(number for reason, (number, _) in counts.items() if reason not in NO_SAMPLE)


def left_out(counts: Counts) -> str:
    """What is not good by reason, such as "; left out: 3 x not an image (first: d/07)"; empty if there is none."""
    reasons = ", ".join(f"{number} x {reason} (first: {first!r})" for reason, (number, first) in
                        sorted(counts.items(), key=lambda item: -item[1][0]) if reason != "good")
    return f"; left out: {reasons}" if reasons else ""


# ---------------------------------------------------------------------------------------------- sources

def pieces_of(source: str, image_size: int = 0, num_shapes: int = 0, split: str = "train", seed: int = 0
              ) -> list[Piece]:
    """The pieces of a source. num_shapes and seed are for `shapes:LEVEL`; split ("train", "val" or "test") is for it
    and for Karpathy's file. Raises ValueError for a source that is absent."""
    pieces = []
    for part in [source] if os.path.exists(source) else source.split(","):
        before = len(pieces)
        if part.startswith("shapes:"):
            pieces += _shapes_pieces(part, image_size, num_shapes, split, seed)
        elif part.startswith("coco:"):
            pieces += _coco_pieces(part, split)
        elif os.path.isdir(part):
            pieces += _folder_pieces(part)
        else:
            pieces += map(_shard_piece, _shards(part))
        if len(pieces) == before and not part.startswith("shapes:"):
            raise ValueError(f"{part or source}: has no samples{f' of split {split}' * part.startswith('coco:')}")
    return pieces


def _stamp(path: str | Path, folder: str) -> tuple[str, int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # absent, or a link to nothing
        return os.path.relpath(path, folder), 0, 0
    return os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns


def _shard_piece(shard: str) -> Piece:
    return Piece(_stamp(shard, os.path.dirname(shard)), lambda: groupby(_tar_files(shard), itemgetter(0)), _load)


def _shapes_pieces(source: str, image_size: int, num_shapes: int, split: str, seed: int) -> list[Piece]:
    level = shapes.level_of(source)
    if image_size not in (0, shapes.IMAGE):
        raise ValueError(f"{source} needs image_size {shapes.IMAGE}, not {image_size}")

    def draw(i: int, counts: Counts) -> Sample:
        rng = random.Random(keyed_seed(seed, split, i))
        scene = shapes.random_scene(level, rng, split)
        image = Image.fromarray(shapes.draw_scene(scene, level, rng))
        return f"{i:09d}", [shapes.describe(scene, level, rng)], image
    return [Piece((source, split, seed, num_shapes, i), partial(range, i, min(i + PIECE, num_shapes)), draw)
            for i in range(0, num_shapes, PIECE)]


def _folder_pieces(folder: str) -> list[Piece]:
    """The pieces of a folder and its subfolders: its shards, and its other files in groups of one name."""
    paths, shards, files = sorted(_files_of(folder, ())), [], []
    for path in paths:
        is_shard, (name, suffix) = path.lower().endswith((".tar", ".tar.gz", ".tgz")), os.path.splitext(path)
        (shards if is_shard else files).append((name, suffix[1:].lower(), Path(path)))
    groups = [(name, list(group)) for name, group in groupby(sorted(files), itemgetter(0))]
    shares = [groups[i:i + PIECE] for i in range(0, len(groups), PIECE)]
    return [_shard_piece(str(path)) for *_, path in shards] + [
        Piece(tuple(_stamp(path, folder) for _, group in share for *_, path in group), partial(iter, share), _load)
        for share in shares]


def _files_of(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The files of a folder and its subfolders, but hidden ones. A linked folder is read, unless it leads back up."""
    above = *above, os.path.realpath(folder)
    for entry in os.scandir(folder):
        if entry.is_dir():
            if not entry.name.startswith(".") and os.path.realpath(entry) not in above:
                yield from _files_of(entry.path, above)
        elif (entry.is_file() or entry.is_symlink()) and not entry.name.startswith("."):
            yield os.path.normpath(entry.path)


def read_caption_file(path: Path, split: str | None) -> tuple[list[CaptionedImage], bool]:
    """The images of COCO's, NoCaps' or Karpathy's caption file, and whether it has splits: only Karpathy's has.

    split selects images of Karpathy's file: "train" includes his "restval", None means "test". Ids are compared as
    strings, and an image that is listed twice has the captions of both. Raises ValueError for a file of another
    structure, captions of an unknown id, and two files of one id.
    """
    try:
        content, captions = json.loads(path.read_bytes()), defaultdict(list)
        if has_splits := "annotations" not in content:
            splits = {None: ("test",), "train": ("train", "restval")}.get(split, (split,))
            images = [(row.get("cocoid", row["filename"]), row)  # in his files of Flickr there is no cocoid
                      for row in content["images"] if row["split"] in splits]
            rows = [(os.path.join(row.get("filepath", ""), row["filename"]), id, "") for id, row in images]
            pairs = [(id, sentence["raw"]) for id, row in images for sentence in row["sentences"]]
        else:
            rows = [(str(row["file_name"]), row["id"], row.get("domain", "")) for row in content["images"]]
            pairs = [(row["image_id"], row["caption"]) for row in content["annotations"]]
        for id, caption in pairs:
            captions[str(id)].append(caption)
    except JSON_ERRORS:
        raise ValueError(f"{path}: neither COCO's captions nor Karpathy's") from None
    images = {str(row[1]): row for row in rows}
    if different := [id for file, id, _ in rows if file != images[str(id)][0]]:
        raise ValueError(f"{path}: has two images {different[0]}")
    if unknown := [id for id in captions if id not in images]:
        raise ValueError(f"{path}: has captions of image {unknown[0]}, but no such image")
    return [CaptionedImage(*row, _as_captions(captions[id])) for id, row in images.items()], has_splits


def _coco_pieces(source: str, split: str) -> list[Piece]:
    path, _, folder = source.removeprefix("coco:").rpartition(":")
    if not os.path.isfile(path) or not os.path.isdir(folder):
        raise ValueError(f"{source}: give coco:CAPTIONS.json:FOLDER, a file and the folder of its images")
    images, _ = read_caption_file(Path(path), split)

    def load(image: CaptionedImage, counts: Counts) -> Sample:
        if os.path.isabs(image.file) or os.path.normpath(image.file).startswith(".."):
            raise BadSample("image outside of its folder")
        if not image.captions:
            raise BadSample("no caption")
        return image.file, image.captions, open_image(_read(Path(folder, image.file)))
    shares = [images[i:i + PIECE] for i in range(0, len(images), PIECE)]
    return [Piece((_stamp(path, os.path.dirname(path)), split, i,
                   *(_stamp(os.path.join(folder, image.file), folder) for image in share)), partial(iter, share), load)
            for i, share in enumerate(shares)]


def _shards(pattern: str) -> list[str]:
    """The files of a path, or of a pattern with * ? or {first..last}. Raises ValueError if one is absent."""
    if os.path.exists(pattern):
        return [pattern]
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        (first, last), (start, end) = numbers.groups(), numbers.span()
        if int(first) > int(last):
            raise ValueError(f"{pattern}: the first number is above the last")
        return [shard for i in range(int(first), int(last) + 1)
                for shard in _shards(f"{pattern[:start]}{i:0{len(first)}d}{pattern[end:]}")]
    if not (shards := sorted(glob.glob(pattern))):
        raise ValueError(f"{pattern}: no such folder or tar file (a pattern of shards needs quotes, as 'path/*.tar')")
    return shards


def _tar_files(shard: str) -> Iterator[File]:
    """The files of a shard. At the first damage reading stops, and one more file stands for all samples that are lost:
    their number follows from img2dataset's _stats.json, or is 1 without it. A missing end mark is not damage."""
    groups, apart, group = set(), set(), ""
    with open(shard, "rb") as file:  # outside of try: a shard that cannot be opened is not damaged
        try:
            tar = tarfile.open(fileobj=file, mode="r:*")
            for member in tar:
                if member.size < 0 or member.issparse():
                    raise tarfile.ReadError("hostile: a sparse file of a few bytes may claim terabytes of zeros")
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")  # a key ends at the first dot, as in webdataset
                if key and not member.isdir():        # without key: a hidden file
                    content = BadSample("file is too large" if member.isfile() else "a link, not a file")
                    if member.isfile() and member.size <= MAX_BYTES:
                        content = tar.fileobj.read(member.size)
                        if len(content) < member.size:
                            raise tarfile.ReadError("the shard ends within this file")
                    before, group = group, os.path.join(shard, folder, key)
                    if group != before and group in groups:
                        apart.add(group)
                    groups.add(group)
                    yield group, suffix.lower(), BadSample(APART) if group in apart else content
            tar.fileobj.seek(tar.offset)
            if any(block.strip(b"\0") for block in iter(partial(tar.fileobj.read, 1 << 20), b"")):
                raise tarfile.ReadError("a damaged header: tarfile stops there without an error")
            damage = BadSample(f"lost in {shard}, which has less than its _stats.json says")
            damage.count = 0
        except TAR_ERRORS:
            damage = BadSample(f"lost in {shard}, which is damaged or no tar file")
        with contextlib.suppress(OSError, *JSON_ERRORS):
            stats = json.loads(Path(shard.removesuffix(".tar") + "_stats.json").read_bytes())
            damage.count = max(damage.count, stats["successes"] - len(groups))
        if damage.count:
            yield shard, "txt", damage


def _load(group: tuple[str, Iterable[File]], counts: Counts) -> Sample:
    """The sample of a group: the captions of the .txt, or else of the .json, and the first image of the other files.
    Each line of a .txt is a caption."""
    name, files = group[0], list(group[1])
    contents = {re.sub(r".*\.(txt|json)$", r"\1", suffix): content for _, suffix, content in files}
    if len(contents) < len(files):
        raise BadSample("two files of one name")
    text, about = (_read(contents.pop(suffix, b"")) for suffix in ("txt", "json"))
    images, problems = [], []
    for content in contents.values():
        try:
            images.append(open_image(_read(content)))
        except BadSample as error:
            problems += [str(error)] if str(error) != "not an image" else []  # such as a .cls beside the image
    if not images and (text or about) and contents or APART in problems:
        raise BadSample([*problems, "not an image"][0])
    if not images:
        raise BadSample("no image" if text or about else "neither image nor caption")
    captions = _as_captions(_decode(text).splitlines())
    if not captions:
        with contextlib.suppress(*JSON_ERRORS):
            about = json.loads(about)
            captions = _as_captions(about.get("caption") or about.get("captions"))
    if not captions:
        raise BadSample("no caption")
    if further := len(images) - 1 + len(problems):
        count(counts, "further image of a name", name, further)
    return name.rpartition("/")[2], captions, images[0]


def _decode(text: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with their byte-order mark. Raises BadSample."""
    encoding = next((name for mark, name in MARKS.items() if text.startswith(mark)), "utf-8-sig")
    with contextlib.suppress(UnicodeDecodeError):
        decoded = text.decode(encoding)
        if decoded.count("\0") <= len(decoded) // 3:  # else it is UTF-16 without the mark
            return decoded
    raise BadSample("caption is not UTF-8")


def _read(content: Path | bytes | BadSample) -> bytes:
    """The content of a file. Raises BadSample."""
    if isinstance(content, BadSample):
        raise content
    if isinstance(content, bytes):
        return content
    try:
        if content.stat().st_size > MAX_BYTES:
            raise BadSample("file is too large")
        if not content.is_file():  # a link to a device
            raise BadSample("file is absent or unreadable")
        return content.read_bytes()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise BadSample("file is absent or unreadable") from None


def _as_captions(value) -> list[str]:
    """The captions in a string or a list of strings, with single blanks. Empty ones and other values are left out."""
    texts = value if isinstance(value, list) else [value]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
