"""Rows in the conversational vision format: what is in one, where it comes from, and what becomes of broken ones."""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from skipit.router import InputError
from skipit.router.errors import short

from .pictures import find_file, read_picture

FORMAT = (
    "Rows need images or videos, prompt and completion, or images or videos and messages of which the assistant has "
    "the last (TRL's conversational vision format). For text alone images are an empty list; to be evaluated a row may "
    "have answer for completion."
)

DAMAGE = "(damage)"  # a row of this column alone stands for one that could not be read
# Names that data sets give our columns.
_USUAL = {
    "images": ("image", "photo", "picture", "img", "file_name", "image_path", "path", "pictures", "photos"),
    "prompt": ("question", "query", "instruction", "input", "text", "problem", "user"),
    "completion": ("answer", "response", "output", "reply", "caption", "label", "target", "solution", "assistant"),
    "messages": ("conversation", "conversations", "chat"),
    "answer": ("answers", "label", "target"),
}


class Row(dict[str, Any]):
    """A row that knows where it comes from, so that an error about it can say so.

    Args:
        values: by column; `DAMAGE` alone says why there is no row.
        where: its place in the data.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(answer_apart(values))
        self.where = where
        self.key: Callable[[], str] = partial(str, where)  # what tells it from others


def answer_apart(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose `messages` are a conversation, with the last answer as `completion` and the rest as `prompt`."""
    messages = row.get("messages")
    if "prompt" in row or "completion" in row or not isinstance(messages, list) or len(messages) < 2:
        return row
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return row
    return {**row, "prompt": messages[:-1], "completion": [last]}


def check_columns(row: Mapping[str, Any], where: str, *needed: str) -> None:
    """Refuse a row that lacks a column.

    Raises:
        InputError: it does; the message names the row and the columns it has.
    """
    if DAMAGE in row:
        raise InputError(f"{where} cannot be read: {row[DAMAGE]}")
    if missing := [name for name in needed if name not in row]:
        found = ", ".join(map(str, row))
        raise InputError(f"{where}: no column {', '.join(missing)}; found: {found}. {FORMAT}{_renaming(missing, row)}")


def _renaming(missing: list[str], row: Mapping[str, Any]) -> str:
    """Which columns are meant, as far as names tell."""
    free, pairs = [name for name in map(str, row) if name == "answer" or name not in _USUAL], []
    for ours in missing:
        usual = (name for name in free if name.lower() in _USUAL.get(ours, ()))
        theirs = next(usual, None) or next(iter(difflib.get_close_matches(ours, free, 1)), None)
        if theirs is not None:
            free.remove(theirs)
            pairs.append(f"{ours}={theirs}")
    return f" If they have other names: --columns {','.join(pairs)}" if pairs else ""


def seen_in(row: Mapping[str, Any]) -> str:
    """The column of what is looked at, which every row has."""
    return "videos" if "videos" in row and "images" not in row else "images"


def pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    """A row's pictures, opened; a column of one picture per row is as good as one of lists.

    Raises:
        InputError: one cannot be read; the message names the row.
    """
    return [_opened(image, f"{where}: image {number}") for number, image in enumerate(_listed(row.get("images")))]


def films(row: Mapping[str, Any], where: str) -> list[Any]:
    """A row's videos: one that is a list of pictures becomes an array of its frames.

    Raises:
        InputError: a frame cannot be read; the message names the row.
    """
    made = []
    for number, video in enumerate(_listed(row.get("videos"))):
        if isinstance(video, str | Path):
            video = str(_opened(video, f"{where}: video {number}", find_file))
        elif isinstance(video, list | tuple):
            frames = [np.asarray(_opened(frame, f"{where}: a frame of video {number}")) for frame in video]
            if len({frame.shape for frame in frames}) != 1:
                raise InputError(f"{where}: video {number} cannot be read: its frames are not of one size.")
            video = np.stack(frames)
        made.append(video)
    return made


def _listed(given: Any) -> Any:
    return [] if given is None else given if isinstance(given, list | tuple) else [given]


def _opened(given: Any, which: str, read: Callable[[Any], Any] = read_picture) -> Any:
    try:
        return read(given)
    except InputError as error:
        raise InputError(f"{which} cannot be read: {error}") from error


def turns_of(row: Mapping[str, Any], column: str, role: str, where: str) -> list[dict[str, Any]]:
    """Messages as chat templates want them: a data set fills keys a part lacks with None.

    Raises:
        InputError: they are neither a text nor messages; the message names the row.
    """
    messages = row[column]
    if isinstance(messages, str):
        return [{"role": role, "content": messages}]
    turns = []
    try:
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [{key: value for key, value in part.items() if value is not None} for part in content]
            turns.append({"role": message["role"], "content": content})
    except (TypeError, KeyError, AttributeError):
        turns = []
    if not turns:
        raise InputError(
            f"{where}: `{column}` is not a text or a list of messages with role and content: {short(messages)}"
        )
    return turns


Check = Callable[[Row], Row]


class Broken:
    """Rows that cannot be read: each is named once and counted, and those after too many stop the run.

    Args:
        limit: how many there may be.
        note: called with the reason for each.
    """

    def __init__(self, limit: int = 0, note: Callable[[str], None] | None = None) -> None:
        self.limit, self.note = limit, note
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """How many different rows there were."""
        return len(self._seen)

    def __call__(self, row: str, error: InputError) -> None:
        """Count a row.

        Args:
            row: what tells it from others, however often it is met.
            error: why it cannot be read.

        Raises:
            InputError: it is one too many.
        """
        if row in self._seen:
            return
        self._seen.add(row)
        if self.limit == 0:
            raise error
        if self.count > self.limit:
            raise InputError(f"more than {self.limit} rows cannot be read (`max_broken_rows`); the last: {error}")
        if self.note is not None:
            self.note(f"skipped: {error}")


class Rows(Dataset[dict[str, Any]]):
    """A data set whose rows know their number, and where the next good row stands in for a broken one.

    Args:
        rows: a `datasets.Dataset` or any sequence of mappings.
        check: gives a row that can be collated, or raises `InputError`; None takes them as they are.
        broken: counts those that cannot be read; without it the first is an error.
        name: of a row, before its number.
    """

    def __init__(self, rows: Any, check: Check | None = None, broken: Broken | None = None, name: str = "row") -> None:
        self.rows, self.check, self.broken, self.name = rows, check, broken or Broken(), name

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        if index >= len(self):
            raise IndexError(index)
        for number in (*range(index, len(self)), *range(index)):
            if (row := self.good(number)) is not None:
                return row
        raise InputError(f"no {self.name} of the data can be read.")

    def good(self, number: int) -> Row | None:
        """The row of this number, or None for a broken one, which is counted."""
        where = f"{self.name} {number}"
        try:
            row = Row(self._at(number, where), where)
            return row if self.check is None else self.check(row)
        except InputError as error:
            self.broken(where, error)
        return None

    def _at(self, number: int, where: str) -> Any:
        try:
            return self.rows[number]
        except Exception as error:  # reading a row decodes its images, which fails in many ways
            raise InputError(f"{where} cannot be read: {error}") from error


class RowStream(IterableDataset[dict[str, Any]]):
    """Rows that are read one by one and have no number of their own; broken ones are left out.

    Args:
        rows: a `datasets.IterableDataset` or any iterable of mappings that can be started again.
        check: gives a row that can be collated, or raises `InputError`.
        broken: counts those that cannot be read.
        name: of a row, before its number.
    """

    def __init__(self, rows: Any, check: Check, broken: Broken, name: str = "row") -> None:
        # Images are opened here, where an error about one does not end the stream.
        self.rows = rows.decode(False) if getattr(rows, "features", None) else rows
        self.check, self.broken, self.name = check, broken, name

    def __iter__(self) -> Iterator[Row]:
        for row in numbered(self.rows, self.name):
            key = partial(_digest, row)  # a stream that is shuffled has it in another place each time
            try:
                good = self.check(row)
            except InputError as error:
                self.broken(key(), error)
            else:
                good.key = key
                yield good

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew where the stream can."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def _digest(row: Row) -> str:
    return hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest()


def training_rows(rows: Any, check: Check, broken: Broken) -> Rows | RowStream:
    """Rows to train on; without a length they are a stream."""
    return Rows(rows, check, broken) if hasattr(rows, "__len__") else RowStream(rows, check, broken)


def readable(rows: Any, check: Check, broken: Broken, name: str = "row") -> Any:
    """The rows that can be read, each tried now; those of a stream as they come.

    Unlike those to train on, which have a place in a batch to fill, a broken row is left out and no other counts twice.

    Raises:
        InputError: more than may be cannot be read, or all.
    """
    if not hasattr(rows, "__len__"):
        return RowStream(rows, check, broken, name)
    tried = Rows(rows, check, broken, name)
    good = [number for number in range(len(rows)) if tried.good(number) is not None]
    if len(good) == len(rows):
        return rows
    if not good:
        raise InputError(f"no {name} of the data can be read.")
    return rows.select(good) if hasattr(rows, "select") else [rows[number] for number in good]


def numbered(rows: Any, name: str = "row") -> Iterator[Row]:
    """Rows that know their number.

    Raises:
        InputError: one cannot be read; the message names it.
    """
    iterator, number = iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except InputError:  # `Rows` has named the row
            raise
        except Exception as error:
            raise InputError(f"{name} {number} cannot be read: {error}") from error
        yield row if isinstance(row, Row) else Row(row, f"{name} {number}")
        number += 1
