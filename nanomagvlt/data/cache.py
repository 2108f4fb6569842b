"""Chapter 12 - From pairs to batches.

Training reads one format, the token cache: image tokens as uint16 and captions as text, both memory-mapped. The images
are tokenised once, the captions anew each time, since BPE dropout wants them so.

A large cache is made piece by piece: write_part() puts a piece of the source into a file, whole or not at all, by as
many processes as there are; join_parts() puts the parts together. A part that is there is never made again.

All that is random depends on (seed, place, purpose), not on history: resuming at update 1000 needs no saved state.

Shapes: B batch, S image side in pixels, N image tokens, T text places, V the bytes of captions. Read on in train.py.
"""
import contextlib
import json
import os
import random
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.io import whole, write_json
from nanomagvlt.data.sources import DataError, Pair, Piece, pairs_in, refuse_bad

CACHE_FILES = ("tokens.bin", "captions.bin", "caption_ends.bin", "meta.json")


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]: (x - 0.5) / 0.5 for x in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, S, S), about [-1, 1] -> uint8 (B, S, S, 3)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


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


class Rows(NamedTuple):
    """Some rows of a cache."""
    tokens: np.ndarray  # uint16 (B, 2N)
    text: np.ndarray    # uint8 (V,): the captions in UTF-8, one behind the other
    sizes: np.ndarray   # int64 (B,): how many bytes each has


def tokenise(pairs: list[Pair], vqgan, clean: bool) -> Rows:
    """The rows of B pairs. clean: captions go through clean_caption() first."""
    device = vqgan.quantize.embedding.weight.device

    def encode(images: list[np.ndarray]) -> torch.Tensor:
        once = {id(image): image for image in images}  # a sample's captions share the image, its crops what is squeezed
        tokens = vqgan.encode(to_pixels(np.stack([*once.values()])).to(device))
        places = {key: i for i, key in enumerate(once)}
        return tokens[[places[id(image)] for image in images]]
    with torch.inference_mode():
        tokens = torch.cat([encode([getattr(pair, name) for pair in pairs]) for name in ("image", "tall", "wide")], 1)
    captions = [clean_caption(pair.caption) if clean else pair.caption for pair in pairs]
    captions = [caption.encode("utf-8", errors="replace") for caption in captions]  # a lone surrogate has no bytes
    return Rows(tokens.cpu().numpy().astype(np.uint16), np.frombuffer(b"".join(captions), np.uint8),
                np.array([len(caption) for caption in captions], dtype=np.int64))


def write_cache(folder: str | Path, pairs: Iterable[Pair], vqgan, meta: dict, clean: bool = False,
                batch_size: int = 64) -> TokenCache:
    """Tokenises pairs with the VQ-GAN into a TokenCache, whole or absent; meta is put into its meta.json.

    clean: captions go through clean_caption() first.
    """
    rows = (tokenise(batch, vqgan, clean) for batch in batched(pairs, batch_size))
    return _write_rows(Path(folder), rows, {"clean_captions": clean, **meta})


def refuse_foreign(folder: Path) -> None:
    """Raises DataError where a cache would replace what is none: only what is ours may be."""
    for place, mark in ((folder, "meta.json"), (_unfinished(folder), "tokens.bin")):
        if place.exists() and not (place / mark).exists() and (not place.is_dir() or any(place.iterdir())):
            raise DataError(f"{place} is there and is no token cache: name another folder, nothing in it was touched")
    if (folder / "meta.json").exists() and any(path.name not in CACHE_FILES for path in folder.iterdir()):
        raise DataError(f"{folder} holds more than a token cache: name another folder, nothing in it was touched")


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def _write_rows(folder: Path, many_rows: Iterable[Rows], meta: dict) -> TokenCache:
    refuse_foreign(folder)
    unfinished = _unfinished(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_pairs = end = num_tokens = 0
    with contextlib.ExitStack() as on_error, contextlib.ExitStack() as opened:
        on_error.callback(shutil.rmtree, unfinished)
        files = [opened.enter_context(open(unfinished / name, "wb")) for name in CACHE_FILES[:3]]
        for rows in many_rows:
            num_pairs, num_tokens = num_pairs + len(rows.tokens), rows.tokens.shape[1] // 2
            for file, values in zip(files, (rows.tokens, rows.text, end + np.cumsum(rows.sizes))):
                file.write(values.tobytes())
            end += int(rows.sizes.sum())
        if num_pairs == 0:
            raise DataError(f"{folder}: there is no pair to put into the cache")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        on_error.pop_all()
    write_json(unfinished / "meta.json", {"pairs": num_pairs, "image_tokens": num_tokens, **meta})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return TokenCache(folder)


# ---------------------------------------------------------------------------------------------- a cache in parts

def part_paths(folder: str | Path, pieces: list[Piece], settings: dict) -> list[Path]:
    """Where the part of each piece is kept until the cache is whole: in FOLDER.parts.

    A part's name is a hash of all it depends on. So a part that is there is the right one, and what was made with
    other settings or from a shard that has changed since is made anew.
    """
    parts = Path(folder).with_name(Path(folder).name + ".parts")
    return [parts / f"{keyed_seed(piece.identity, sorted(settings.items())):016x}.npz" for piece in pieces]


def write_part(path: Path, piece: Piece, vqgan, settings: dict, progress: Callable[[int], None]) -> None:
    """Tokenises a piece into a file, whole or absent. settings has crops, seed and clean_captions; progress() is told
    how many pairs have been added."""
    counts, many_rows = Counter(), []
    for batch in batched(pairs_in(piece, vqgan.cfg.image_size, counts, settings["crops"], settings["seed"]), 64):
        many_rows.append(tokenise(batch, vqgan, settings["clean_captions"]))
        progress(len(batch))
    none = Rows(np.empty((0, 2 * vqgan.cfg.image_tokens), np.uint16), np.empty(0, np.uint8), np.empty(0, np.int64))
    rows = Rows(*(np.concatenate(column) for column in zip(none, *many_rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        np.savez(file, counts=np.array(json.dumps(counts)), **rows._asdict())


def join_parts(folder: str | Path, source: str, paths: list[Path], settings: dict) -> TokenCache:
    """The cache of a source whose parts are all there; its meta["counts"] says what was left out.

    Raises DataError where more than 5% of the source is bad: of what is then mended, the parts are made anew.
    """
    counts = sum((Counter(json.loads(str(_read_part(path, "counts")[0]))) for path in paths), Counter())
    refuse_bad(source, counts)
    many_rows = (Rows(*_read_part(path, *Rows._fields)) for path in paths)
    return _write_rows(Path(folder), many_rows, {"source": source, **settings, "counts": counts,
                                                 "made_of": _made_of(paths)})


def is_made(folder: str | Path, paths: list[Path]) -> bool:
    """Whether the cache is there, and was joined of just these parts."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((Path(folder) / "meta.json").read_text()).get("made_of") == _made_of(paths)
    return False


def remove_parts(paths: list[Path]) -> None:
    """Deletes these parts, and what else of parts lies beside them: of other settings, or half written."""
    for path in paths[0].parent.glob("*.npz*"):
        path.unlink()
    with contextlib.suppress(OSError):  # it is not there, or somebody keeps something else in it
        paths[0].parent.rmdir()


def _made_of(paths: list[Path]) -> str:
    return f"{keyed_seed([path.stem for path in paths]):016x}"


def _read_part(path: Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(path) as part:
            return [part[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); delete it and give the same command again") from None


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
