"""The errors skipit raises on purpose: what was wrong, what was found, what to do."""

import re
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
