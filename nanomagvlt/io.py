"""Files: written whole or not at all, and read without running anything in them.

A file is written under a temporary name in the same folder, flushed to the disk, and then renamed. So after a kill or a
full disk the old file is there, and never half of a new one. A file of tensors is a pickle, and a pickle can run any
code: so tensors are read by PyTorch's restricted unpickler only, and only here. Read on in tokenizers/vqgan.py.
"""
import contextlib
import fcntl
import glob
import io
import json
import os
import pickletools
import platform
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


@contextlib.contextmanager
def whole(path: Path) -> Iterator:
    """`with whole(path) as file:` gives a binary file to write; it gets its name when the block ends without error.

    Raises OSError with the file's name, even if a library raises another error (torch.save() on a full disk).
    """
    ours = f"{path.name}.{platform.node()}-"
    for unfinished in path.parent.glob(f"{glob.escape(ours)}*.tmp"):
        try:
            os.kill(int(unfinished.name.removeprefix(ours).removesuffix(".tmp")), 0)
        except ProcessLookupError:  # the process that wrote it was killed
            unfinished.unlink(missing_ok=True)
        except (PermissionError, OverflowError, ValueError):  # another user's process, or not a file of ours
            pass
    temporary = path.with_name(f"{ours}{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # after the OSError of a full disk torch.save() raises a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        is_ours = isinstance(cause, OSError) and cause.filename in (None, str(temporary))
        raise OSError(cause.errno, cause.strerror, str(path)) if is_ours else error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename is on the disk when the folder is
    with contextlib.suppress(OSError):          # some network file systems cannot flush a folder
        os.fsync(folder)
    os.close(folder)


def lock(path: Path):
    """Locks a file until it is closed, by all processes that inherit it. Raises ValueError if another one holds it."""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{path.parent} is in use by {file.read()}: wait until it ends, or stop it") from None
    except OSError as error:
        print(f"{path}: {error.strerror}: nothing prevents a second process in this folder")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def write_json(path: Path, value) -> None:
    """Writes an indented JSON file, whole or not at all."""
    with whole(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_image(path: Path, frames: list[Image.Image]) -> None:
    """Writes a PNG, or a GIF if the suffix says so, whole or not at all. Several frames are an animation."""
    kind, file_in_memory = "GIF" if path.suffix == ".gif" else "PNG", io.BytesIO()  # Pillow hides a full disk's error
    frames[0].save(file_in_memory, kind, save_all=len(frames) > 1, append_images=frames[1:], duration=400, loop=0)
    with whole(path) as file:
        file.write(file_in_memory.getvalue())


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes arrays under names (.npz), whole or not at all; the same content gives the same bytes."""
    with whole(path) as file:
        np.savez(file, **arrays)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays that write_arrays() wrote under these names. Raises ValueError, one line, for a damaged file."""
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"{path}: damaged; delete it and give the same command again") from None


class Inert:
    """Takes the place of an object of a class that is not loaded. It keeps the object's state and runs nothing."""
    state: object = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state: object):
        self.state = state


def read_tensors(path: str | Path, what: str, mmap: bool = True, inert: tuple[str, ...] = ()) -> object:
    """The content of a file of torch.save() or torch.jit.save(), on the CPU. Nothing in it is run.

    `what` names the expected content in the message. With mmap a tensor is read from the disk when it is used.
    Objects of classes whose names start with one of `inert` are loaded as Inert objects.
    Raises ValueError, one line, for a file that is absent, damaged, or holds an object of a class that is not allowed.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        content = path
        if is_zip := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > 2 * Path(path).stat().st_size:
                raise ValueError  # a small file that unpacks to a huge one
            # torch.load() refuses constants.pkl: it means TorchScript. Tensors do not need it: it is renamed.
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                content = io.BytesIO(Path(path).read_bytes().replace(b"/constants.pkl", b"/constants.not"))
        # The unpickler can fill an OrderedDict, but no other subclass of dict, such as Lightning's AttributeDict.
        stand_ins = [(OrderedDict if name.endswith("AttributeDict") else Inert, name)
                     for name in (named_classes(path) if inert else ()) if name.startswith(inert)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(content, map_location="cpu", weights_only=True, mmap=mmap and is_zip and content is path)
    except Exception as error:  # the unpickler fails in a dozen ways on a damaged or foreign file
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refused, it names the class {refused[1]!r}" if refused else f"not {what}, or damaged"
        raise ValueError(f"{path}: {reason}") from None


def named_classes(path: str | Path) -> set[str]:
    """The names of all classes in a file of torch.save(). Its pickles are scanned, not loaded."""
    names = set()
    with open(path, "rb") as file, contextlib.suppress(ValueError):  # a damaged pickle; torch.load() reports it
        pickles = [file] * 4                                         # the old format: four pickles in a row
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
        for pickled in pickles:
            names |= {name.replace(" ", ".") for code, name, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    return names


def load_strict(module: nn.Module, state: object, path: str | Path) -> nn.Module:
    """The module in evaluation mode, with the tensors of `state` as its weights (floating-point ones as float32).

    Build the module under torch.device("meta"): then its own weights take neither time nor memory.
    Raises ValueError, one line with the file's name, unless names and shapes are exactly those of the module.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor) and
                                              tensor.layout == torch.strided for name, tensor in state.items()):
        raise ValueError(f"{path}: its {type(module).__name__} is not a dictionary of named tensors")
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{path}: the tensor {name!r} is missing")
        if name not in expected:
            raise ValueError(f"{path}: has a tensor {name!r}, unknown to {type(module).__name__}")
        if state[name].shape != expected[name].shape:
            raise ValueError(f"{path}: {name!r} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}")
        if state[name].is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{path}: {name!r} has numbers of type {state[name].dtype}")
    module.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                            for name, tensor in state.items()}, assign=True)
    return module.eval()


@contextlib.contextmanager
def one_line_error(path: str | Path, problem: str) -> Iterator[None]:
    """Turns an error about the content of a file into a ValueError: one line with the file's name and the problem."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path}: {problem}: {reason}") from None


def first_line(error: Exception) -> str:
    """The first line of a library's error message, at most 100 characters; the error's class where it is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
