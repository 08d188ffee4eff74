"""Questions about a page and their answers, as DocVQA and ChartQA ask them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .layouts import Facts
from .words import Words

Task = Literal["lookup", "copy", "compare", "sum", "count", "yesno", "absent", "read"]
TASKS: tuple[Task, ...] = ("lookup", "copy", "compare", "sum", "count", "yesno", "absent", "read")
ABSENT = "not on the page"


@dataclass(frozen=True)
class Asked:
    """A page's facts, its text line by line, the words its split has, and what draws the question."""

    facts: Facts
    texts: list[str]
    words: Words
    rng: np.random.Generator

    def pick(self, count: int) -> list[int]:
        """Different items of the page's table, by number."""
        return [int(n) for n in self.rng.choice(len(self.facts.items), count, replace=False)]

    def column(self) -> tuple[str, list[str]]:
        """A column: how one of its values is asked for, and all of them."""
        names = list(self.facts.columns)
        name = names[self.rng.integers(len(names))]
        return name, self.facts.columns[name]


Answered = tuple[str, str]


def _number(text: str) -> float:
    return float(text.removeprefix("$"))


def _lookup(asked: Asked) -> Answered | None:
    facts, rng = asked.facts, asked.rng
    if facts.items and (not facts.fields or rng.random() < 0.5):
        (n,), (name, values) = asked.pick(1), asked.column()
        return f"What is {name.format(facts.items[n])}?", values[n]
    label = list(facts.fields)[rng.integers(len(facts.fields))]
    return f"What is the {label}?", facts.fields[label]


def _copy(asked: Asked) -> Answered | None:
    if asked.rng.random() < 0.5:
        return "What is the title?", asked.facts.title
    starts = [text.split()[0] for text in asked.texts if " " in text]
    unique = [text for text in asked.texts if " " in text and starts.count(text.split()[0]) == 1]
    if not unique:
        return None
    text = unique[asked.rng.integers(len(unique))]
    return f"Copy the line that begins with {text.split()[0].strip(':')}.", text


def _compare(asked: Asked) -> Answered | None:
    if len(asked.facts.items) < 2:
        return None
    name, values = asked.column()
    numbers = [_number(value) for value in values]
    most = asked.rng.random() < 0.5
    if asked.rng.random() < 0.5:
        best = max(numbers) if most else min(numbers)
        if numbers.count(best) > 1:
            return None
        what = name.removeprefix("the ").rsplit(" ", 2)[0]  # "the price of {}" is asked for as "price"
        return f"Which has the {'largest' if most else 'smallest'} {what}?", asked.facts.items[numbers.index(best)]
    a, b = asked.pick(2)
    if numbers[a] == numbers[b]:
        return None
    winner = a if (numbers[a] > numbers[b]) == most else b
    names = f"{name.format(asked.facts.items[a])} or {asked.facts.items[b]}"
    return f"Which is {'larger' if most else 'smaller'}, {names}?", asked.facts.items[winner]


def _sum(asked: Asked) -> Answered | None:
    if len(asked.facts.items) < 2:
        return None
    (a, b), (name, values) = asked.pick(2), asked.column()
    total = _number(values[a]) + _number(values[b])
    written = f"{total:.2f}" if "." in values[a] else f"{total:.0f}"
    money = "$" if values[a].startswith("$") else ""
    return f"What is {name.format(asked.facts.items[a])} plus that of {asked.facts.items[b]}?", money + written


def _count(asked: Asked) -> Answered | None:
    items = asked.facts.items
    return ("How many entries does the page list?", str(len(items))) if items else None


def _yesno(asked: Asked) -> Answered | None:
    facts, rng = asked.facts, asked.rng
    right = bool(rng.random() < 0.5)
    if len(facts.items) >= 2:
        (a, b), (name, values) = asked.pick(2), asked.column()
        x, y = _number(values[a]), _number(values[b])
        if x == y:
            return None
        if (x > y) != right:
            a, b = b, a
        answer = "yes" if right else "no"
        return f"Is {name.format(facts.items[a])} larger than that of {facts.items[b]}?", answer
    labels = list(facts.fields)
    a, b = (int(n) for n in rng.choice(len(labels), 2, replace=False))
    value = facts.fields[labels[a if right else b]]
    if not right and value == facts.fields[labels[a]]:
        return None
    return f"Is {value} the {labels[a]}?", "yes" if right else "no"


def _absent(asked: Asked) -> Answered | None:
    facts, page = asked.facts, " ".join(asked.texts)
    lists = (asked.words.goods, asked.words.cities, asked.words.last_names) if facts.items else (asked.words.fields,)
    words = [word for kind in lists for word in kind if word not in page]
    word = words[asked.rng.integers(len(words))]
    if facts.items:
        return f"What is {asked.column()[0].format(word)}?", ABSENT
    return f"What is the {word.lower()}?", ABSENT


def _read(asked: Asked) -> Answered | None:
    return "Read the page.", "\n".join(asked.texts)


_ASK: dict[Task, Callable[[Asked], Answered | None]] = {
    "lookup": _lookup, "copy": _copy, "compare": _compare, "sum": _sum,
    "count": _count, "yesno": _yesno, "absent": _absent, "read": _read,
}  # fmt: skip


def ask(task: Task, facts: Facts, texts: list[str], words: Words, rng: np.random.Generator) -> Answered | None:
    """A question and its answer, or None where the page has nothing to ask for in this way.

    Args:
        task: the kind of question.
        facts: what the page says.
        texts: its lines as they are written.
        words: the lists of its split, of which "not on the page" asks for what is not there.
        rng: draws what is asked for.
    """
    return _ASK[task](Asked(facts, texts, words, rng))
