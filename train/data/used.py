"""Which rows a checkpoint was made from, as eight bytes each, so that other rows can be told to be held out or not."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import Row, films, pictures, turns_of

RECORD = "rows_used"  # in a profile's, a plan's, a run's and a checkpoint's record
KINDS = {"profiled": "profiled", "trained": "trained on", "calibrated": "calibrated with"}
SIZE = 8
MOST = 250_000  # rows of a kind in a record; of more nothing is known

Fingerprints = NDArray[np.uint64]


def fingerprint_of(row: Mapping[str, Any], where: str) -> bytes:
    """A hash of what a row asks: its pictures' pixels, its videos, and the words of its prompt.

    The completion is no part of it: rows to evaluate on may have an `answer` instead.

    Raises:
        InputError: the row cannot be read; the message names it.
    """
    digest = hashlib.blake2b(digest_size=SIZE)
    for medium in (*pictures(row, where), *films(row, where)):
        pixels = np.ascontiguousarray(medium)
        digest.update(f"{pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes())
    for turn in turns_of(row, "prompt", "user", where):
        content = turn["content"]
        words = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        digest.update(f"\0{turn['role']}: {words}".encode())
    return digest.digest()


class Noted:
    """Fingerprints of the rows that pass by.

    Args:
        file: gets them too, one after the other, if it is there: a run may be stopped and go on.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self._seen = file, set[bytes]()

    def noting(self, check: Callable[[Row], Row]) -> Callable[[Row], Row]:
        """A check of rows that also notes each that passes it."""

        def checked(row: Row) -> Row:
            row = check(row)
            self.note(fingerprint_of(row, row.where))
            return row

        return checked

    def note(self, fingerprint: bytes) -> None:
        """Note a row."""
        if fingerprint in self._seen:
            return
        self._seen.add(fingerprint)
        if self.file is not None and self.file.is_file():
            with self.file.open("ab") as file:
                file.write(fingerprint)

    def packed(self) -> str | None:
        """All of them as text; None where they are too many."""
        return pack(b"".join(self._seen))


def pack(fingerprints: bytes) -> str | None:
    """Fingerprints as text for a JSON file, each once; None where they are too many."""
    whole = np.unique(_numbers(fingerprints))
    return None if len(whole) > MOST else base64.b64encode(whole.tobytes()).decode("ascii")


def fingerprints(rows: Iterable[Row]) -> str | None:
    """All fingerprints of some rows, packed."""
    return pack(b"".join(fingerprint_of(row, row.where) for row in rows))


def also_used(record: Mapping[str, Any], kind: str, packed: str | None) -> dict[str, str | None]:
    """The rows that a record says were used, and more of one kind; None where they are not known."""
    used = dict(record.get(RECORD) or {"trained": None})
    before = used.get(kind, "")
    known = None if before is None or packed is None else base64.b64decode(before) + base64.b64decode(packed)
    return {**used, kind: None if known is None else pack(known)}


def _numbers(fingerprints: bytes) -> Fingerprints:
    return np.frombuffer(fingerprints[: len(fingerprints) // SIZE * SIZE], dtype="<u8")


@dataclass(frozen=True)
class HeldOut:
    """What is known of some rows.

    Attributes:
        rows: how many they are.
        used: how many of them a checkpoint was made from, by `KINDS`; None where it has no record of them. Kinds that
            its making did not have are absent.
    """

    rows: int
    used: dict[str, int | None]

    @property
    def known(self) -> bool:
        """Whether none of them was used, for certain."""
        return bool(self.used) and all(count == 0 for count in self.used.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for an artefact."""
        return asdict(self)

    def sentence(self) -> str:
        """What is known, for people.

        Example:
            >>> HeldOut(300, {"trained": 0}).sentence()
            'held out: none of 300 rows was trained on'
            >>> HeldOut(300, {"trained": 12, "calibrated": 0}).sentence()
            'not held out: 12 of 300 rows were trained on'
        """
        counts = {KINDS.get(kind, kind): count for kind, count in self.used.items()}
        if met := [f"{count} of {self.rows} rows were {what}" for what, count in counts.items() if count]:
            return f"not held out: {', '.join(met)}"
        if self.known:
            return f"held out: none of {self.rows} rows was {' or '.join(counts)}"
        unknown = [what for what, count in counts.items() if count is None] or ["trained on"]
        return f"not known whether held out: there is no record of the rows that were {' or '.join(unknown)}"


def held_out(record: Mapping[str, Any], rows: Iterable[Row]) -> tuple[HeldOut, list[bool]]:
    """Compare rows with those that something was made from.

    Args:
        record: of a profile, plan, run or checkpoint.
        rows: which know their number.

    Returns:
        What is known, and for each row whether it is known to have been used.

    Raises:
        InputError: a row cannot be read; the message names it.
    """
    ours = _numbers(b"".join(fingerprint_of(row, row.where) for row in rows))
    used: dict[str, int | None] = {}
    known = np.zeros(len(ours), dtype=bool)
    recorded = record.get(RECORD)
    for kind, packed in recorded.items() if isinstance(recorded, Mapping) else ():
        try:
            here = np.isin(ours, _numbers(base64.b64decode(packed)))
        except (TypeError, ValueError):  # too many to be recorded, or damaged
            used[kind] = None
        else:
            used[kind], known = int(here.sum()), known | here
    return HeldOut(len(ours), used), known.tolist()
