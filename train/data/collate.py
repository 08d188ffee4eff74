"""From rows in the conversational vision format to batches of a model, with labels on the completion only."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from skipit.router import InputError
from skipit.theory.labels import IGNORE

FORMAT = (
    "Rows need images or videos, prompt and completion, or images or videos and messages of which the assistant has "
    "the last (TRL's conversational vision format)."
)


@dataclass(frozen=True)
class Collator:
    """Turns rows with `images`, `prompt` and `completion` (TRL's conversational vision format) into a batch.

    Beside images or instead of them a row may have `videos`: arrays [frames, height, width, channels], lists of
    pictures, or whatever else the processor takes.

    Args:
        processor: the model's processor, with a chat template.
        with_completion: True for training and profiling: the completion follows the prompt and has labels.
            False for generation: prompts only, padded on the left.
    """

    processor: Any
    with_completion: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows.

        Raises:
            InputError: a column is missing, an image cannot be read, or images and placeholders do not match; the
                message names the row, by its number in the data set where `Rows` or `batches` read it.
        """
        places, read = [], []
        for number, row in enumerate(rows):
            places.append(row.where if isinstance(row, Row) else f"row {number} of the batch")
            read.append(self._read(row, places[-1]))
        prompts, media = [row.prompt for row in read], [(row.images, row.videos) for row in read]
        if not self.with_completion:
            return self._process(places, prompts, media, "left")
        if "suffix" in signature(self.processor.__call__).parameters:
            # A prefix LM, such as PaliGemma: a prompt's tokens see each other, so it must know where the answer begins.
            return self._process(places, prompts, media, "right", [_plain(row.reply) for row in read])
        batch = self._process(places, [row.whole for row in read], media, "right")
        # The prompt alone, expanded the same way, says where the completion begins.
        lengths = self._process(places, prompts, media, "right")["attention_mask"].sum(-1)
        place = torch.arange(batch["input_ids"].shape[1])
        inside = (place >= lengths[:, None]) & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~inside, IGNORE)
        return batch

    def checked(self, row: "Row") -> "Row":
        """A row that can be collated as far as can be told without its processor, with its images opened.

        Raises:
            InputError: it cannot; the message names it.
        """
        read = self._read(row, row.where)
        return Row({**row, "images": read.images, **({"videos": read.videos} if read.videos else {})}, row.where)

    def _read(self, row: Mapping[str, Any], where: str) -> "_Read":
        seen = ("videos",) if "videos" in row and "images" not in row else ("images",)
        check_columns(row, where, *seen, "prompt", *(("completion",) if self.with_completion else ()))
        images, videos = pictures(row, where), films(row, where)
        turns = turns_of(row, "prompt", "user", where)
        turns = _with_placeholders(turns, {"image": len(images), "video": len(videos)}, where)
        prompt, reply, whole = self._template(turns, True, where), [], ""
        if self.with_completion:
            reply = turns_of(row, "completion", "assistant", where)
            whole = self._template([*turns, *reply], False, where)
        token = getattr(self.processor, "image_token", None)
        if token and (found := (whole or prompt).count(token)) > len(images):
            raise InputError(
                f"{where}: {found} image tokens, {len(images)} images. Its text must not hold `{token}` itself."
            )
        return _Read(prompt, whole, reply, images, videos)

    def _template(self, turns: list[dict[str, Any]], generation: bool, where: str) -> str:
        try:
            text: str = self.processor.apply_chat_template(turns, add_generation_prompt=generation, tokenize=False)
        except Exception as error:  # a template is a program of its own, and may refuse turns in any way
            raise InputError(f"{where}: the processor's chat template refuses its messages: {error}") from error
        return text

    def _process(
        self,
        places: list[str],
        texts: list[str],
        media: list["_Media"],
        side: str,
        suffixes: list[str] | None = None,
    ) -> dict[str, Tensor]:
        try:
            return self._inputs(texts, media, side, suffixes)
        except (ValueError, TypeError, OSError, IndexError) as error:
            for number, (where, text, given) in enumerate(zip(places, texts, media, strict=True)):
                try:
                    self._inputs([text], [given], side, suffixes and [suffixes[number]])
                except (ValueError, TypeError, OSError, IndexError) as reason:
                    raise InputError(f"{where}: the processor cannot take it: {reason}") from reason
            raise InputError(f"{places[0]} to {places[-1]} cannot be processed together: {error}") from error

    def _inputs(
        self, texts: list[str], media: list["_Media"], side: str, suffixes: list[str] | None = None
    ) -> dict[str, Tensor]:
        images, videos = [images for images, _ in media], [video for _, videos in media for video in videos]
        given: dict[str, Any] = {"text": texts, "images": images if any(images) else None}
        if videos:
            given["videos"] = videos
        if suffixes is not None:
            given["suffix"] = suffixes
        batch = self.processor(**given, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
        return {name: value for name, value in batch.items() if name != "labels" or suffixes is not None}


class _Read(NamedTuple):
    """A row before processing: the prompt and the whole as text, the reply's messages, open images, and videos."""

    prompt: str
    whole: str
    reply: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]


_Media = tuple[list[Any], list[Any]]  # images and videos of one row


def _plain(turns: list[dict[str, Any]]) -> str:
    """The text of some messages, without roles."""
    contents = [turn["content"] for turn in turns]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text", "") for content in parts for part in content)


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
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{where}: `{column}` is not a text or a list of messages with role and content: {repr(messages)[:200]}"
        ) from error
    return turns


def _with_placeholders(turns: list[dict[str, Any]], media: Mapping[str, int], where: str) -> list[dict[str, Any]]:
    """The prompt's turns with a placeholder per image and video; messages that are plain text get them in front."""
    parts = [part for turn in turns if not isinstance(turn["content"], str) for part in turn["content"]]
    if any(media.values()) and not parts:
        first = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), 0)
        text = {"type": "text", "text": turns[first]["content"]}
        content = [*({"type": kind} for kind, count in media.items() for _ in range(count)), text]
        return [*turns[:first], {**turns[first], "content": content}, *turns[first + 1 :]]
    for kind, count in media.items():
        placeholders = sum(part.get("type") == kind for part in parts)
        if placeholders != count:
            raise InputError(
                f"{where}: its prompt has {placeholders} {kind} parts, its `{kind}s` {count}. Each {kind} needs one "
                f'part {{"type": "{kind}"}}.'
            )
    return turns


def check_columns(row: Mapping[str, Any], where: str, *needed: str) -> None:
    """Refuse a row that lacks a column.

    Raises:
        InputError: it does; the message names the row and the columns it has.
    """
    if missing := [name for name in needed if name not in row]:
        raise InputError(f"{where}: no column {', '.join(missing)}; found: {', '.join(row)}. {FORMAT}")


def pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    """A row's pictures; files and bytes are opened.

    Raises:
        InputError: one cannot be read; the message names the row.
    """
    opened = []
    given = [] if row.get("images") is None else row["images"]
    # A column of one image per row is as good as one of lists.
    for number, image in enumerate(given if isinstance(given, list | tuple) else [given]):
        try:
            opened.append(_open(image))
        except (OSError, ValueError, SyntaxError) as error:  # PIL calls a broken PNG a syntax error
            raise InputError(f"{where}: image {number} cannot be read: {error}") from error
    return opened


def films(row: Mapping[str, Any], where: str) -> list[Any]:
    """A row's videos: one that is a list of pictures becomes an array of its frames.

    Raises:
        InputError: a frame cannot be read; the message names the row.
    """
    given = row.get("videos") or []
    try:
        return [
            np.stack([np.asarray(_open(frame)) for frame in video]) if isinstance(video, list | tuple) else video
            for video in given
        ]
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{where}: a video cannot be read: {error}") from error


def _open(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, str | io.BytesIO):
        with Image.open(image) as file:
            return file.convert("RGB")
    if not isinstance(image, Image.Image):
        return image  # an array or a tensor, which processors take
    image.load()
    # Processors fail on palettes, transparency and greys.
    return image if image.mode == "RGB" else image.convert("RGB")


def answer_apart(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose `messages` are a conversation, with the last answer as `completion` and the rest as `prompt`."""
    messages = row.get("messages")
    if "prompt" in row or "completion" in row or not isinstance(messages, list) or len(messages) < 2:
        return row
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return row
    return {**row, "prompt": messages[:-1], "completion": [last]}


class Row(dict[str, Any]):
    """A row that knows where it comes from, so that an error about it can say so."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(answer_apart(values))
        self.where = where


class Broken:
    """Rows that cannot be read: each is named once and counted, and those after too many stop the run.

    Args:
        limit: how many there may be.
        note: is told of each.
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
        collate: checks rows; None takes them as they are.
        broken: counts those that cannot be read; without it the first is an error.
    """

    def __init__(self, rows: Any, collate: Collator | None = None, broken: Broken | None = None) -> None:
        self.rows, self.collate, self.broken = rows, collate, broken or Broken()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        if index >= len(self):
            raise IndexError(index)
        for number in (*range(index, len(self)), *range(index)):
            where = f"row {number}"
            try:
                row = Row(self._at(number), where)
                return row if self.collate is None else self.collate.checked(row)
            except InputError as error:
                self.broken(where, error)
        raise InputError("no row of the data can be read.")

    def _at(self, number: int) -> Any:
        try:
            return self.rows[number]
        except Exception as error:  # reading a row decodes its images, which fails in many ways
            raise InputError(f"row {number} cannot be read: {error}") from error


class RowStream(IterableDataset[dict[str, Any]]):
    """Rows that are read one by one and have no number of their own; broken ones are left out.

    Args:
        rows: a `datasets.IterableDataset` or any iterable of mappings that can be started again.
        collate: checks rows.
        broken: counts those that cannot be read.
    """

    def __init__(self, rows: Any, collate: Collator, broken: Broken) -> None:
        # Images are opened here, where an error about one does not end the stream.
        self.rows = rows.decode(False) if hasattr(rows, "decode") else rows
        self.collate, self.broken = collate, broken

    def __iter__(self) -> Iterator[Row]:
        for row in _readable(self.rows):
            try:
                yield self.collate.checked(row)
            except InputError as error:
                # A stream that is shuffled has it in another place each time.
                self.broken(hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest(), error)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew where the stream can."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def training_rows(rows: Any, collate: Collator, broken: Broken) -> Rows | RowStream:
    """Rows to train on; without a length they are a stream."""
    return Rows(rows, collate, broken) if hasattr(rows, "__len__") else RowStream(rows, collate, broken)


def batches(
    rows: Any, collate: Callable[[list["Row"]], dict[str, Tensor]], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of consecutive rows of a data set, the last one possibly smaller.

    Raises:
        InputError: the data set is empty, or a row cannot be read; the message names it.
    """
    held: list[Row] = []
    empty = True
    for row in _readable(rows):
        empty = False
        held.append(row)
        if len(held) == batch_size:
            yield collate(held)
            held = []
    if held:
        yield collate(held)
    if empty:
        raise InputError("the data set is empty; expected at least one row.")


def _readable(rows: Any) -> Iterator[Row]:
    iterator, number = iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except InputError:  # `Rows` has named the row
            raise
        except Exception as error:
            raise InputError(f"row {number} cannot be read: {error}") from error
        yield Row(row, f"row {number}")
        number += 1
