"""How well the theory predicts what skipping does: measures of a profile against controlled skipping.

A unit is one (layer, modality). Tables are [layers, 2], columns text and vision, NaN where a measure says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from skipit.eval.statistics import Floats, Interval, Resampling, bootstrap, centred_ranks, correlation, spearman
from skipit.theory.bounds import combine_damages

SCOPES = ("text", "vision", "all")
FEWEST = 3
FEW = Resampling(resamples=2000)


@dataclass(frozen=True)
class RankCorrelation(Interval):
    """Spearman's correlation over units with a percentile bootstrap interval; NaN with fewer than three units."""

    units: int


def rank_correlation(predicted: ArrayLike, measured: ArrayLike, resampling: Resampling = FEW) -> RankCorrelation:
    """Compare a prediction with its measurement over the units where both have a value.

    The interval comes from resampling units. Rows are another source of error, which it does not see.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.3]).value
        0.8
    """
    x, y = np.asarray(predicted, dtype=np.float64).ravel(), np.asarray(measured, dtype=np.float64).ravel()
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) < FEWEST:
        return RankCorrelation(np.nan, np.nan, np.nan, len(x))
    rng = np.random.default_rng(resampling.seed)

    def draw(size: int) -> Floats:
        index = rng.integers(len(x), size=(size, len(x)))
        return correlation(centred_ranks(x[index]), centred_ranks(y[index]))

    return RankCorrelation(round(spearman(x, y), 6), *bootstrap(draw, resampling), len(x))


def by_scope(predicted: ArrayLike, measured: ArrayLike) -> dict[str, RankCorrelation]:
    """The rank correlation over text units, vision units and all."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    columns = {"text": x[:, 0], "vision": x[:, 1], "all": x}
    truth = {"text": y[:, 0], "vision": y[:, 1], "all": y}
    return {scope: rank_correlation(columns[scope], truth[scope]) for scope in SCOPES}


def plan_without(units: Sequence[int], layers: int) -> Bool[Tensor, "layers modality"]:
    """The plan (True runs) that skips some units, each as layer * 2 + modality."""
    plan = torch.ones(layers * 2, dtype=torch.bool)
    plan[list(units)] = False
    return plan.view(layers, 2)


def set_damages(
    damage: Float[Tensor, "layers modality"], plans: Sequence[Bool[Tensor, "layers modality"]]
) -> dict[str, Float[Tensor, " plans"]]:
    """Predicted damage of plans from the damages of their units (statement 10).

    Returns:
        `sum`, right when changes are uncorrelated, and `aligned`, (sum of sqrt D)^2: at most that, to second order.
    """
    skipped = [damage.double()[~plan & damage.isfinite()] for plan in plans]
    aligned = [combine_damages(chosen) for chosen in skipped]
    return {"sum": torch.stack([chosen.sum() for chosen in skipped]), "aligned": torch.stack(aligned)}
