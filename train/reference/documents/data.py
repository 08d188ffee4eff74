"""Rendered pages with questions as a `datasets.Dataset` in TRL's conversational vision format."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
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
    split: Split, size: int, seed: int = 0, kinds: Sequence[Task] = TASKS, pages: Sequence[Kind] = KINDS
) -> "Dataset":
    """Questions about rendered pages, one per row on a page of its own, asking the `kinds` in turn.

    Rows depend on (`split`, `seed`, `kinds`, `pages`) alone: a larger data set starts with the rows of a smaller one.
    Columns: `images` (one JPEG of 512x512 pixels), `prompt` and `completion` (messages), `kind` (of question), `page`
    (its kind) and `answer`.

    Args:
        split: which fonts, words and layouts may appear; splits share none.
        size: number of rows, at least 1.
        seed: another seed gives other pages and questions.
        kinds: kinds of question, at least one.
        pages: kinds of pages, at least one, of which each question can be asked of some.

    Raises:
        ValueError: an unknown `split`, kind or page, or none, `size` below 1 or a negative `seed`.

    Example:
        >>> row = documents_dataset("test", size=1)[0]
        >>> row["page"], row["prompt"][0]["content"][1]["text"], row["answer"]
        ('chart', 'What is the number of Guests for Brush?', '95')
    """
    from datasets import Dataset

    _check(split, size, seed, {"kinds": (kinds, TASKS), "pages": (pages, KINDS)})
    rows = []
    for number in range(size):
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        rows.append(_row(split, kinds[number % len(kinds)], pages, rng))
    return Dataset.from_list(rows, features=_features())


def _check(split: str, size: int, seed: int, named: dict[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split`: got {split!r}, expected one of {', '.join(SPLITS)}.")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`size`: got {short(size)}, expected a whole number of rows, at least 1.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed`: got {short(seed)}, expected a whole number, at least 0.")
    for name, (given, known) in named.items():
        if isinstance(given, str) or not given or any(one not in known for one in given):
            raise ValueError(f"`{name}`: got {short(given)}, expected a list of one or more of {', '.join(known)}.")


def _row(split: Split, task: Task, pages: Sequence[Kind], rng: np.random.Generator) -> dict[str, Any]:
    for _ in range(100):
        document = draw_document(split, pages[int(rng.integers(len(pages)))], rng)
        if asked := questions_of(document, split, rng, [task]):
            break
    else:
        raise ValueError(f"`pages`: got {short(pages)}, none of which has anything to ask for as {task!r}.")
    (_, question, answer) = asked[0]
    image, text = {"type": "image", "text": None}, {"type": "text", "text": question}
    return {
        "images": [{"bytes": _jpeg(document.page.image), "path": None}],
        "prompt": [{"role": "user", "content": [image, text]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
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
