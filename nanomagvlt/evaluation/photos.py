"""Appendix - What protocols.py measures on: photographs with people's captions, by id and by domain.

Training leaves out what it cannot use, and counts it; readers.py does that. A measurement leaves nothing out: a
photograph that is not there, or broken, would make another measurement of it. So everything here is an error.

Shapes: B photographs, S image side.
"""
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanomagvlt.rng import keyed_generator
from nanomagvlt.data.sources import BadSample, open_image, square


@dataclass(frozen=True)
class Photo:
    id: int | str
    file: Path
    captions: list[str]
    domain: str              # NoCaps' own; else ""


@dataclass(frozen=True)
class Item:
    photo: Photo
    caption: str


def read_photos(path: Path, folder: Path, split: str | None = None) -> tuple[list[Photo], str]:
    """The photographs of a caption file, COCO's, NoCaps' or Karpathy's, and the split: "" where the file has none.

    Of Karpathy's splits None is "test". Raises ValueError, one line, where the file is no such file, where ids do not
    match, or a photograph is not in its folder.
    """
    try:
        content = json.loads(path.read_bytes())
        has_splits = "annotations" not in content
        if not has_splits:
            rows = [(row["id"], Path(row["file_name"]), row.get("domain", "")) for row in content["images"]]
            captions = [(row["image_id"], row["caption"]) for row in content["annotations"]]
        else:
            images = [row for row in content["images"] if row["split"] == (split or "test")]
            rows = [(row["cocoid"], Path(row.get("filepath", ""), row["filename"]), "") for row in images]
            captions = [(row["cocoid"], sentence["raw"]) for row in images for sentence in row["sentences"]]
        of_photo = {id: [] for id, _, _ in rows}
        for id, caption in captions:
            of_photo.setdefault(id, []).append(" ".join(caption.split()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: neither COCO's captions (images, annotations with captions) nor Karpathy's (images "
                         "with sentences)") from None
    if split and not has_splits:
        raise ValueError(f"--split {split}: {path} has no splits, as Karpathy's file has them")
    if not rows:
        raise ValueError(f"{path}: has no images" + (f" of split {split or 'test'!r}" if has_splits else ""))
    if unknown := list(of_photo)[len({id for id, _, _ in rows}):]:
        raise ValueError(f"{path}: has captions of image {unknown[0]!r}, but no such image")
    if len(of_photo) < len(rows):
        raise ValueError(f"{path}: has two images {Counter(id for id, _, _ in rows).most_common(1)[0][0]!r}")
    for id, file, _ in rows:
        if not any(of_photo[id]):
            raise ValueError(f"{path}: image {id!r} has no caption")
        if file.is_absolute() or ".." in file.parts or not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, image {id!r} of {path}")
    photos = [Photo(id, folder / file, list(filter(None, of_photo[id])), domain) for id, file, domain in rows]
    return photos, (split or "test") if has_splits else ""


def choose_items(photos: list[Photo], num: int | None, all_captions: bool) -> tuple[list[Item], int]:
    """num items, or all (None), of all captions or of each photograph's first; and of how many they were chosen.

    They are always the same, whatever the seed, and fewer are the first of more. Raises ValueError where there are too
    few.
    """
    items = [Item(photo, text) for photo in photos for text in (photo.captions if all_captions else photo.captions[:1])]
    num = num or len(items)
    if num > len(items):
        raise ValueError(f"{num:,} items are wanted, but there are {len(items):,}: give --num {len(items)} or less")
    order = torch.randperm(len(items), generator=keyed_generator("which items"))
    return [items[i] for i in order[:num].tolist()], len(items)


def digest(photos: list[Photo]) -> str:
    """A short name for these files: a hash of their names and sizes, wherever their folder is."""
    files = [(photo.file.name, photo.file.stat().st_size) for photo in photos]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def read_squares(photos: list[Photo], side: int) -> np.ndarray:
    """Shorter side to S, centre crop: uint8 (B, S, S, 3). Raises ValueError: a protocol leaves nothing out."""
    squares = []
    for photo in photos:
        try:
            squares.append(square(open_image(photo.file.read_bytes()), side))
        except BadSample as reason:
            raise ValueError(f"{photo.file}: {reason}") from None
    return np.stack(squares)
