"""JSON as its standard has it, from regular files only.

Python's own reader takes NaN, rounds 1e999 to infinity, and lets the last of two equal keys count without a word.
"""

import json
import stat
from math import isfinite
from pathlib import Path
from typing import Any

from .errors import CheckpointError

_MOST = 2**28  # bytes; the largest vocabularies take a tenth of it


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        CheckpointError: no such file, too large, not JSON, with a number that is not finite, or with a key twice.
    """
    if regular_size(path) > _MOST:
        raise CheckpointError(f"{path} is not readable JSON: it is larger than {_MOST >> 20} MiB.")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # UnicodeDecodeError and huge numbers are ValueErrors
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def parse_json(text: str) -> Any:
    """The value that a text is.

    Raises:
        ValueError: it is none, a number is not finite, or a key stands twice.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def regular_size(path: Path) -> int:
    """How many bytes a file has; what is none is not opened: reading a pipe or a device may never end.

    Raises:
        CheckpointError: it does not exist, or is a folder, a pipe or a device.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CheckpointError(f"{path} does not exist.") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is a folder, a pipe or a device, expected a file.")
    return found.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value
