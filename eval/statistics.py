"""Statistics of rows and units: bootstrap intervals, accuracies, differences on the same rows, rank correlation.

How far might a figure of a data set be from that of other rows of the same kind?
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm, rankdata
from torch import Tensor

from skipit.router.errors import InputError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
BATCH = 500  # resamples at a time, so that memory stays small
# Ranks are at least a half apart: a vector of ranks this short is zero but for rounding.
ROUNDING = 1e-6
LEVEL = 0.05  # a p-value below is called evidence
FEWEST = 6  # rows: that all of five fall on one side has probability 2 / 2^5 by chance, more than the level


class Figures:
    """What was measured: a dataclass whose fields JSON can hold, together with the properties named in `derived`."""

    derived: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as a JSON-ready dictionary, verdicts included, None for NaN."""
        told = vars(self) | {name: getattr(self, name) for name in self.derived}
        return {name: plain(value) for name, value in told.items()}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: figures as objects, tensors and tuples as lists, NaN as None."""
    match value:
        case Figures():
            return value.to_json()
        case Mapping():
            return {name: plain(one) for name, one in value.items()}
        case tuple() | list():
            return [plain(one) for one in value]
        case Tensor():
            return plain(value.tolist())
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Resampling(Figures):
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
class Interval(Figures):
    """A figure and both ends of its interval, such as a bootstrap (percentile) one over rows; NaN where none is."""

    value: float
    low: float
    high: float


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def side(interval: Interval, rows: int) -> int:
    """On which side of zero an interval over rows lies: 1 or -1; 0 if it holds zero, is none, or is of too few rows.

    Example:
        >>> side(Interval(0.3, 0.1, 0.5), 40), side(Interval(-0.3, -0.5, -0.1), 40), side(Interval(0.3, -0.1, 0.5), 40)
        (1, -1, 0)
    """
    return 0 if rows < FEWEST else int(interval.low > 0) - int(interval.high < 0)


def beyond_chance(p: Mapping[str, float | None], level: float = LEVEL) -> list[str]:
    """Which of several tests are evidence, clearest first: the more are looked at, the clearer one must be.

    Holm (1979): with probability 1 - `level` none is named where nothing but chance is at work.

    Args:
        p: by name; None where a test was not possible.
        level: of all together.

    Example:
        >>> beyond_chance({"colour": 0.04, "shape": 0.3, "count": 0.001, "place": None})
        ['count']
    """
    known = sorted((value, name) for name, value in p.items() if value is not None and not math.isnan(value))
    first = next((at for at, (value, _) in enumerate(known) if value >= level / (len(known) - at)), len(known))
    return [name for _, name in known[:first]]


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
        return UNDEFINED
    of_means = (lambda means: means[..., 0]) if statistic is None else statistic
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(of_means(table.mean(axis=0)))
        if rows < 2 or math.isnan(value):
            return Interval(value, math.nan, math.nan)
        rng, alike = np.random.default_rng(resampling.seed), np.full(rows, 1 / rows)
        low, high = bootstrap(lambda size: of_means(rng.multinomial(rows, alike, size=size) @ table / rows), resampling)
    return Interval(value, low, high)


def bootstrap(draw: Callable[[int], Floats], resampling: Resampling = USUAL) -> tuple[float, float]:
    """The percentile interval of a statistic over resamples (Efron 1979).

    Args:
        draw: the statistic of as many new resamples as it is asked for. A NaN says nothing about the interval, such as
            the correlation of a resample that holds one value only, and does not count.
        resampling: Confidence level and number of resamples.

    Returns:
        Both ends; NaN where no resample has a value.
    """
    starts = range(0, resampling.resamples, BATCH)
    drawn = np.concatenate([draw(min(BATCH, resampling.resamples - start)) for start in starts])
    drawn = drawn[~np.isnan(drawn)]
    tails = (1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2
    low, high = np.quantile(drawn, tails) if drawn.size else (math.nan, math.nan)
    return float(low), float(high)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of the pairs in which both values are finite; NaN where it does not exist.

    Example:
        >>> spearman([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.3])
        0.8
        >>> spearman([1.0, 1.0, 1.0], [0.1, 0.2, 0.4])
        nan
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    return float(correlation(centred_ranks(x[both]), centred_ranks(y[both])))


def centred_ranks(values: ArrayLike) -> Floats:
    """Ranks along the last axis minus their mean; equal values share theirs."""
    ranks = rankdata(values, axis=-1)
    return np.asarray(ranks - (ranks.shape[-1] + 1) / 2)


def correlation(first: Floats, second: Floats) -> Floats:
    """The cosine along the last axis of two centred vectors, such as ranks; NaN where one is constant."""
    scale, other = np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-1)
    defined = (scale > ROUNDING) & (other > ROUNDING)
    cosine = (first * second).sum(axis=-1) / np.where(defined, scale * other, 1.0)
    return np.where(defined, np.clip(cosine, -1.0, 1.0), math.nan)


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Accuracy of the second model minus that of the first, in [-1, 1].

    Attributes:
        p: two-sided; could as many rows have changed in one direction by chance?
        lost: rows that the first answers right and the second does not.
        gained: the other way round.
        rows: how many.
    """

    p: float
    lost: int
    gained: int
    rows: int


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
    wilson = binomtest(round(share * rows), rows).proportion_ci(confidence, method="wilson")
    return Interval(share, float(wilson.low), float(wilson.high))
