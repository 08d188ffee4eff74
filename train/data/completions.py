"""Which tokens of a row's text are its answer: those that the model writes itself, with the one that ends its turn.

An answer is found by its characters in the whole text, not by how many tokens the prompt alone has: a tokenizer may
join the end of a prompt to the first word of an answer, and the joined token is the answer's.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from skipit.router import InputError

Turns = Sequence[dict[str, Any]]
Template = Callable[[Turns, bool], str]
"""From messages to text, with or without the words that make the model answer."""

_WRITERS = ("assistant", "model")
_MARK = "\ue000"  # for private use: stands behind an answer while it is looked for in what a template makes of it


class Answered(NamedTuple):
    """The text of a conversation.

    Attributes:
        text: of all of it; begins with the very prompt that the model answers.
        answers: where each begins, after the words that make the model answer, and where what the row says ends.
    """

    text: str
    answers: list[tuple[int, int]]


def answered_text(template: Template, prompt: Turns, completion: Turns, where: str) -> Answered:
    """A conversation as text, with the places of the assistant's messages of its completion.

    Raises:
        InputError: it has none, or the template writes an answer in a way that no generation could; the message names
            the row.
    """
    places = [place for place, turn in enumerate(completion) if turn["role"] in _WRITERS]
    if not places:
        raise InputError(f"{where}: `completion` has no message of the assistant; expected one, with its answer.")
    whole = template([*prompt, *completion], False)
    shown = template([*prompt, *(_marked(turn) if turn["role"] in _WRITERS else turn for turn in completion)], False)
    first, *others = shown.split(_MARK)
    if len(others) != len(places) or "".join((first, *others)) != whole:
        raise InputError(f"{where}: the processor's chat template does not write its completion as it stands.")
    answers: list[tuple[int, int]] = []
    end, shift, text = 0, 0, ""
    for place, part in zip(places, (first, *others), strict=False):
        asked = template([*prompt, *completion[:place]], True)
        start, end = _after(whole, asked), end + len(part)
        if start is None or start > end:
            raise InputError(_no_generation(whole, asked, where))
        if not answers:
            # What generation is given, also where the template spaces its own turns in another way.
            shift, text = len(asked) - start, asked + whole[start:]
        answers.append((start + shift, end + shift))
    return Answered(text, answers)


def _marked(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": _behind(content)}
    last = max((place for place, part in enumerate(content) if part.get("text") is not None), default=None)
    if last is None:
        return {**turn, "content": [*content, {"type": "text", "text": _MARK}]}
    part = {**content[last], "text": _behind(content[last]["text"])}
    return {**turn, "content": [*content[:last], part, *content[last + 1 :]]}


def _behind(text: str) -> str:
    bare = text.rstrip()  # many templates strip an answer, and would keep white space before a mark
    return bare + _MARK + text[len(bare) :]


def _after(text: str, prompt: str) -> int | None:
    """Where a text goes on after a prompt, whose white space it may have otherwise; None if it begins otherwise."""
    if text.startswith(prompt):
        return len(prompt)
    words = r"\s+".join(map(re.escape, prompt.split()))
    found = re.match(rf"\s*{words}" + (r"\s*" if prompt[-1:].isspace() else ""), text)
    return found and found.end()


def _no_generation(whole: str, asked: str, where: str) -> str:
    same = next((at for at, (one, other) in enumerate(zip(whole, asked, strict=False)) if one != other), len(whole))
    return (
        f"{where}: the processor's chat template has the model answer after {asked[max(0, same - 20) :]!r}, but writes "
        f"this answer after {whole[max(0, same - 20) : same]!r}. Begin the completion with what is missing, such as a "
        "thought that is opened, or give the processor a chat template that does not open it. An answer that the "
        "template shortens because others follow it needs a row of its own."
    )


def answer_tokens(tokenizer: Any, row: Answered, special: frozenset[int], where: str) -> tuple[list[int], list[bool]]:
    """The tokens of a text, without what a processor puts in place of media, and which are to be labels.

    A label is every token of an answer, and what the template puts behind it up to the first special token, which ends
    the turn; nothing that stands behind that, such as a line break, which no model writes.

    Raises:
        InputError: an answer has no token, or goes on after its end, or cannot be told from the prompt in tokens.
    """
    ids, index = _tokens(tokenizer, row.text, where)
    stops = [(index(start, True), index(end, False)) for start, end in row.answers]
    closing = next((place for place in range(stops[-1][1], len(ids)) if ids[place] in special), None)
    end = None if closing is None else ids[closing]
    label = [False] * len(ids)
    for (first, stop), (following, _) in pairwise([*stops, (len(ids), 0)]):
        closed = next((place for place in range(stop, following) if ids[place] in special), None)
        if closed is not None and ids[closed] == end:
            behind = closed + 1
        elif following == len(ids):  # an end that is no special token
            behind = max(stop, index(len(row.text.rstrip()), False))
        else:
            behind = stop
        if end is not None and end in ids[first:stop]:
            early = ids.index(end, first) + 1
            if tokenizer.decode(ids[early:stop], skip_special_tokens=False).strip():
                raise InputError(f"{where}: its answer goes on after {tokenizer.decode([end])!r}, which ends a turn.")
            behind = early
        if first >= behind:
            raise InputError(f"{where}: its completion has no token to learn.")
        label[first:behind] = [True] * (behind - first)
    return ids, label


def begins_anew(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer is to add its special tokens: unless a chat template has begun the text with them.

    So does transformers' `apply_chat_template(tokenize=True)`, of which the model's users and servers make prompts.
    """
    first = getattr(tokenizer, "bos_token", None)
    return not (first and text.startswith(first))


def _tokens(tokenizer: Any, text: str, where: str) -> tuple[list[int], Callable[[int, bool], int]]:
    """A text's tokens, and what tells the first one that reaches beyond a character, or begins at it or after it."""
    options = {"add_special_tokens": begins_anew(tokenizer, text), "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]

        def index(character: int, reaches: bool) -> int:
            found = (
                place
                for place, (start, end) in enumerate(offsets)
                if (end > character if reaches else start >= character)
            )
            return next(found, len(ids))

        return ids, index
    ids = tokenizer(text, **options)["input_ids"]

    def count(character: int, reaches: bool) -> int:
        before = tokenizer(text[:character], **options)["input_ids"]
        if ids[: len(before)] != before:
            raise InputError(
                f"{where}: the tokenizer joins the answer to what is beside it ({text[:character][-20:]!r}), and does "
                "not say where its tokens are. Use a fast tokenizer (tokenizer.json)."
            )
        return len(before)

    return ids, count
