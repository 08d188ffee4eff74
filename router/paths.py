"""What is said of a path where nothing is: what there is instead, before anything else is tried, such as the Hub."""

import difflib
from pathlib import Path

from .errors import CheckpointError
from .lock import beside


def missing(path: str | Path) -> str:
    """What is said of a path where nothing is, with what there is instead; of another nothing."""
    path = Path(path)
    try:
        if path.exists():
            return ""
        if (old := beside(path, "old")).exists():
            return f"no such file or folder. What was to replace it was killed; it is {old} now: `mv {old} {path}`."
    except (OSError, ValueError):  # a name that is too long, or holds a null
        pass
    return f"no such file or folder.{nearest(path)}"


def check_there(path: Path) -> None:
    """Refuse a path where nothing is.

    Raises:
        CheckpointError: names it, and the nearest name that there is.
    """
    if gone := missing(path):
        raise CheckpointError(f"{path}: {gone}")


def nearest(path: Path) -> str:
    """What there is instead of a path that there is not: a sentence, or nothing."""
    try:
        while not path.parent.exists() and path.parent != path:
            path = path.parent
        there = [other.name for other in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(path.name, there, 1)
    return f" Did you mean {path.parent / found[0]}?" if found else ""


def is_path(name: str) -> bool:
    """Whether a name can be that of a file or folder alone, and of nothing on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
