"""Six kinds of question about a grid of digits, from a look-up to counting, with answers of one to nine tokens."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .digits import GRID

Kind = Literal["cell", "row", "grid", "compare", "sum", "count"]
KINDS: tuple[Kind, ...] = ("cell", "row", "grid", "compare", "sum", "count")

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True)
class Question:
    """A question about a grid: its kind, its wording, its answer and the cells (0 to 8) it asks about."""

    kind: Kind
    text: str
    answer: str
    cells: tuple[int, ...]


def cell_name(cell: int) -> str:
    """The name of a cell, such as "top left"."""
    return f"{ROWS[cell // GRID]} {COLUMNS[cell % GRID]}"


def ask(kind: Kind, digits: tuple[int, ...], rng: np.random.Generator) -> Question:
    """Ask one question of a kind about nine `digits` in reading order."""
    everywhere = tuple(range(GRID * GRID))
    row = int(rng.integers(GRID))
    in_row = everywhere[row * GRID : (row + 1) * GRID]
    values = [digits[cell] for cell in in_row]
    match kind:
        case "cell":
            cell = int(rng.integers(len(everywhere)))
            return Question(kind, f"which digit is {cell_name(cell)} ?", str(digits[cell]), (cell,))
        case "row":
            return Question(kind, f"read the {ROWS[row]} row .", " ".join(map(str, values)), in_row)
        case "grid":
            return Question(kind, "read the whole grid .", " ".join(map(str, digits)), everywhere)
        case "sum":
            return Question(kind, f"what is the sum of the {ROWS[row]} row ?", str(sum(values)), in_row)
        case "compare":
            # Two different digits where there are any, in either order: "yes" and "no" are equally likely.
            a, b = (int(c) for c in rng.choice(len(everywhere), size=2, replace=False))
            others = [c for c in everywhere if digits[c] != digits[a]]
            if others:
                b = int(rng.choice(others))
            answer = "yes" if digits[a] > digits[b] else "no"
            return Question(kind, f"is {cell_name(a)} larger than {cell_name(b)} ?", answer, (a, b))
        case "count":
            # Half of the questions ask for a digit that is there, or most answers would be zero.
            digit = int(rng.choice(digits)) if rng.random() < 0.5 else int(rng.integers(10))
            cells = tuple(c for c in everywhere if digits[c] == digit)
            return Question(kind, f"how many cells show {digit} ?", str(len(cells)), cells)
