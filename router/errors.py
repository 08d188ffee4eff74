"""The errors skipit raises on purpose: what was wrong, what was found, what to do."""

from typing import Any


class SkipItError(Exception):
    """Base class of every error that skipit raises on purpose."""


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


def short(value: Any) -> str:
    """A value as a message shows it: what it is and how it begins, not 20 kB of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or a list of itself
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else text[:77] + "..."
