"""Chapter 11 - From pairs to batches.

Pairs come from three kinds of source, named by one string:
  shapes:LEVEL             the small world, drawn on the fly
  a folder                 images with a .txt (or .json with a "caption") of the same name beside them
  tar shards               as img2dataset writes them: KEY.jpg KEY.txt KEY.json; a path, or a quoted pattern with * ?
Reading is where hostile input is met, once: an image is known by its content, never by its name, its size is read
before it is decoded, and what cannot be used is counted by reason, never fatal and never silent.

Training then reads one format, the token cache: image tokens as uint16 and captions as text, both memory-mapped. The
images are tokenised once, the captions anew each time, since BPE dropout wants them so.

All that is random depends on (seed, place, purpose), not on history: resuming at update 1000 needs no saved state.

Shapes: B batch, S image side in pixels, N image tokens, T text places.
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from nanomagvlt import shapes
from nanomagvlt.bpe import BPE, clean_caption

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000   # more is refused unread: a few bytes of PNG can claim gigabytes
MAX_ASPECT = 20           # a longer strip has nothing to show after a square crop
MAX_BAD_SHARE = 0.05      # a source worse than this is a mistake, not bad luck

CACHE_FILES = ("tokens.bin", "captions.bin", "caption_ends.bin", "meta.json")

Content = Callable[[], bytes]  # what is in a file, read when it is asked for


@dataclass
class Pair:
    """An image, its caption, and the whole image squeezed into half the room, as MixSel joins two of them."""
    key: str
    image: np.ndarray  # uint8 (S, S, 3)
    tall: np.ndarray   # uint8 (S, S/2, 3)
    wide: np.ndarray   # uint8 (S/2, S, 3)
    caption: str

    @classmethod
    def of(cls, key: str, image: Image.Image, side: int, caption: str) -> "Pair":
        """From a picture of any size: `image` is its centre, the squeezed ones are the whole of it."""
        tall, wide = (np.asarray(image.resize(size, Image.Resampling.LANCZOS))
                      for size in ((side // 2, side), (side, side // 2)))
        return cls(key, square(image, side), tall, wide, caption)


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason it is counted under."""


class DataError(ValueError):
    """A source that cannot be used; the message is one line that names it and says what to do."""


# ---------------------------------------------------------------------------------------------- randomness

def keyed_seed(*key) -> int:
    """A seed in [0, 2^63) made of anything printable: (seed, step, "mask"), say."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key) -> torch.Generator:
    """A CPU generator that always starts the same for the same key."""
    return torch.Generator().manual_seed(keyed_seed(*key))


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
            raise BadSample("not an image") from None
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


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]: (x - 0.5) / 0.5 for x in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, S, S), about [-1, 1] -> uint8 (B, S, S, 3)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- sources

def read_pairs(source: str, image_size: int, counts: Counter, num_shapes: int = 0, split: str = "train",
               seed: int = 0) -> Iterator[Pair]:
    """The usable pairs of a source, in an order that never changes; counts gains "good" and a number per reason.

    num_shapes, split ("train", "val", "test") and seed matter to `shapes:LEVEL` alone. Raises DataError for a source
    that is not there, holds nothing, or of which more than 5% is bad.
    """
    if source.startswith("shapes:"):
        yield from _read_shapes(source, image_size, counts, num_shapes, split, seed)
        return
    for key, members in _grouped(_read_files(source, counts)):
        try:
            pair = _assemble(key, members, image_size)
        except BadSample as reason:
            counts[str(reason)] += 1
            continue
        counts["good"] += 1
        yield pair
    bad = sum(counts.values()) - counts["good"]
    reasons = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common() if reason != "good")
    if counts["good"] == 0:
        raise DataError(f"{source}: no usable pair of an image and a caption" + (f" ({reasons})" if reasons else ""))
    if bad > MAX_BAD_SHARE * (bad + counts["good"]):
        raise DataError(f"{source}: {bad} of {bad + counts['good']} samples are bad, more than {MAX_BAD_SHARE:.0%} "
                        f"({reasons}): mend or remove them")


def _read_shapes(source, image_size, counts, num_shapes, split, seed) -> Iterator[Pair]:
    try:
        level = shapes.get_level(source.removeprefix("shapes:"))
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None
    if shapes.IMAGE != image_size:
        raise DataError(f"{source} draws {shapes.IMAGE} pixels a side, but image_size is {image_size}: set it so")
    for i in range(num_shapes):
        rng = random.Random(keyed_seed(seed, split, i))
        scene = shapes.random_scene(level, rng, split)
        counts["good"] += 1
        image = Image.fromarray(shapes.draw_scene(scene, level, rng))
        yield Pair.of(f"{i:09d}", image, image_size, shapes.describe(scene, level, rng))


def _read_files(source: str, counts: Counter) -> Iterator[tuple[str, str, Content]]:
    """Key, suffix and content (read on demand) of the files of a folder or of tar shards, those of one key together.

    In a folder a key is the name without its suffix; in a shard it ends at the first dot, as webdataset has it.
    """
    if os.path.isdir(source) and glob.glob(f"{glob.escape(source)}/*.tar"):
        source = f"{glob.escape(source)}/*.tar"
    if os.path.isdir(source):
        for path in sorted(p for p in Path(source).rglob("[!.]*") if p.is_file()):
            yield str(path.with_suffix("")), path.suffix[1:].lower(), path.read_bytes
        return
    shards = sorted(glob.glob(source))
    if not shards:
        raise DataError(f"{source}: no such folder or tar file (shards may be given as a quoted pattern, 'path/*.tar')")
    for shard in shards:
        try:
            with tarfile.open(shard, "r:*") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    key, _, suffixes = base.partition(".")
                    if member.isfile() and key:  # no key: a hidden file, such as some systems strew about
                        data = tar.extractfile(member).read()  # into memory only: nothing is ever unpacked to disk
                        yield f"{shard}/{folder}/{key}", suffixes.rpartition(".")[2].lower(), lambda data=data: data
        except (tarfile.TarError, OSError, EOFError, zlib.error):
            counts["broken or truncated shard"] += 1


def _grouped(files: Iterable[tuple[str, str, Content]]) -> Iterator[tuple[str, dict[str, Content]]]:
    """Neighbouring files of one key: the key, and the contents by suffix."""
    for key, group in groupby(files, key=lambda file: file[0]):
        members: dict[str, Content] = {}
        for _, suffix, content in group:
            members["duplicate" if suffix in members else suffix] = content
        yield key.rpartition("/")[2], members


def _assemble(key: str, members: dict[str, Content], image_size: int) -> Pair:
    caption = members.pop("txt", bytes)().decode("utf-8", errors="replace")
    meta = members.pop("json", bytes)()
    if "duplicate" in members:
        raise BadSample("two files of one name")
    if not caption.strip() and meta:
        with contextlib.suppress(ValueError, AttributeError):  # broken JSON, or no object: no caption there
            caption = json.loads(meta).get("caption") or ""
    caption = " ".join(str(caption).split())
    if not caption:
        raise BadSample("no caption")
    if not members:
        raise BadSample("no image")
    return Pair.of(key, open_image(next(iter(members.values()))()), image_size, caption)


# ---------------------------------------------------------------------------------------------- the token cache

class TokenCache:
    """A folder of image tokens (uint16, memory-mapped) and captions, one row a pair; write_cache() makes it.

    A row of tokens.bin holds the N tokens of the image, then N/2 of it squeezed tall, then N/2 of it squeezed wide.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            pairs, num_tokens = self.meta["pairs"], self.meta["image_tokens"]
            self.tokens = np.memmap(folder / "tokens.bin", np.uint16, "r", shape=(pairs, 2 * num_tokens))
            self.ends = np.memmap(folder / "caption_ends.bin", np.int64, "r", shape=(pairs,))
            self.text = np.memmap(folder / "captions.bin", np.uint8, "r", shape=(int(self.ends[-1]),))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: no whole token cache ({error}); make it with data/prepare.py") from None

    def __len__(self) -> int:
        return self.meta["pairs"]

    def image_tokens(self, rows: np.ndarray) -> torch.Tensor:
        """Rows (B,) -> image tokens (B, N) long."""
        return self.tokens_of(rows)[0]

    def tokens_of(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (B,) -> tokens of the images (B, N), of the tall ones (B, N/2) and of the wide ones (B, N/2), long."""
        n = self.meta["image_tokens"]
        return torch.from_numpy(self.tokens[rows].astype(np.int64)).split((n, n // 2, n // 2), dim=1)

    def captions(self, rows: Iterable[int]) -> list[str]:
        """Rows (B,) -> their captions."""
        starts = (self.ends[i - 1] if i else 0 for i in rows)
        return [self.text[start:self.ends[i]].tobytes().decode() for i, start in zip(rows, starts)]


def write_cache(folder: str | Path, pairs: Iterable[Pair], vqgan, meta: dict, clean: bool = False,
                batch_size: int = 64) -> TokenCache:
    """Tokenises pairs with the VQ-GAN into a TokenCache, whole or absent; meta is put into its meta.json.

    clean: captions go through clean_caption() first.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    for place, mark in ((folder, "meta.json"), (unfinished, "tokens.bin")):  # only what is ours may be replaced
        if place.exists() and not (place / mark).exists() and (not place.is_dir() or any(place.iterdir())):
            raise DataError(f"{place} is there and is no token cache: name another folder, nothing in it was touched")
    if (folder / "meta.json").exists() and any(path.name not in CACHE_FILES for path in folder.iterdir()):
        raise DataError(f"{folder} holds more than a token cache: name another folder, nothing in it was touched")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    device = vqgan.quantize.embedding.weight.device
    num_pairs = end = num_tokens = 0
    with (contextlib.ExitStack() as on_error,
          open(unfinished / "tokens.bin", "wb") as token_file,
          open(unfinished / "captions.bin", "wb") as caption_file,
          open(unfinished / "caption_ends.bin", "wb") as end_file):
        on_error.callback(shutil.rmtree, unfinished)
        for batch in batched(pairs, batch_size):
            parts = (np.stack([getattr(pair, name) for pair in batch]) for name in ("image", "tall", "wide"))
            with torch.inference_mode():
                tokens = torch.cat([vqgan.encode(to_pixels(part).to(device)) for part in parts], dim=1)  # (B, 2N)
            token_file.write(tokens.cpu().numpy().astype(np.uint16).tobytes())
            captions = [clean_caption(pair.caption) if clean else pair.caption for pair in batch]
            captions = [caption.encode("utf-8", errors="replace") for caption in captions]
            ends = end + np.cumsum([len(c) for c in captions], dtype=np.int64)                         # (B,)
            caption_file.write(b"".join(captions))
            end_file.write(ends.tobytes())
            num_pairs, num_tokens, end = num_pairs + len(batch), tokens.shape[1] // 2, int(ends[-1])
        if num_pairs == 0:
            raise DataError(f"{folder}: there is no pair to put into the cache")
        on_error.pop_all()
    write_json(unfinished / "meta.json", {"pairs": num_pairs, "image_tokens": num_tokens, "clean_captions": clean,
                                           **meta})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return TokenCache(folder)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one maybe shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def write_json(path: Path, value) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=2)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(num_items, generator=keyed_generator(seed, "epoch", epoch)).numpy()


def rows_of_step(step: int, batch_size: int, num_items: int, seed: int) -> np.ndarray:
    """The rows (B,) of a batch, a function of step alone: every row once an epoch, each epoch in another order."""
    place = np.arange(step * batch_size, (step + 1) * batch_size)                                    # (B,)
    epoch, offset = place // num_items, place % num_items
    rows = np.empty_like(place)
    for e in np.unique(epoch):
        rows[epoch == e] = _permutation(num_items, seed, int(e))[offset[epoch == e]]
    return rows


def encode_captions(bpe: BPE, captions: list[str], text_length: int, dropout: float = 0.0,
                    key: tuple = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> text_tokens (B, T) and text_lengths (B,), long. BPE dropout is keyed by (key, place in the batch)."""
    rngs = (random.Random(keyed_seed(*key, i)) if dropout else None for i in range(len(captions)))
    encoded = [bpe.pad(bpe.encode(caption, dropout, rng), text_length) for caption, rng in zip(captions, rngs)]
    return torch.tensor([ids for ids, _ in encoded]), torch.tensor([length for _, length in encoded])


def make_batch(cache: TokenCache, bpe: BPE, rows: np.ndarray, cfg, dropout: float = 0.0,
               key: tuple = ()) -> dict[str, torch.Tensor]:
    """What objectives.py wants: image_tokens (B, N), tall_tokens and wide_tokens (B, N/2), text_tokens (B, T) and
    text_lengths (B,). T is the longest caption, rounded up to a multiple of cfg.text_bucket: padding is not computed.
    """
    image_tokens, tall_tokens, wide_tokens = cache.tokens_of(rows)
    text_tokens, text_lengths = encode_captions(bpe, cache.captions(rows), cfg.text_length, dropout, key)
    places = -(-int(text_lengths.max()) // cfg.text_bucket) * cfg.text_bucket
    return {"image_tokens": image_tokens, "tall_tokens": tall_tokens, "wide_tokens": wide_tokens,
            "text_tokens": text_tokens[:, :places], "text_lengths": text_lengths}


def left_out(counts: Counter) -> str:
    """'; left out: 3 x not an image' and so on, or nothing."""
    bad = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common() if reason != "good")
    return f"; left out: {bad}" if bad else ""
