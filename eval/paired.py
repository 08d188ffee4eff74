"""Accuracy with an interval, and its change on the same rows: intervals that equal answers do not shrink."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from .intervals import Interval


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the second model minus that of the first.

    Attributes:
        value: the difference, in [-1, 1].
        low: lower end of its interval.
        high: upper end of it.
        p: two-sided; could as many rows have changed in one direction by chance?
        lost: rows that the first answers right and the second does not.
        gained: the other way round.
        rows: how many.
    """

    value: float
    low: float
    high: float
    p: float
    lost: int
    gained: int
    rows: int

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Compare two models on the same rows.

    The interval is Agresti and Min's (2005): Wald's after adding half a row to each of the four outcomes. Unlike a
    bootstrap it does not shrink to nothing when no row changed: few rows prove little.

    Args:
        first: whether the first model answers each row right.
        second: whether the second does.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: If there are no rows or their numbers differ.

    Example:
        >>> found = paired_difference([True, True, False, True], [True, False, False, True])
        >>> found.value, round(found.low, 2), round(found.high, 2), found.p
        (-0.25, -0.61, 0.28, 1.0)
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"`first` has {len(first)} rows and `second` {len(second)}, expected as many, and at least one. "
            "Answer the same rows with both models."
        )
    before, after = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    lost, gained, rows = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    more_lost, more_gained, more = lost + 0.5, gained + 0.5, rows + 2
    middle = (more_gained - more_lost) / more
    error = math.sqrt(more_lost + more_gained - (more_gained - more_lost) ** 2 / more) / more
    reach = float(norm.ppf((1 + confidence) / 2)) * error
    p = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    return PairedDifference((gained - lost) / rows, low, high, float(p), lost, gained, rows)


def proportion(share: float, rows: int, confidence: float = 0.95) -> Interval:
    """An accuracy with Wilson's interval (1927), which has a width also where all rows are right, or none.

    Args:
        share: of rows that are right, in [0, 1].
        rows: how many.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> found = proportion(1.0, 16)
        >>> round(found.low, 2), found.high
        (0.81, 1.0)
    """
    if not 0 <= share <= 1 or rows < 1:
        raise ValueError(
            f"`share` is {share} of {rows} rows, expected one in [0, 1] of at least one row. Pass a share."
        )
    found = binomtest(round(share * rows), rows).proportion_ci(confidence, method="wilson")
    return Interval(share, float(found.low), float(found.high))
