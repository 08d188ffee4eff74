"""The errors skipit raises on purpose: what was wrong, what was found, what to do."""

import difflib
import re
from pathlib import Path
from typing import Any


class SkipItError(Exception):
    """Base class of every error that skipit raises on purpose; its message can be read, whatever it quotes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(readable(arg) if isinstance(arg, str) else arg for arg in args))


class DecoderNotFoundError(SkipItError):
    """The model has no list of decoder layers where one was looked for."""


class UnsupportedModelError(SkipItError):
    """The model has a part that gated execution cannot handle."""


class RouterConfigError(SkipItError):
    """A router configuration is malformed."""


class CheckpointError(SkipItError):
    """A file of a checkpoint or artefact is missing, damaged or made for another model."""


class InputError(SkipItError):
    """The inputs of a call do not fit the model or each other."""


def readable(message: str) -> str:
    """A message without the inside of words too long to read, such as data URLs; what others raise quotes these too.

    Example:
        >>> readable("cannot read data:" + 20_000 * "A")
        'cannot read data:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA...AAAAAAAAAAAAAAAAAAAA (20,005 characters)'
    """
    return re.sub(r"\S{250,}", lambda word: f"{word[0][:40]}...{word[0][-20:]} ({len(word[0]):,} characters)", message)


def short(value: Any) -> str:
    """A value as a message shows it: what it is and how it begins, not 20 kB of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or a list of itself
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else text[:77] + "..."


def missing(path: str | Path) -> str:
    """What is said of a path where nothing is, with the nearest name that there is; of another nothing."""
    return "" if _exists(path := Path(path)) else f"no such file or folder.{nearest(path)}"


def check_there(path: Path) -> None:
    """Refuse a path where nothing is.

    Raises:
        CheckpointError: names it, and the nearest name that there is.
    """
    if gone := missing(path):
        raise CheckpointError(f"{path}: {gone}")


def nearest(path: Path) -> str:
    """What there is instead of a path that there is not: a sentence, or nothing."""
    while not _exists(path.parent) and path.parent != path:
        path = path.parent
    try:
        there = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, there, 1)
    return f" Did you mean {path.parent / found[0]}?" if found else ""


def is_path(name: str) -> bool:
    """Whether a name can be that of a file or folder alone, and of nothing on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a null
        return False
