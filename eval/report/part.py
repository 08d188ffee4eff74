"""What a report consists of: parts with a verdict each, or what to run to get one; and how numbers are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from textwrap import shorten
from typing import Any

from .page import Content, Html, code, joined, strong

NOTHING = "\N{EN DASH}"
SCOPES = {"all": "all units", "text": "text units", "vision": "vision units"}

Values = Mapping[str, Any]  # what eval.json holds


@dataclass(frozen=True)
class Part:
    """A section of the report.

    Attributes:
        name: id of the section.
        title: its heading.
        verdict: what it says in plain sentences, for the summary.
        body: what stands in it.
        made: names of what its numbers were made by, keys of `values["made"]`.
    """

    name: str
    title: str
    verdict: Sequence[Html]
    body: Sequence[Html]
    made: Sequence[str] = ("eval",)


@dataclass(frozen=True)
class Missing:
    """A section that is not there.

    Attributes:
        title: its heading.
        how: what to run to get it.
    """

    title: str
    how: Content


def again(values: Values, options: str, first: str = "") -> Html:
    """What to run to get a missing part: another command before, and this one again with more options."""
    settings = values["settings"]
    line = f"skipit eval {quote(settings['checkpoint'])} {quote(settings['data'])} {options} --out DIR"
    return joined(["run ", *([code(first), ", then "] if first else []), code(line), "."])


def verdict(word: str) -> Html:
    """Whether something was "found", in words that carry it."""
    return strong(word, {"found": "good", "not found": "bad"}.get(word, ""))


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent, or a dash."""
    return NOTHING if _none(share) else f"{share:.{digits}%}"


def points(share: float | None, digits: int = 1) -> str:
    """A difference of shares in points of a hundred, with its sign, or a dash.

    Example:
        >>> points(0.0123), points(0.0)
        ('+1.2', '0.0')
    """
    return NOTHING if _none(share) else number(100 * share, f"+.{digits}f")  # type: ignore[operator]


def number(value: float | None, style: str = ".2f") -> str:
    """A number as a format says, with a real minus and no signed zero, or a dash.

    Example:
        >>> number(0.5), number(-0.0, "+.1f"), number(-1.0) == "\N{MINUS SIGN}1.00"
        ('0.50', '0.0', True)
    """
    if value is None or _none(value):
        return NOTHING
    text = format(value, style)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def between(values: Mapping[str, Any], style: str = "+.2f", scale: float = 1.0) -> str:
    """An estimate with its interval: keys `value`, `low`, `high`."""
    value, low, high = (None if _none(values[k]) else scale * values[k] for k in ("value", "low", "high"))
    if value is None:
        return NOTHING
    if low is None or high is None:
        return number(value, style)
    return f"{number(value, style)} [{number(low, style)}, {number(high, style)}]"


def p_value(p: float | None) -> str:
    """A p-value.

    Example:
        >>> p_value(0.0002), p_value(0.04)
        ('<0.001', '0.040')
    """
    return NOTHING if p is None or _none(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, what: str) -> str:
    """A number of things.

    Example:
        >>> plural(1, "row"), plural(3, "row")
        ('1 row', '3 rows')
    """
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def label(text: str) -> str:
    """A name from elsewhere as a figure can show it: short, and a dollar is a dollar, not the start of a formula."""
    return shorten(text, 40, placeholder=" ...").replace("$", r"\$")


def _none(value: float | None) -> bool:
    return value is None or math.isnan(value)
