"""Kinds of pages: what is written on one, line by line, and the facts that questions are asked about."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .page import Cell, Line
from .words import Split, Words

Kind = Literal["receipt", "form", "table", "invoice", "sign", "paragraph", "chart"]
KINDS: tuple[Kind, ...] = ("receipt", "form", "table", "invoice", "sign", "paragraph", "chart")


@dataclass(frozen=True)
class Style:
    """How a split sets its pages; no two splits share one.

    Args:
        title: where the title stands.
        colon: what follows a label.
        values: where the value of a label begins or, if negative, ends, over the width.
        rules: draw lines between the parts.
        box: draw a frame.
        date: a format of dates.
        total: what precedes the sum of a bill.
        money: what precedes a price.
    """

    title: Literal["left", "center", "right"]
    colon: str
    values: float
    rules: bool
    box: bool
    date: str
    total: str
    money: str = ""


STYLES: dict[Split, tuple[Style, ...]] = {
    "train": (
        Style("center", ":", -1.0, True, False, "{y}-{m:02}-{d:02}", "Total"),
        Style("left", ":", 0.55, False, False, "{d:02}.{m:02}.{y}", "Sum", "$"),
        Style("left", "", -1.0, True, True, "{d:02}/{m:02}/{y}", "TOTAL"),
        Style("center", "", 0.5, False, False, "{y}/{m:02}/{d:02}", "Amount", "$"),
    ),
    "calibration": (Style("right", ":", -0.95, False, True, "{m:02}.{d:02}.{y}", "Balance"),),
    "test": (
        Style("right", ":", 0.6, True, False, "{m:02}/{d:02}/{y}", "Total due", "$"),
        Style("center", ":", -0.9, False, True, "{d:02}-{m:02}-{y}", "To pay"),
    ),
}


@dataclass
class Facts:
    """What a page says.

    Args:
        title: its first line, or a chart's title.
        fields: values by label.
        items: names of the rows of its table, or of a chart's bars.
        columns: a value for each item, per column, by how that is asked for: "the price of {}".
    """

    title: str
    fields: dict[str, str] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)


class Draw:
    """Draws words, numbers and dates for one page."""

    def __init__(self, words: Words, style: Style, rng: np.random.Generator) -> None:
        self.words, self.style, self.rng = words, style, rng

    def some(self, name: str, count: int) -> list[str]:
        """Different words of a list."""
        return [str(word) for word in self.rng.choice(getattr(self.words, name), count, replace=False)]

    def one(self, name: str) -> str:
        """A word of a list."""
        return self.some(name, 1)[0]

    def person(self) -> str:
        """A first and a last name."""
        return f"{self.one('first_names')} {self.one('last_names')}"

    def company(self) -> str:
        """A name and a trade."""
        return f"{self.one('last_names')} {self.one('trades')}"

    def address(self) -> str:
        """A number and a street."""
        return f"{self.whole(1, 200)} {self.one('streets')} Street"

    def date(self) -> str:
        """A date as the style writes it."""
        year, month, day = (int(self.rng.integers(*span)) for span in ((1990, 2030), (1, 13), (1, 29)))
        return self.style.date.format(y=year, m=month, d=day)

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low`, below `high`."""
        return int(self.rng.integers(low, high))

    def line(self, label: str, value: str, rule: bool = False) -> Line:
        """A label and its value."""
        at = self.style.values
        right = Cell(value, abs(at), "right" if at < 0 else "left")
        return Line((Cell(label + self.style.colon), right), rule)

    def titled(self, title: str, scale: float = 1.0) -> Line:
        """A title."""
        at: float = {"left": 0.0, "center": 0.5, "right": 1.0}[self.style.title]
        return Line((Cell(title, at, self.style.title),), scale=scale)


Made = tuple[list[Line], Facts]


def receipt(draw: Draw) -> Made:
    """What was bought in a shop, and the sum."""
    shop, count = draw.company(), draw.whole(3, 7)
    items, cents = draw.some("goods", count), [draw.whole(20, 2000) * 5 for _ in range(count)]
    prices = [f"{draw.style.money}{value / 100:.2f}" for value in cents]
    total = f"{draw.style.money}{sum(cents) / 100:.2f}"
    cashier, date = draw.one("first_names"), draw.date()
    lines = [draw.titled(shop), draw.titled(address := draw.address()), draw.line("Date", date)]
    lines += [
        draw.line(item, price, draw.style.rules and n == 0)
        for n, (item, price) in enumerate(zip(items, prices, strict=True))
    ]
    lines += [draw.line(draw.style.total, total, draw.style.rules), draw.line("Cashier", cashier)]
    fields = {"date": date, draw.style.total.lower(): total, "cashier": cashier, "address": address}
    return lines, Facts(shop, fields, items, {"the price of {}": prices})


def form(draw: Draw) -> Made:
    """Labels with what somebody filled in."""
    title, labels = f"{draw.one('trades')} {draw.one('topics')}", draw.some("fields", draw.whole(4, 8))
    make: list[Callable[[], str]] = [
        draw.person, draw.date, lambda: draw.one("cities"), lambda: str(draw.whole(10, 99999)),
    ]  # fmt: skip
    values = [make[draw.whole(0, 4)]() for _ in labels]
    lines = [draw.titled(title, 1.2)]
    lines += [draw.line(k, v, draw.style.rules) for k, v in zip(labels, values, strict=True)]
    return lines, Facts(title, {k.lower(): v for k, v in zip(labels, values, strict=True)})


def table(draw: Draw) -> Made:
    """Numbers by row and column."""
    names = "cities" if draw.rng.random() < 0.5 else "last_names"
    items, topics = draw.some(names, draw.whole(3, 7)), draw.some("topics", 2)
    columns = {topic: [str(draw.whole(1, 500)) for _ in items] for topic in topics}
    title = f"{draw.one('trades')} {draw.whole(1990, 2030)}"
    lines = [draw.titled(title), Line((Cell(""), Cell(topics[0], 0.66, "right"), Cell(topics[1], 1.0, "right")), True)]
    for n, item in enumerate(items):
        cells = (Cell(item), *(Cell(columns[t][n], x, "right") for t, x in zip(topics, (0.66, 1.0), strict=True)))
        lines.append(Line(cells, draw.style.rules or n == 0))
    return lines, Facts(title, {}, items, {f"the number of {t} for {{}}": values for t, values in columns.items()})


def invoice(draw: Draw) -> Made:
    """A bill from a company to a customer: how many of what."""
    seller, buyer, number, date = draw.company(), draw.person(), str(draw.whole(1000, 99999)), draw.date()
    items = draw.some("goods", draw.whole(2, 5))
    counts, prices = [draw.whole(1, 10) for _ in items], [draw.whole(1, 60) for _ in items]
    amounts = [n * p for n, p in zip(counts, prices, strict=True)]
    lines = [draw.titled(seller, 1.2), draw.line("Invoice", number), draw.line("Date", date), draw.line("To", buyer)]
    lines.append(Line((Cell("Item"), Cell("Quantity", 0.68, "right"), Cell("Amount", 1.0, "right")), True))
    for item, n, amount in zip(items, counts, amounts, strict=True):
        lines.append(Line((Cell(item), Cell(str(n), 0.68, "right"), Cell(str(amount), 1.0, "right"))))
    lines.append(draw.line(draw.style.total, str(sum(amounts)), True))
    fields = {"invoice number": number, "date": date, "customer": buyer, draw.style.total.lower(): str(sum(amounts))}
    columns = {"the quantity of {}": [str(n) for n in counts], "the amount for {}": [str(n) for n in amounts]}
    return lines, Facts(seller, fields, items, columns)


def sign(draw: Draw) -> Made:
    """A few large words, with hours and a number to call."""
    name, hours = draw.company(), f"{draw.whole(6, 12)}:00 - {draw.whole(13, 24)}:00"
    phone, street = str(draw.whole(100000, 999999)), draw.address()
    lines = [draw.titled(name, 1.5), draw.titled(f"Open {hours}", 1.2), draw.titled(street, 1.2)]
    lines += [draw.titled(f"Call {phone}", 1.2)]
    return lines, Facts(name, {"opening hours": hours, "address": street, "phone number": phone})


def paragraph(draw: Draw) -> Made:
    """Sentences about people."""
    names = zip(draw.some("first_names", 3), draw.some("last_names", 3), strict=True)
    people = [f"{first} {last}" for first, last in names]
    cities, trades = draw.some("cities", 3), draw.some("trades", 3)
    fields: dict[str, str] = {}
    words: list[str] = []
    for person, city, trade in zip(people, cities, trades, strict=True):
        age = draw.whole(18, 80)
        words += f"{person} is {age} years old. {person.split()[0]} lives in {city} and works in the {trade}.".split()
        fields |= {f"age of {person}": str(age), f"home town of {person}": city, f"workplace of {person}": trade}
    texts: list[str] = []
    line = ""
    for word in words:
        if len(line) + len(word) > 27:
            texts, line = [*texts, line], ""
        line = f"{line} {word}".strip()
    title = f"{draw.one('topics')} in {draw.whole(1990, 2030)}"
    lines = [draw.titled(title, 1.2), *(Line((Cell(text),)) for text in [*texts, line])]
    return lines, Facts(title, fields)


LAYOUTS: dict[Kind, Callable[[Draw], Made]] = {
    "receipt": receipt, "form": form, "table": table, "invoice": invoice, "sign": sign, "paragraph": paragraph,
}  # fmt: skip
