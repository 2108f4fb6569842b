"""Chapter 12 - From pairs to the token cache, and from the cache to batches.

Training reads one format, the token cache: image tokens and captions, both memory-mapped. Images are tokenised once,
by the VQ-GAN. Captions are stored as text and tokenised in each batch, because BPE dropout differs each time. Each view
of an image has a fixed partner, and their joined pictures are tokenised, too, for MixSel (see group_rows()).

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
from nanomagvlt.data.sources import Counts, Example, Piece, as_example, check_bad_share, count, usable

CACHE_FILES = ("tokens.bin", "captions.bin", "caption_ends.bin", "partners.bin", "views.bin", "meta.json")
CACHE_SETTINGS = ("vqgan", "clean_captions", "fit", "made_of")  # in meta.json: hashes of the VQ-GAN and of the source
GROUP = 64  # examples among which partners are found; even, so that none of a whole group is its own


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]: (x - 0.5) / 0.5 for x in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """float (B, 3, S, S), about [-1, 1] -> uint8 (B, S, S, 3)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- the token cache

class TokenCache:
    """A folder with one row per pair of a view and a caption. Raises ValueError for a folder that is not a whole cache.

    A row of tokens.bin has N tokens of the view, then N of a picture that joins the image with its partner's: side by
    side in the row of the one that stands first, LEFT and TOP; one above the other in the row of the second.
    """

    def __init__(self, folder: Path):
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            pairs, num_tokens, *_ = map(self.meta.__getitem__, ("pairs", "image_tokens", *CACHE_SETTINGS))
            self.tokens = np.memmap(folder / "tokens.bin", np.uint16, "r", shape=(pairs, 2 * num_tokens))
            self.ends = np.memmap(folder / "caption_ends.bin", np.int64, "r", shape=(pairs,))
            self.text = np.memmap(folder / "captions.bin", np.uint8, "r", shape=(int(self.ends[-1]),))
            self.partners = np.memmap(folder / "partners.bin", np.int32, "r", shape=(pairs,))  # rows from here to there
            self.views = np.memmap(folder / "views.bin", np.uint8, "r", shape=(pairs,))        # 0, 1, ... of an image
            self.num_views = int(self.views.max()) + 1
            self.by_view = self.views.argsort(kind="stable") if self.num_views > 1 else None            # all rows
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"its meta.json lacks {error}, it is of another version" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder}: no whole token cache ({reason}); make it again") from None

    def __len__(self) -> int:
        return self.meta["pairs"]

    def tokens_of(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of rows (B,): of the views (B, N) and of the joined pictures (B, N), long."""
        return torch.from_numpy(self.tokens[rows].astype(np.int64)).split(self.meta["image_tokens"], dim=1)

    def rows_of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The rows (B,) of an update's batch: each epoch has one view of each image, and the next epoch the next."""
        rows = rows_of_step(step, batch_size, len(self) // self.num_views, seed, self.num_views)
        return rows if self.by_view is None else self.by_view[rows]

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of rows (B,)."""
        starts = (self.ends[i - 1] if i else 0 for i in rows)
        return [self.text[start:self.ends[i]].tobytes().decode() for i, start in zip(rows, starts)]


class Rows(NamedTuple):
    """Rows of a cache in memory."""
    tokens: np.ndarray    # uint16 (B, 2N)
    text: np.ndarray      # uint8: the captions in UTF-8, joined
    sizes: np.ndarray     # int64 (B,): the bytes of each caption
    partners: np.ndarray  # int32 (B,)
    views: np.ndarray     # uint8 (B,)


@torch.inference_mode()
def encode_images(images: list[np.ndarray], vqgan) -> np.ndarray:
    """The tokens of M images, uint16 (M, N)."""
    device = vqgan.quantize.embedding.weight.device
    return np.concatenate([vqgan.encode(to_pixels(np.stack(images[i:i + GROUP])).to(device)).cpu().numpy()
                           for i in range(0, len(images), GROUP)]).astype(np.uint16)


def tokenise(examples: Iterable[Example], vqgan, clean: bool) -> Iterator[Rows]:
    """The rows of examples, a group at a time. With `clean`, captions pass through clean_caption()."""
    def cleaned(caption: str) -> str:
        text = clean_caption(caption)
        return text if clean and text.strip() else caption  # a caption of marks alone stays as it is

    examples = iter(examples)
    while group := list(islice(examples, GROUP)):
        yield group_rows([example._replace(captions=[*map(cleaned, example.captions)]) for example in group], vqgan)


def group_rows(group: list[Example], vqgan) -> Rows:
    """The rows of a group of n examples: of each example for each view, and of each view for each caption.

    The partner of view v of example i is view v of example (2 v + 1 - i) mod n: it is another one for each view, and i
    is the partner of its partner. (If n is odd, one is its own.) The k-th caption meets the k-th of the partner.
    """
    n, num_views = len(group), len(group[0].views)
    views = [(i, v, (2 * v + 1 - i) % n) for i in range(n) for v in range(num_views)]  # example, view, partner
    joined = [np.concatenate([group[i].tall, group[j].tall], axis=1) if i <= j else
              np.concatenate([group[j].wide, group[i].wide], axis=0) for i, _, j in views]
    tokens = np.concatenate([encode_images([group[i].views[v] for i, v, _ in views], vqgan),
                             encode_images(joined, vqgan)], axis=1)                                  # (n views, 2N)
    captions = [len(example.captions) for example in group]
    first = np.cumsum([0, *captions]) * num_views  # the first row of each example
    rows = [(m, i, v, j, k) for m, (i, v, j) in enumerate(views) for k in range(captions[i])]
    partners = [first[j] + v * captions[j] + k % captions[j] - row for row, (_, _, v, j, k) in enumerate(rows)]
    text = [group[i].captions[k].encode("utf-8", errors="replace") for _, i, _, _, k in rows]  # no lone surrogates
    return Rows(tokens[[m for m, *_ in rows]], np.frombuffer(b"".join(text), np.uint8), np.array([*map(len, text)]),
                np.array(partners, np.int32), np.array([v for _, _, v, _, _ in rows], np.uint8))


def write_cache(folder: Path, examples: Iterable[Example], vqgan, meta: dict) -> TokenCache:
    """Makes a TokenCache of examples, whole or absent. `meta` has CACHE_SETTINGS, and more."""
    return _write_rows(folder, tokenise(examples, vqgan, meta["clean_captions"]), meta)


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
        files = [stack.enter_context(whole(folder / name)) for name in CACHE_FILES[:-1]]
        for rows in many_rows:
            num_pairs, num_tokens = num_pairs + len(rows.tokens), rows.tokens.shape[1] // 2
            for file, values in zip(files, rows._replace(sizes=end + np.cumsum(rows.sizes))):
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
    counts, none = {}, np.empty(0, np.uint8)
    many_rows = [Rows(none.reshape(0, 2 * vqgan.cfg.image_tokens), *[none] * 4)]  # for a piece without a good sample
    examples = (as_example(*sample, vqgan.cfg.image_size, settings["fit"], settings["crops"], settings["seed"])
                for sample in usable(piece, counts))
    for rows in tokenise(examples, vqgan, settings["clean_captions"]):
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


def rows_of_step(step: int, batch_size: int, num_items: int, seed: int, num_views: int = 1) -> np.ndarray:
    """The rows (B,) of an update's batch. Every row comes once per epoch, and each epoch has its own order.

    With num_views there are so many rows of each item, view by view, and an epoch has one view of all: the next epoch
    has the next."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)  # (B,)
    epoch, offset = position // num_items, position % num_items       # (B,), (B,)
    rows = epoch % num_views * num_items                              # (B,)
    for e in np.unique(epoch):
        rows[epoch == e] += _permutation(num_items, seed, int(e))[offset[epoch == e]]
    return rows


def shorten(caption: str, text_length: int) -> str:
    """The part of a caption that can fit: a token has less than 50 characters. A caption may have millions."""
    return caption[:50 * text_length]


def encode_captions(bpe: BPE, captions: list[str], text_length: int, dropout: float = 0.0,
                    keys: Iterable[tuple] = repeat(())) -> tuple[torch.Tensor, torch.Tensor]:
    """text_tokens (B, T) and text_lengths (B,), long. BPE dropout depends on the caption's key, one of keys (B)."""
    rngs = (random.Random(keyed_seed(*key)) if dropout else None for key in keys)
    encoded = [bpe.pad(bpe.encode(shorten(caption, text_length), dropout, rng), text_length)
               for caption, rng in zip(captions, rngs)]
    return torch.tensor([ids for ids, _ in encoded]), torch.tensor([length for _, length in encoded])


def make_batch(cache: TokenCache, bpe: BPE, rows: np.ndarray, cfg, dropout: float = 0.0,
               key: tuple = ()) -> dict[str, torch.Tensor]:
    """A batch of rows (B,): image_tokens (B, N), text_tokens (B, T) and text_lengths (B,). T is the longest caption of
    the batch, rounded up to a multiple of cfg.text_bucket. Random choices depend on key and row.

    For MixSel also joined_image_tokens (B, N), one of the two pictures that join the image with its partner's, drawn at
    random; is_stacked (B,), whether it is top|bottom; is_first (B,), whether the own image is left or top; and the
    partner's caption, other_text_tokens (B, T) and other_text_lengths (B,)."""
    batch, captions_of = {"image_tokens": cache.tokens_of(rows)[0]}, {"text": rows}
    if cfg.mixsel != "off":
        partners = rows + cache.partners[rows]                                                       # (B,)
        is_own = [random.Random(keyed_seed(*key, "picture", int(row))).random() < 0.5 for row in rows]
        pictures = np.where(is_own, rows, partners)                                                  # (B,)
        batch |= {"joined_image_tokens": cache.tokens_of(pictures)[1], "is_first": torch.from_numpy(rows <= partners),
                  "is_stacked": torch.from_numpy(cache.partners[pictures] < 0)}
        captions_of["other_text"] = partners
    for name, of in captions_of.items():
        batch[f"{name}_tokens"], batch[f"{name}_lengths"] = encode_captions(
            bpe, cache.captions(of), cfg.text_length, dropout, ((*key, name, int(row)) for row in rows))
    longest = max(int(batch[f"{name}_lengths"].max()) for name in captions_of)
    length = -(-longest // cfg.text_bucket) * cfg.text_bucket
    return batch | {f"{name}_tokens": batch[f"{name}_tokens"][:, :length] for name in captions_of}
