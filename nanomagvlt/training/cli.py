"""Command lines: one flag for each field of Config, and errors of one line that offer the nearest name.

`width` is `--width`, `vq_steps` is `--vq-steps`. The comment behind a field of config.py is the flag's help.
"""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nanomagvlt.config import CHOICES, PRESETS, Config, preset


def explain(error: Exception) -> str:
    """One line for an error that the user can mend: of the input, the disk, the memory, the compiler. "" for others."""
    text = str(error)
    if isinstance(error, (ValueError, OSError)):
        return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return ("out of memory: smaller batches need less, see --micro-batch, --vq-batch, --num-samples "
                f"({text.rpartition('DefaultCPUAllocator: ')[2].split('. ')[0]})")
    if any(name in text for name in ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")):
        return "--compile true needs a C++ compiler, and on a GPU Triton: install it, or give --compile false"
    return ""


class Parser(argparse.ArgumentParser):
    """argparse, with an error message of one line, the nearest flag in it, and exit status 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        with contextlib.suppress(AttributeError):  # a notebook's output has no encoding
            sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that has not all characters
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in (text.split("=")[0] for text in (sys.argv[1:] if argv is None else argv)):
            if word.startswith("--") and word not in flags:
                close = difflib.get_close_matches(word, flags, 1)
                self.error(f"unknown argument {word}" + (f"; did you mean {close[0]}?" if close else "; see --help"))
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unknown argument {unknown[0]}; see --help")
        return args

    def run(self, command: Callable, args: argparse.Namespace) -> None:
        """command(args); an error of the user's input ends it with one line and status 2, Ctrl-C with 130."""
        try:
            command(args)
        except KeyboardInterrupt:
            self.exit(130, "stopped: finished work is kept; the same command goes on from there\n")
        except Exception as error:
            if not (line := explain(error)):
                raise
            self.error(line)


def check_out(path: Path, flag: str = "--out") -> None:
    """Raises ValueError if no file can be written there."""
    if not path.parent.is_dir() or path.is_dir():
        problem = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"{flag} {path}: {problem}")


def positive(text: str) -> int:
    """The type of a flag that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def add_config_flags(parser: Parser, names: list[str] | None = None) -> None:
    """Adds a flag for each of these fields of Config (default: all of them, and `--preset`)."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    if names is None:
        parser.add_argument("--preset", default="tiny", help=f"{', '.join(PRESETS)} (default tiny)")
    group = parser.add_argument_group("settings (P: the paper's, R: the authors' released code's)")
    for field in dataclasses.fields(Config):
        if field.name in names if names else field.name != "text_vocab":  # which follows from the merges
            group.add_argument("--" + field.name.replace("_", "-"), type=reader(field.type),
                               metavar="|".join(CHOICES.get(field.name, "X")), default=argparse.SUPPRESS,
                               help=comments[field.name].replace("%", "%%"))


def given_settings(args: argparse.Namespace, names: list[str]) -> dict:
    """Those of these fields of Config that were given as flags."""
    return {name: value for name, value in vars(args).items() if name in names}


def config_from_args(args: argparse.Namespace) -> Config:
    """The preset named in args with every field that was given. Raises ValueError for a bad value."""
    return preset(args.preset, **given_settings(args, [f.name for f in dataclasses.fields(Config)]))


def reader(kind: type):
    """The function that turns a flag's text into a value of a field's type."""
    def read_bool(text: str) -> bool:
        if text not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text == "true"

    def read_numbers(text: str) -> tuple:
        try:
            return tuple(kind.__args__[0](part) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from None

    def read_shares(text: str) -> dict[str, float]:
        try:
            return {name: float(number) for name, number in (part.split("=") for part in text.split(","))}
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as t2i=8,i2t=1,it2it=1") from None
    if kind is bool:
        return read_bool
    return read_shares if kind == dict[str, float] else read_numbers if hasattr(kind, "__args__") else kind
