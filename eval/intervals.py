"""Bootstrap intervals over rows: how far a figure of a data set might be from that of other rows of the same kind."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skipit.router.errors import InputError

from .tracking import USUAL, Resampling, plain

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
_BATCH = 500  # resamples at a time, so that memory stays small


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
