"""Does skipping make a model less honest about what it knows? Calibration of two models on the same rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from skipit.eval.measure.recorded import Recorded
from skipit.eval.metrics.confidence import confidence_bins
from skipit.eval.statistics import USUAL, Figures, Floats, Interval, Resampling, bootstrap, row_interval, side
from skipit.router import InputError
from skipit.router.errors import short

Kind = Literal["product", "mean"]
Verdict = Literal["worse", "better", "no difference shown"]


@dataclass(frozen=True)
class Reliability(Figures):
    """How one model's confidence matches its accuracy.

    Attributes:
        accuracy: share of right answers.
        confidence: mean.
        error: expected calibration error. Few rows make it, and its interval, larger by chance alone.
        brier: mean squared distance of confidence and outcome (Brier 1950), in [0, 1]; it counts what the model knows
            as well as how honest it is, and chance does not make it larger.
        bins: of each bin of confidence, number of answers, mean confidence and accuracy; NaN for an empty bin.
    """

    accuracy: Interval
    confidence: Interval
    error: Interval
    brier: Interval
    bins: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class ReliabilityChange(Figures):
    """Calibration of a gated model beside that of the dense one.

    Attributes:
        kind: confidence in an answer: the "product" of its tokens' probabilities, or their geometric "mean".
        rows: how many.
        dense: of the dense model.
        gated: of the gated model.
        error_change: gated minus dense, with a paired interval over rows.
        by_chance: where it would lie if the confidences of both were exactly right (consistency resampling, Bröcker and
            Smith 2007): of few rows a less confident model has more error by chance alone.
        brier_change: the same of the Brier score.
        resampling: how the uncertainty was estimated.
    """

    derived = ("verdict",)

    kind: Kind
    rows: int
    dense: Reliability
    gated: Reliability
    error_change: Interval
    by_chance: tuple[float, float]
    brier_change: Interval
    resampling: Resampling

    @property
    def verdict(self) -> Verdict:
        """Whether skipping changed the calibration error beyond its interval and beyond chance."""
        where, change = side(self.error_change, self.rows), self.error_change.value
        if where > 0 and change > self.by_chance[1]:
            return "worse"
        return "better" if where < 0 and change < self.by_chance[0] else "no difference shown"


def compare_confidence(
    dense: Recorded, gated: Recorded, kind: Kind = "product", bins: int = 10, resampling: Resampling = USUAL
) -> ReliabilityChange:
    """Compare how two models' confidence in their greedy answers matches how often these are right.

    Args:
        dense: what the dense model did with some rows.
        gated: what the gated model did with the same rows, in the same order.
        kind: "product", the probability of the whole answer, which is what exact match asks about; or "mean", the
            geometric mean over its tokens.
        bins: equal bins of confidence.
        resampling: of rows; those of both models are drawn together.

    Raises:
        InputError: the two have different numbers of rows, or an unknown kind.
    """
    if kind not in ("product", "mean"):
        raise InputError(f"`kind`: got {short(kind)}, expected 'product' or 'mean'.")
    if len(dense.right) != len(gated.right):
        raise InputError(
            f"`dense` and `gated`: got {len(dense.right)} and {len(gated.right)} rows, expected the same rows for "
            "both. Record both models on one data set."
        )
    tables = [_columns(recorded, kind, bins) for recorded in (dense, gated)]
    both = np.concatenate(tables, -1)
    width = tables[0].shape[1]

    def change(of: slice, figure: Any) -> Interval:
        return row_interval(
            both, lambda means: figure(means[..., width:][..., of]) - figure(means[..., :width][..., of]), resampling
        )

    return ReliabilityChange(
        kind,
        len(dense.right),
        _reliability(tables[0], bins, resampling),
        _reliability(tables[1], bins, resampling),
        change(slice(3, None), _error),
        _by_chance(tables, bins, resampling),
        change(slice(2, 3), lambda means: means[..., 0]),
        resampling,
    )


def _columns(recorded: Recorded, kind: Kind, bins: int) -> Floats:
    """Of every row: right, confidence, squared distance, and confidence minus right in the place of its bin."""
    confidence: Float[Tensor, " rows"] = getattr(recorded, kind).clamp(0, 1)
    right = recorded.right.double()
    gap = torch.zeros(len(right), bins, dtype=torch.float64)
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap[torch.arange(len(right)), index] = confidence - right
    table = torch.cat([right[:, None], confidence[:, None], (confidence - right).square()[:, None], gap], -1)
    return np.asarray(table.numpy(), np.float64)


def _by_chance(tables: Sequence[Floats], bins: int, resampling: Resampling) -> tuple[float, float]:
    rng = np.random.default_rng(resampling.seed)

    def error(confidence: Floats, size: int) -> Floats:
        bin_of = np.eye(bins)[np.minimum((confidence * bins).astype(int), bins - 1)]
        right = rng.random((size, len(confidence))) < confidence
        return _error((confidence - right) @ bin_of / len(confidence))

    dense, gated = (table[:, 1] for table in tables)
    return bootstrap(lambda size: error(gated, size) - error(dense, size), resampling)


def _error(means: Floats) -> Floats:
    """Expected calibration error: mean gaps of bins are those of all rows, so that they only have to be added."""
    return np.asarray(np.abs(means).sum(-1))


def _reliability(table: Floats, bins: int, resampling: Resampling) -> Reliability:
    sums = confidence_bins(torch.from_numpy(table[:, 1]), torch.from_numpy(table[:, 0]).bool(), bins)
    shown = []
    for number, confidence, right in zip(*(column.tolist() for column in sums), strict=True):
        shown.append((number, confidence / number, right / number) if number else (0, math.nan, math.nan))
    figures = [row_interval(table[:, at], None, resampling) for at in range(3)]
    error = row_interval(table[:, 3:], _error, resampling)
    return Reliability(figures[0], figures[1], error, figures[2], tuple(shown))
