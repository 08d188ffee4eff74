"""From rows to batches of a model, with labels on the completion only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipit.router import InputError
from skipit.theory.labels import IGNORE

from .completions import Answered, Turns, answer_tokens, answered_text, begins_anew
from .rows import Broken, Check, Row, check_columns, films, numbered, pictures, seen_in, turns_of


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
        places = [row.where if isinstance(row, Row) else f"row {n} of the batch" for n, row in enumerate(rows)]
        read = [self._read(row, where) for row, where in zip(rows, places, strict=True)]
        prompts, media = [row.prompt for row in read], [(row.images, row.videos) for row in read]
        if not self.with_completion:
            return self._process(places, prompts, media, "left")
        if self._prefix_lm:
            return self._process(places, prompts, media, "right", [_plain(row.reply) for row in read])
        batch = self._process(places, [row.conversation.text for row in read], media, "right")
        return {**batch, "labels": self._labels(batch, [row.conversation for row in read], places)}

    def _labels(self, batch: Mapping[str, Tensor], rows: list[Answered], places: list[str]) -> Tensor:
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for number, (where, row) in enumerate(zip(places, rows, strict=True)):
            ids, label = answer_tokens(self._tokenizer, row, self._special, where)
            # Media, which the processor expands, stand before the first answer: tokens agree from there to the end.
            tail, length = len(ids) - label.index(True), int(batch["attention_mask"][number].sum())
            answered = batch["input_ids"][number, length - tail : length]
            if answered.tolist() != ids[-tail:]:
                raise InputError(f"{where}: the processor changes the answer's tokens, so that none can be labelled.")
            labels[number, length - tail : length] = answered.where(torch.tensor(label[-tail:]), IGNORE)
        return labels

    @cached_property
    def _prefix_lm(self) -> bool:
        """As PaliGemma: a prompt's tokens see each other, so its processor must know where the answer begins."""
        return "suffix" in signature(self.processor.__call__).parameters

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def _special(self) -> frozenset[int]:
        """Tokens that are no text; a tokenizer names some, such as Gemma's end of a turn, in one place only."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset(self._tokenizer.all_special_ids) | {number for number, t in added.items() if t.special}

    def checked(self, row: Row) -> Row:
        """A row that can be collated as far as can be told without its processor, with its images opened.

        Raises:
            InputError: it cannot; the message names it.
        """
        read = self._read(row, row.where)
        return Row({**row, "images": read.images, **({"videos": read.videos} if read.videos else {})}, row.where)

    def _read(self, row: Mapping[str, Any], where: str) -> "_Read":
        check_columns(row, where, seen_in(row), "prompt", *(("completion",) if self.with_completion else ()))
        images, videos = pictures(row, where), films(row, where)
        turns = turns_of(row, "prompt", "user", where)
        turns = _with_placeholders(turns, {"image": len(images), "video": len(videos)}, where)
        prompt, reply = self._template(turns, True, where), []
        conversation = Answered(prompt, [])
        if self.with_completion:
            reply = turns_of(row, "completion", "assistant", where)
            conversation = answered_text(partial(self._template, where=where), turns, reply, where)
        token = getattr(self.processor, "image_token", None)
        if token and (count := conversation.text.count(token)) > len(images):
            raise InputError(
                f"{where}: {count} image tokens, {len(images)} images. Its text must not hold `{token}` itself."
            )
        return _Read(prompt, conversation, reply, images, videos)

    def _template(self, turns: Turns, generation: bool, where: str) -> str:
        try:
            text: str = self.processor.apply_chat_template(
                list(turns), add_generation_prompt=generation, tokenize=False
            )
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
        except Exception as error:  # a processor is a program of its own, too
            for number, (where, text, given) in enumerate(zip(places, texts, media, strict=True)):
                try:
                    self._inputs([text], [given], side, suffixes and [suffixes[number]])
                except Exception as reason:
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
        # A prefix LM's processor writes the first token itself.
        anew = not self._prefix_lm and begins_anew(self._tokenizer, texts[0])
        batch = self.processor(**given, padding=True, padding_side=side, add_special_tokens=anew, return_tensors="pt")
        return {name: value for name, value in batch.items() if name != "labels" or suffixes is not None}


class _Read(NamedTuple):
    """A row before processing: prompt and all of it as text, the reply's messages, open images, and videos."""

    prompt: str
    conversation: Answered
    reply: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]


_Media = tuple[list[Any], list[Any]]  # images and videos of one row


def _plain(turns: list[dict[str, Any]]) -> str:
    """The text of some messages, without roles."""
    contents = [turn["content"] for turn in turns]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text", "") for content in parts for part in content)


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


def tried(collate: Callable[[list[Row]], Any]) -> Check:
    """Checks a row by making a batch of it, which nothing is found broken after."""

    def check(row: Row) -> Row:
        collate([row])
        return row

    return check


def forgiving(collate: Callable[[list[Row]], dict[str, Tensor]], broken: Broken) -> Callable[[list[Row]], Any]:
    """Makes batches of rows, in which the others stand twice for those that only the processor refuses.

    To try every row alone before would double the time that processors take.

    Args:
        collate: makes batches.
        broken: counts those that are refused.
    """

    def batch(rows: list[Row]) -> dict[str, Tensor]:
        try:
            return collate(rows)
        except InputError:
            good = []
            for row in rows:
                try:
                    collate([row])
                except InputError as error:
                    broken(row.key(), error)
                else:
                    good.append(row)
            if len(good) in (0, len(rows)):  # together they are refused, or there is none to stand for them
                raise
            return collate([good[at % len(good)] for at in range(len(rows))])

    return batch


def batches(
    rows: Any, collate: Callable[[list[Row]], dict[str, Tensor]], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of consecutive rows of a data set, the last one possibly smaller.

    Raises:
        InputError: the data set is empty, or a row cannot be read; the message names it.
    """
    held: list[Row] = []
    empty = True
    for row in numbered(rows):
        empty = False
        held.append(row)
        if len(held) == batch_size:
            yield collate(held)
            held = []
    if held:
        yield collate(held)
    if empty:
        raise InputError("the data set is empty; expected at least one row.")
