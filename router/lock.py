"""One process at a time per folder: a lock that the system lets go of when its holder ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # where there is none, a copy of this file still reads checkpoints
    fcntl = None  # type: ignore[assignment]

_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, a hidden file beside it; what runs inside the block may hold it again.

    Args:
        folder: whether or not it is there; its parent is.

    Yields:
        Whether it was taken here, and not further out.

    Raises:
        CheckpointError: another process, or another thread, holds it, or it cannot be made.
    """
    place = beside(folder, "lock")
    if place in _HELD.get():
        yield False
        return
    descriptor = _take(folder, place)
    token = _HELD.set(_HELD.get() | {place})
    try:
        yield True
    finally:
        _HELD.reset(token)
        place.unlink(missing_ok=True)
        os.close(descriptor)


def beside(folder: Path, what: str) -> Path:
    """A hidden place beside a folder, by which all names of the folder's parent find it."""
    path = Path(os.path.abspath(folder))
    return path.parent.resolve() / f".{path.name}.skipit-{what}"


def _take(folder: Path, place: Path) -> int:
    """An open lock file that this process alone holds."""
    while True:
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise CheckpointError(
                    f"{folder} is in use: another skipit is writing it. Wait until it is done, or write elsewhere."
                ) from error
            raise CheckpointError(f"{folder} cannot be written: {place} cannot be locked: {error}") from error
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its last holder removed it between the two calls
