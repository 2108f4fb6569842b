"""Appendix - Files that are whole or absent, whatever happens while they are written.

A file is written under another name beside its place, brought to the disk, and then renamed: a kill, a full disk or a
second writer leaves what stood at the place, or nothing.
"""
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator:
    """`with whole(path) as file:` a binary file to write, which gets its name when the block ends well."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name is on the disk when the folder is
    with contextlib.suppress(OSError):          # which some network file systems do not know how to do
        os.fsync(folder)
    os.close(folder)


def write_json(path: Path, value) -> None:
    """Writes it, indented."""
    with whole(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def first_line(error: Exception) -> str:
    """What an error of a library says, in at most 100 characters: some say nothing, some say pages."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
