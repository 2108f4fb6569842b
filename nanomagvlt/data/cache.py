"""Chapter 12 - From pairs to the token cache, and from the cache to batches.

Training reads one format, the token cache: image tokens and captions, both memory-mapped. Images are tokenised once,
by the VQ-GAN. Captions are stored as text and tokenised in each batch, because BPE dropout differs each time.

A large cache is made in parts: make_parts() turns each piece of a source into a file, unless the file exists, and
join_parts() joins these files into one cache.

All random choices depend on (seed, update, purpose), never on history: a run that resumes needs no saved state.
Shapes: B batch, S image side in pixels, N image tokens, T text positions. Read on in train.py.
"""
import contextlib
import json
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanomagvlt.tokenizers.bpe import BPE, clean_caption
from nanomagvlt.rng import keyed_generator, keyed_seed
from nanomagvlt.io import read_arrays, whole, write_arrays, write_json
from nanomagvlt.data.sources import Counts, Pair, Piece, as_pairs, check_bad_share, count, usable

CACHE_FILES = ("tokens.bin", "captions.bin", "caption_ends.bin", "meta.json")
CACHE_SETTINGS = ("vqgan", "clean_captions", "fit", "made_of")  # in meta.json: hashes of the VQ-GAN and of the source


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]: (x - 0.5) / 0.5 for x in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, S, S), about [-1, 1] -> uint8 (B, S, S, 3)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- the token cache

class TokenCache:
    """A folder with one row per pair. Raises ValueError for a folder that is not a whole token cache.

    A row of tokens.bin has N tokens of the image, then N/2 of the image squeezed tall, then N/2 of it squeezed wide.
    """

    def __init__(self, folder: Path):
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            pairs, num_tokens, *_ = map(self.meta.__getitem__, ("pairs", "image_tokens", *CACHE_SETTINGS))
            self.tokens = np.memmap(folder / "tokens.bin", np.uint16, "r", shape=(pairs, 2 * num_tokens))
            self.ends = np.memmap(folder / "caption_ends.bin", np.int64, "r", shape=(pairs,))
            self.text = np.memmap(folder / "captions.bin", np.uint8, "r", shape=(int(self.ends[-1]),))
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing = f"its meta.json lacks {error}, it is of another version" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder}: no whole token cache ({missing}); make it with data/prepare.py") from None

    def __len__(self) -> int:
        return self.meta["pairs"]

    def tokens_of(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens of rows (B,), long: of the images (B, N), of the tall ones (B, N/2), of the wide ones (B, N/2)."""
        n = self.meta["image_tokens"]
        return torch.from_numpy(self.tokens[rows].astype(np.int64)).split((n, n // 2, n // 2), dim=1)

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of rows (B,)."""
        starts = (self.ends[i - 1] if i else 0 for i in rows)
        return [self.text[start:self.ends[i]].tobytes().decode() for i, start in zip(rows, starts)]


class Rows(NamedTuple):
    """Rows of a cache in memory."""
    tokens: np.ndarray  # uint16 (B, 2N)
    text: np.ndarray    # uint8: the captions in UTF-8, joined
    sizes: np.ndarray   # int64 (B,): the bytes of each caption


@torch.inference_mode()
def encode_images(images: list[np.ndarray], vqgan) -> torch.Tensor:
    """The tokens (B, N) of B images. An array that occurs several times is encoded once."""
    once = {id(image): image for image in images}  # the captions and crops of a sample share arrays
    pixels = to_pixels(np.stack(list(once.values()))).to(vqgan.quantize.embedding.weight.device)
    index = list(once).index
    return vqgan.encode(pixels)[[index(id(image)) for image in images]].cpu()


def tokenise(pairs: Iterable[Pair], vqgan, clean: bool) -> Iterator[Rows]:
    """The rows of pairs, at most 64 at a time. With `clean`, captions pass through clean_caption()."""
    pairs = iter(pairs)
    while batch := list(islice(pairs, 64)):
        _, squares, tall, wide, captions = zip(*batch)
        tokens = torch.cat([encode_images(images, vqgan) for images in (squares, tall, wide)], dim=1)    # (B, 2N)
        captions = [clean_caption(caption) if clean else caption for caption in captions]
        captions = [caption.encode("utf-8", errors="replace") for caption in captions]  # a lone surrogate has no UTF-8
        yield Rows(tokens.numpy().astype(np.uint16), np.frombuffer(b"".join(captions), np.uint8),
                   np.array([len(caption) for caption in captions], dtype=np.int64))


def write_cache(folder: Path, pairs: Iterable[Pair], vqgan, meta: dict) -> TokenCache:
    """Makes a TokenCache of pairs, whole or absent. `meta` has CACHE_SETTINGS, and more."""
    return _write_rows(folder, tokenise(pairs, vqgan, meta["clean_captions"]), meta)


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if a cache in this folder would replace anything that is not a token cache."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name] * folder.exists()
    if not all(name.startswith(CACHE_FILES) for name in names):
        raise ValueError(f"{folder} holds something else than a token cache: name another folder (nothing was changed)")


def _write_rows(folder: Path, many_rows: Iterable[Rows], meta: dict) -> TokenCache:
    check_replaceable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_pairs = end = num_tokens = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(whole(folder / name)) for name in CACHE_FILES[:3]]
        for rows in many_rows:
            num_pairs, num_tokens = num_pairs + len(rows.tokens), rows.tokens.shape[1] // 2
            for file, values in zip(files, (rows.tokens, rows.text, end + np.cumsum(rows.sizes))):
                file.write(values.tobytes())
            end += int(rows.sizes.sum())
        (folder / "meta.json").unlink(missing_ok=True)  # without it there is no cache, until the new one is whole
    write_json(folder / "meta.json", {"pairs": num_pairs, "image_tokens": num_tokens, **meta})
    return TokenCache(folder)


# ---------------------------------------------------------------------------------------------- a cache in parts

def part_paths(folder: Path, pieces: list[Piece], settings: dict) -> list[Path]:
    """The file of each part, in FOLDER.parts. Its name is a hash of the settings and of the piece, with the times of
    change of its files: so a part that exists is the right one."""
    parts = folder.with_name(folder.name + ".parts")
    return [parts / f"{keyed_seed(piece.identity, sorted(settings.items())):016x}.npz" for piece in pieces]


def make_parts(paths: list[Path], pieces: list[Piece], vqgan, settings: dict, share: tuple[int, int]) -> None:
    """Makes the parts that do not exist, of share (k, n): every n-th part from the k-th on."""
    mine = list(zip(paths, pieces))[share[0]::share[1]]
    missing = [(path, piece) for path, piece in mine if not path.exists()]
    with tqdm(unit="pair", desc=f"{len(missing)} of {len(mine)} parts") as bar:
        for done, (path, piece) in enumerate(missing, 1):
            write_part(path, piece, vqgan, settings, bar)
            bar.total = round(bar.n / done * len(missing))  # an estimate, for the time that is left


def write_part(path: Path, piece: Piece, vqgan, settings: dict, bar: tqdm) -> None:
    """Tokenises a piece into a file, whole or absent; settings has crops, seed, fit and clean_captions."""
    counts, no_tokens = {}, np.empty((0, 2 * vqgan.cfg.image_tokens), np.uint16)
    many_rows = [Rows(no_tokens, np.empty(0, np.uint8), np.empty(0, np.int64))]  # for a piece without a good sample
    pairs = (pair for sample in usable(piece, counts)
             for pair in as_pairs(*sample, vqgan.cfg.image_size, settings["crops"], settings["seed"],
                                  settings["fit"]))
    for rows in tokenise(pairs, vqgan, settings["clean_captions"]):
        many_rows.append(rows)
        bar.update(len(rows.tokens))
    rows = Rows(*map(np.concatenate, zip(*many_rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, counts=np.array(json.dumps(counts)), **rows._asdict())


def join_parts(folder: Path, source: str, paths: list[Path], settings: dict) -> TokenCache:
    """Makes the cache of a source from all its parts; meta["counts"] has the number of samples, good and by reason.
    Raises ValueError if more than 5% are bad."""
    counts: Counts = {}
    for path in paths:
        for reason, (number, first) in json.loads(str(read_arrays(path, "counts")[0])).items():
            count(counts, reason, first, number)
    check_bad_share(source, counts)
    many_rows = (Rows(*read_arrays(path, *Rows._fields)) for path in paths)
    return _write_rows(folder, many_rows, {"source": source, **settings, "counts": counts, "made_of": _made_of(paths)})


def is_made(folder: Path, paths: list[Path]) -> bool:
    """Whether the cache exists and was joined from exactly these parts."""
    with contextlib.suppress(ValueError):
        return TokenCache(folder).meta.get("made_of") == _made_of(paths)
    return False


def remove_parts(paths: list[Path]) -> None:
    """Deletes the folder of these parts, with parts of other settings and half-written ones in it."""
    for path in paths[0].parent.glob("*.npz*"):
        path.unlink()
    with contextlib.suppress(OSError):  # it is absent, or holds other files
        paths[0].parent.rmdir()


def _made_of(paths: list[Path]) -> str:
    return f"{keyed_seed([path.stem for path in paths]):016x}"


# ---------------------------------------------------------------------------------------------- batches

@lru_cache(maxsize=2)
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(num_items, generator=keyed_generator(seed, "epoch", epoch)).numpy()


def rows_of_step(step: int, batch_size: int, num_items: int, seed: int) -> np.ndarray:
    """The rows (B,) of an update's batch. Every row comes once per epoch, and each epoch has its own order."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    epoch, offset = position // num_items, position % num_items       # (B,), (B,)
    rows = np.empty_like(position)
    for e in np.unique(epoch):
        rows[epoch == e] = _permutation(num_items, seed, int(e))[offset[epoch == e]]
    return rows


def encode_captions(bpe: BPE, captions: list[str], text_length: int, dropout: float = 0.0,
                    keys: Iterable[tuple] = repeat(())) -> tuple[torch.Tensor, torch.Tensor]:
    """text_tokens (B, T) and text_lengths (B,), long. BPE dropout depends on the caption's key, one of keys (B)."""
    rngs = (random.Random(keyed_seed(*key)) if dropout else None for key in keys)
    encoded = [bpe.pad(bpe.encode(caption, dropout, rng), text_length) for caption, rng in zip(captions, rngs)]
    return torch.tensor([ids for ids, _ in encoded]), torch.tensor([length for _, length in encoded])


def make_batch(cache: TokenCache, bpe: BPE, rows: np.ndarray, cfg, dropout: float = 0.0,
               key: tuple = ()) -> dict[str, torch.Tensor]:
    """A batch of rows (B,): image_tokens (B, N), tall_tokens and wide_tokens (B, N/2), text_tokens (B, T) and
    text_lengths (B,). T is the longest caption of the batch, rounded up to a multiple of cfg.text_bucket. BPE dropout
    depends on key and row."""
    image_tokens, tall_tokens, wide_tokens = cache.tokens_of(rows)
    keys = ((*key, int(row)) for row in rows)
    text_tokens, text_lengths = encode_captions(bpe, cache.captions(rows), cfg.text_length, dropout, keys)
    length = -(-int(text_lengths.max()) // cfg.text_bucket) * cfg.text_bucket
    return {"image_tokens": image_tokens, "tall_tokens": tall_tokens, "wide_tokens": wide_tokens,
            "text_tokens": text_tokens[:, :length], "text_lengths": text_lengths}
