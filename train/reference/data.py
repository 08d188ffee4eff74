"""Digit grids with questions as a `datasets.Dataset` in TRL's conversational vision format."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipit.router.errors import short

from .digits import SPLITS, Scans, Split, draw_grid, load_scans, render
from .questions import KINDS, Kind, Question, ask

if TYPE_CHECKING:
    from datasets import Dataset, Features


def reference_dataset(split: Split, size: int, seed: int = 0, kinds: Sequence[Kind] = KINDS) -> "Dataset":
    """Questions about grids of digits, one per row, asking the `kinds` in turn.

    Rows depend on (`split`, `seed`, `kinds`) alone: a larger data set starts with the rows of a smaller one.
    Columns: `images` (one 48x48 picture), `prompt` and `completion` (messages), `kind`, `answer`, `digits` (nine,
    in reading order) and `cells` (0 to 8, those the question is about). The image part of a message has the text
    None, as in every data set that Arrow has stored: a struct has all its fields.

    Args:
        split: which scans may appear; splits share none.
        size: number of rows, at least 1.
        seed: another seed gives other grids and questions from the same scans.
        kinds: kinds of question, at least one.

    Returns:
        An in-memory data set of `size` rows; images are decoded when a row is read.

    Raises:
        ValueError: an unknown `split` or kind, no kinds, `size` below 1 or a negative `seed`.

    Example:
        >>> row = reference_dataset("test", size=1, kinds=["row"])[0]
        >>> row["prompt"][0]["content"][1]["text"], row["answer"], row["cells"]
        ('read the middle row .', '6 2 9', [3, 4, 5])
    """
    from datasets import Dataset

    _check(size, seed, kinds)
    scans = load_scans(split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    rows = [_row(kinds[i % len(kinds)], scans, rng) for i in range(size)]
    return Dataset.from_list(rows, features=_features())


def _check(size: int, seed: int, kinds: Sequence[str]) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`size`: got {short(size)}, expected a whole number of rows, at least 1.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed`: got {short(seed)}, expected a whole number, at least 0.")
    if isinstance(kinds, str) or not kinds or (unknown := [kind for kind in kinds if kind not in KINDS]):
        got = repr(kinds) if isinstance(kinds, str) or not kinds else f"unknown {', '.join(map(repr, unknown))}"
        raise ValueError(f"`kinds`: got {got}, expected a list of one or more of {', '.join(KINDS)}.")


def _row(kind: Kind, scans: Scans, rng: np.random.Generator) -> dict[str, Any]:
    grid = draw_grid(scans, rng)
    question = ask(kind, grid.digits, rng)
    return {
        "images": [{"bytes": _png(render(scans.pixels[list(grid.scans)])), "path": None}],
        **_messages(question),
        "kind": kind,
        "answer": question.answer,
        "digits": grid.digits,
        "cells": question.cells,
    }


def _messages(question: Question) -> dict[str, list[dict[str, Any]]]:
    image, text = {"type": "image", "text": None}, {"type": "text", "text": question.text}
    answer = {"type": "text", "text": question.answer}
    return {
        "prompt": [{"role": "user", "content": [image, text]}],
        "completion": [{"role": "assistant", "content": [answer]}],
    }


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _features() -> "Features":
    from datasets import Features, Image, List, Value

    content = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": content})
    return Features(
        {
            "images": List(Image()),
            "prompt": messages,
            "completion": messages,
            "kind": Value("string"),
            "answer": Value("string"),
            "digits": List(Value("int64")),
            "cells": List(Value("int64")),
        }
    )
