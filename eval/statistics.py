"""Statistics of rows: bootstrap intervals, accuracies with theirs, and differences on the same rows with theirs.

How far might a figure of a data set be from that of other rows of the same kind?
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from skipit.router.errors import InputError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
_BATCH = 500  # resamples at a time, so that memory stays small


@dataclass(frozen=True)
class Resampling:
    """How uncertainty is estimated.

    Attributes:
        confidence: Level of the bootstrap intervals, in (0, 1).
        resamples: Number of bootstrap resamples and of random orders.
        seed: Seed of both; equal seeds give equal numbers.
    """

    confidence: float = 0.95
    resamples: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise ValueError(
                f"`confidence` is {self.confidence} and `resamples` {self.resamples}, expected a level in (0, 1) and "
                "at least 1. The usual values are 0.95 and 5000."
            )


USUAL = Resampling()


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap (percentile) interval over rows; NaN where there is none."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The fields as a JSON-ready dictionary, None for NaN."""
        return plain(asdict(self))


NOTHING = Interval(math.nan, math.nan, math.nan)


def row_interval(values: ArrayLike, statistic: Statistic | None = None, resampling: Resampling = USUAL) -> Interval:
    """A figure made of means over rows, with its interval from rows drawn with replacement (Efron 1979).

    Figures of the same rows are compared by one statistic of all their columns: rows are then drawn for all of them
    together (paired), and what makes a row hard for both does not blur their difference. Where all rows are alike the
    interval has no width, though other rows might differ: few rows prove little.

    Args:
        values: of shape [rows], or [rows, columns] where the statistic takes several means.
        statistic: of the columns' means of shape [..., columns], to [...]; by default the only column's mean. May be
            NaN where it is undefined, such as a ratio over rows that have none of it.
        resampling: Confidence level, number of resamples and seed; equal seeds draw equal rows.

    Returns:
        The figure of all rows; the interval is NaN with fewer than two rows or where no resample has a value.

    Raises:
        InputError: `values` has another number of axes, or several columns and no statistic.

    Example:
        >>> found = row_interval([1.0, 0.0, 1.0, 1.0])
        >>> found.value, found.low, found.high
        (0.75, 0.25, 1.0)
        >>> row_interval([[1.0, 2.0], [3.0, 6.0]], lambda means: means[..., 0] / means[..., 1])
        Interval(value=0.5, low=0.5, high=0.5)
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or (statistic is None and table.shape[1] != 1):
        raise InputError(
            f"`values`: got shape {np.shape(values)} and {'no' if statistic is None else 'a'} statistic, expected "
            "[rows], or [rows, columns] with a statistic of the columns' means. Give one value per row and column."
        )
    rows = len(table)
    if rows == 0:
        return NOTHING
    of_means = (lambda means: means[..., 0]) if statistic is None else statistic
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(of_means(table.mean(axis=0)))
        if rows < 2 or math.isnan(value):
            return Interval(value, math.nan, math.nan)
        rng = np.random.default_rng(resampling.seed)
        drawn = []
        for start in range(0, resampling.resamples, _BATCH):
            size = min(_BATCH, resampling.resamples - start)
            times = rng.multinomial(rows, np.full(rows, 1 / rows), size=size)
            drawn.append(of_means(times @ table / rows))
    found = np.concatenate(drawn)
    found = found[~np.isnan(found)]
    tails = (1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2
    low, high = np.quantile(found, tails) if found.size else (math.nan, math.nan)
    return Interval(value, float(low), float(high))


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


def or_none(value: Any) -> Any:
    """The value, or None for NaN, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON can have it, None for NaN."""
    return {name: or_none(value) for name, value in values.items()}
