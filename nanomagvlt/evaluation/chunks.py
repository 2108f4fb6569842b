"""Appendix - Work of hours that can be killed, resumed and shared: a numbered list of items, done chunk by chunk.

A chunk is a file of what was made of CHUNK items, whole or absent. Processes that share the work take every N-th chunk
and never speak to each other; a chunk that is there is never made again. If all chance of an item follows from its
number, who made it, when, and in whose company does not matter, and the files are the same to the byte.

protocols.py works so.
"""
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import nanomagvlt
from nanomagvlt.io import first_line, whole, write_json

CHUNK = 64  # items in a file


@dataclass(frozen=True)
class Chunks:
    """`count` items, and the files of what is made of them: FOLDER/KIND-00000.pt and so on."""
    folder: Path
    kind: str
    count: int

    def paths(self) -> list[Path]:
        return [self.folder / f"{self.kind}-{i:05d}.pt" for i in range(-(-self.count // CHUNK))]

    def work(self, make: Callable[[range, Callable[[int], None]], dict], part: tuple[int, int] | None) -> None:
        """Makes the chunks that are missing, of the K-th of N shares or of all.

        make(numbers, progress) -> columns, a row for each of the items; progress is told how many more are made.
        """
        rank, world = part or (0, 1)
        numbers = {path: range(i * CHUNK, min((i + 1) * CHUNK, self.count)) for i, path in enumerate(self.paths())}
        missing = [path for path in self.paths()[rank::world] if not path.exists()]
        with tqdm(total=sum(len(numbers[path]) for path in missing), unit="image", desc=self.kind) as bar:
            for path in missing:
                write(path, {"code": code_version(), **make(numbers[path], bar.update)})

    def column(self, name: str) -> list:
        """The rows under a name, of all items. Every chunk must be there."""
        return [row for path in self.paths() for row in read(path)[name]]

    def code(self) -> list[str]:
        """By which versions of the code they were made: more than one, if it changed on the way."""
        return list(dict.fromkeys(read(path)["code"] for path in self.paths()))


def claim(folder: Path, settings: dict) -> None:
    """Begins a folder, or goes on in it: all that the result depends on goes into its settings.json.

    Raises ValueError, one line, where it was begun with other settings, or holds something else.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps({**settings, "chunk": CHUNK}))
    if path.is_file():
        old = json.loads(path.read_text())
        for name, value in settings.items():
            if old.get(name) != value:
                raise ValueError(f"{folder} was begun with {name} {old.get(name)}, not {value}: give the same, or "
                                 "another --out")
    elif folder.exists() and (not folder.is_dir() or any(not file.name.startswith(path.name)  # of one who begins now
                                                         for file in folder.iterdir())):
        raise ValueError(f"{folder} is there and holds something else: name another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def write(path: Path, content: dict) -> None:
    """A file of tensors and strings, whole or absent; the same bytes for the same content."""
    with whole(path) as file:
        torch.save(content, file)


def read(path: Path) -> dict:
    """What write() has written; a tensor is read when it is used. Raises ValueError, one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways inside the unpickler
        raise ValueError(f"{path}: damaged ({first_line(error)}); delete it and give the same command again") from None


@cache
def code_version() -> str:
    """git describe where this is a checkout, else the package's version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        try:
            found = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True)
        except OSError:  # a checkout on a machine without git
            return nanomagvlt.__version__
        if found.returncode == 0:
            return found.stdout.decode().strip()
    return nanomagvlt.__version__
