"""Rendered pages with questions as a `datasets.Dataset` in TRL's conversational vision format."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from skipit.router.errors import short

from .charts import chart
from .layouts import KINDS, LAYOUTS, STYLES, Draw, Facts, Kind
from .page import Page, photographed, set_page
from .questions import TASKS, Task, ask
from .words import FONTS, SPLITS, WORDS, Face, Split, Words

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = 8  # about a page of `conversations_dataset`


@dataclass(frozen=True)
class Document:
    """A page as it is looked at, what it says, and its text line by line in reading order."""

    kind: Kind
    page: Page
    facts: Facts
    texts: list[str]


def draw_document(
    split: Split, kind: Kind, rng: np.random.Generator, words: Words | None = None, faces: Sequence[Face] = ()
) -> Document:
    """One page of a split; splits share no font, word list, style of layout or seed.

    Args:
        split: whose styles, words and fonts are drawn from.
        kind: of page.
        rng: draws all of it.
        words: to be written, in place of the split's.
        faces: to be written with, in place of the split's.
    """
    style = STYLES[split][rng.integers(len(STYLES[split]))]
    draw = Draw(words or WORDS[split], style, rng)
    if kind == "chart":
        page, facts = chart(draw, split, faces)
        (values,) = facts.columns.values()
        texts = [facts.title, *(f"{item} {value}" for item, value in zip(facts.items, values, strict=True))]
    else:
        lines, facts = LAYOUTS[kind](draw)
        family = faces or FONTS[split][rng.integers(len(FONTS[split]))]
        page = set_page(lines, family[int(rng.integers(len(family)))], rng, style.box)
        texts = [" ".join(cell.text for cell in line.cells if cell.text) for line in lines]
    return Document(kind, photographed(page, rng), facts, texts)


def questions_of(
    document: Document, split: Split, rng: np.random.Generator, tasks: Sequence[Task] = TASKS
) -> list[tuple[Task, str, str]]:
    """One question of each task that can be asked: task, question, answer."""
    asked = [(task, ask(task, document.facts, document.texts, WORDS[split], rng)) for task in tasks]
    return [(task, *both) for task, both in asked if both is not None]


def documents_dataset(
    split: Split,
    size: int,
    seed: int = 0,
    kinds: Sequence[Task] = TASKS,
    pages: Sequence[Kind] = KINDS,
    questions: int = 1,
) -> "Dataset":
    """Questions about rendered pages, one per row on a page of its own, asking the `kinds` in turn.

    Rows depend on all arguments but `size`: a larger data set starts with the rows of a smaller one. Of more
    `questions` the others follow the first in the completion, as a conversation.
    Columns: `images` (one JPEG of 512x512 pixels), `prompt` and `completion` (messages), `kind` (of question), `page`
    (its kind) and `answer`.

    Args:
        split: which fonts, words and layouts may appear; splits share none.
        size: number of rows, at least 1.
        seed: another seed gives other pages and questions.
        kinds: kinds of question, at least one.
        pages: kinds of pages, at least one, of which each question can be asked of some.
        questions: at most so many about a page, at least 1.

    Raises:
        ValueError: an unknown `split`, kind or page, or none, `size` or `questions` below 1 or a negative `seed`.

    Example:
        >>> row = documents_dataset("test", size=1)[0]
        >>> row["page"], row["prompt"][0]["content"][1]["text"], row["answer"]
        ('chart', 'What is the number of Guests for Brush?', '95')
    """
    from datasets import Dataset

    _check(split, {"size": size, "questions": questions}, seed, {"kinds": (kinds, TASKS), "pages": (pages, KINDS)})
    rows = []
    for number in range(size):
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        rows.append(_row(split, kinds[number % len(kinds)], pages, rng, more=questions - 1, kinds=kinds))
    return Dataset.from_list(rows, features=_features())


def conversations_dataset(split: Split, size: int, seed: int = 0) -> "Dataset":
    """The same pages with up to `QUESTIONS` questions each: four times the answer tokens, for a third more tokens."""
    return documents_dataset(split, size, seed, questions=QUESTIONS)


def _check(
    split: str, counts: dict[str, int], seed: int, named: dict[str, tuple[Sequence[str], Sequence[str]]]
) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split`: got {split!r}, expected one of {', '.join(SPLITS)}.")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"`{name}`: got {short(count)}, expected a whole number, at least 1.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed`: got {short(seed)}, expected a whole number, at least 0.")
    for name, (given, known) in named.items():
        if isinstance(given, str) or not given or any(one not in known for one in given):
            raise ValueError(f"`{name}`: got {short(given)}, expected a list of one or more of {', '.join(known)}.")


def _row(
    split: Split, task: Task, pages: Sequence[Kind], rng: np.random.Generator, *, more: int, kinds: Sequence[Task]
) -> dict[str, Any]:
    """A row that asks for a task, and then at most so many more questions of some kinds."""
    for _ in range(100):
        document = draw_document(split, pages[int(rng.integers(len(pages)))], rng)
        if asked := questions_of(document, split, rng, [task]):
            break
    else:
        raise ValueError(f"`pages`: got {short(pages)}, none of which has anything to ask for as {task!r}.")
    ((_, question, answer),) = asked
    different = {question: answer}
    if more:
        others = [each for _ in range(1 + more) for each in questions_of(document, split, rng, kinds)]
        different |= {other: said for _, other, said in (others[n] for n in rng.permutation(len(others)))}
    text = [{"type": "text", "text": text} for turn in [*different.items()][: 1 + more] for text in turn]
    roles = cycle(("assistant", "user"))
    return {
        "images": [{"bytes": _jpeg(document.page.image), "path": None}],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, text[0]]}],
        "completion": [{"role": role, "content": [each]} for role, each in zip(roles, text[1:], strict=False)],
        "kind": task,
        "page": document.kind,
        "answer": answer,
    }


def _jpeg(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=95)
    return file.getvalue()


def _features() -> Any:
    from datasets import Features, Image, List, Value

    content = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": content})
    text = {name: Value("string") for name in ("kind", "page", "answer")}
    return Features({"images": List(Image()), "prompt": messages, "completion": messages, **text})
