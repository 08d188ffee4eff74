"""Do learned skip rates follow the theory? Rank correlation, separation and overlap, with intervals and p-values.

A unit is one (layer, modality). In every table a small value means redundant, as for all measures of `skipit.theory`:
a router that follows the theory has a *negative* Spearman correlation, an AUROC and an overlap above chance.
Units are few and neighbouring layers alike, so three precautions come with every number: a bootstrap interval over
units, a permutation p-value, and a second p-value (`p_shift`, ours) that keeps neighbours together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import permutation_test, rankdata

from skipit.eval.statistics import ROUNDING, USUAL, Figures, Floats, Interval, Resampling, bootstrap, correlation
from skipit.router import MODALITIES
from skipit.router.errors import short

Scope = Literal["text", "vision", "all"]
Given = Literal["depth", "depth_curve", "depth_modality"]

SCOPES: tuple[Scope, ...] = ("text", "vision", "all")
# Each with the degrees of freedom it takes.
CONFOUNDERS: dict[Given, int] = {"depth": 1, "depth_curve": 2, "depth_modality": 2}
FEWEST_UNITS = 4
# Up to 8! = 40,320 orders are tried one by one: the p-value is then exact.
MOST_UNITS_EXACT = 8

Orders = NDArray[np.int64]
Statistic = Callable[[Orders], Floats]


@dataclass(frozen=True)
class Estimate(Interval):
    """A number over units, its bootstrap interval over them, and what chance would give; NaN if there is a `reason`.

    Attributes:
        chance: The mean over random orders of the units: about 0 for a correlation, 0.5 for an AUROC.
        p: Two-sided p-value under random orders of the units. It takes neighbouring layers for independent: on smooth
            unrelated profiles it falls below 0.05 in up to half of all cases, so read `p_shift` beside it.
        p_exact: Whether `p` comes from all orders instead of random ones.
        p_shift: Two-sided p-value under all cyclic shifts and reflections of the depth axis, both modalities moved
            together. At least 1 / (2 layers); NaN if a unit of the scope has no value.
        units: How many units had a value in both tables.
        reason: Why there is no value; empty if there is one.
    """

    chance: float
    p: float
    p_exact: bool
    p_shift: float
    units: int
    reason: str = ""


@dataclass(frozen=True)
class TableTracking(Figures):
    """How the learned skip rates of one scope follow one table.

    Attributes:
        spearman: Rank correlation with the table, in [-1, 1].
        given: The same with a confounder removed from both sides: "depth" (monotone), "depth_curve" (monotone and
            U-shaped) and, over all units, "depth_modality".
        overlap: Jaccard index of the most skipped and the most redundant units, in [0, 1].
    """

    spearman: Estimate
    given: Mapping[str, Estimate]
    overlap: Estimate


@dataclass(frozen=True)
class Tracking(Figures):
    """How learned skip rates follow the theory, by table and scope ("text", "vision", "all").

    Attributes:
        tables: For each table and scope, correlation and overlap.
        theory_set: For each scope, the AUROC of the skip rates for the theory's skip set; empty if none was given.
        resampling: How the uncertainty was estimated.
    """

    tables: Mapping[str, Mapping[str, TableTracking]]
    theory_set: Mapping[str, Estimate]
    resampling: Resampling


def track(
    skip_rate: ArrayLike,
    tables: Mapping[str, ArrayLike],
    theory_set: ArrayLike | None = None,
    *,
    k: int | None = None,
    resampling: Resampling = USUAL,
) -> Tracking:
    """Compare learned skip rates with every table of the theory, per modality and over all units.

    Args:
        skip_rate: Learned skip rates of shape [layers, 2] in [0, 1], columns text and vision; NaN where no tokens.
        tables: Measures of shape [layers, 2] by name, small where redundant; NaN where there is no value.
        theory_set: Whether the theory skips a unit, bool of shape [layers, 2].
        k: Units in the overlap, per scope; by default as many as the router skips, the rounded sum of its rates.
        resampling: Confidence level, number of resamples and seed.

    Returns:
        The estimates. A table that allows none has NaN and a reason.

    Raises:
        ValueError: If a shape or a rate is out of range.

    Example:
        >>> rates = [[0.1, 0.9], [0.0, 0.2], [0.3, 0.6], [0.4, 0.8]]
        >>> damage = [[5.0, 0.2], [9.0, 4.0], [0.7, 0.3], [0.6, 0.1]]
        >>> tracking = track(rates, {"damage": damage})
        >>> round(tracking.tables["damage"]["all"].spearman.value, 3)
        -0.976
    """
    by_table: dict[str, dict[str, TableTracking]] = {}
    for name, table in tables.items():
        by_table[name] = {}
        for scope in SCOPES:
            # Within one modality there is no modality to remove.
            controls = [given for given in CONFOUNDERS if scope == "all" or given != "depth_modality"]
            by_table[name][scope] = TableTracking(
                spearman(skip_rate, table, scope, resampling=resampling),
                {given: spearman(skip_rate, table, scope, given=given, resampling=resampling) for given in controls},
                overlap(skip_rate, table, scope, k=k, resampling=resampling),
            )
    separations: dict[str, Estimate] = {}
    if theory_set is not None:
        separations = {scope: auroc(skip_rate, theory_set, scope, resampling=resampling) for scope in SCOPES}
    return Tracking(by_table, separations, resampling)


def spearman(
    skip_rate: ArrayLike,
    table: ArrayLike,
    scope: Scope = "all",
    *,
    given: Given | None = None,
    resampling: Resampling = USUAL,
) -> Estimate:
    """The rank correlation of skip rates with a table over units, plain or with a confounder removed.

    With `given`, the ranks of both sides are regressed on the confounder and the residuals correlated; the p-value
    permutes residuals (Freedman and Lane 1983). "depth" is the rank of the layer; "depth_curve" adds its square, since
    a U-shaped profile (redundant early and late) has no monotone part; "depth_modality" is depth and the modality.

    Args:
        skip_rate: Learned skip rates of shape [layers, 2] in [0, 1]; NaN where no tokens.
        table: A measure of shape [layers, 2]; NaN where there is no value.
        scope: The units that count: "text", "vision" or "all".
        given: The confounder to remove.
        resampling: Confidence level, number of resamples and seed.

    Returns:
        The correlation in [-1, 1], negative if redundant units are skipped.

    Raises:
        ValueError: If a shape, a rate, `scope` or `given` is not as described.

    Example:
        >>> rates = [[0.1, 0.9], [0.2, 0.6], [0.3, 0.2], [0.4, 0.4]]
        >>> estimate = spearman(rates, [[4.0, 1.0], [3.0, 2.0], [2.0, 4.0], [1.0, 3.0]], "text")
        >>> round(estimate.value, 3), round(estimate.p, 3), estimate.p_exact
        (-1.0, 0.083, True)
    """
    units = _Units.of(skip_rate, table, scope)
    if given is not None and given not in CONFOUNDERS:
        raise ValueError(f"`given` is {short(given)}, expected one of {list(CONFOUNDERS)} or None.")
    if reason := units.missing(FEWEST_UNITS + (CONFOUNDERS[given] if given else 0)):
        return units.undefined(reason)
    everything = np.arange(units.count)

    def residuals(values: Floats, index: Orders) -> Floats:
        return _residual(rankdata(values[index], axis=-1), units.confounder(given, index))

    rates, values = residuals(units.rates, everything), residuals(units.values, everything)
    for name, residual in (("`skip_rate`", rates), ("`table`", values)):
        if np.linalg.norm(residual) < ROUNDING:
            return units.undefined(f"{name} is a function of {given} alone")
    return units.estimate(
        resampled=lambda index: correlation(residuals(units.rates, index), residuals(units.values, index)),
        reordered=lambda order: correlation(rates, _residual(values[order], units.confounder(given, everything))),
        resampling=resampling,
    )


def auroc(
    skip_rate: ArrayLike,
    theory_set: ArrayLike,
    scope: Scope = "all",
    *,
    resampling: Resampling = USUAL,
) -> Estimate:
    """How well skip rates separate the theory's skip set: P(a unit of the set is skipped more than one outside).

    Args:
        skip_rate: Learned skip rates of shape [layers, 2] in [0, 1]; NaN where no tokens.
        theory_set: Whether the theory skips a unit, bool of shape [layers, 2].
        scope: The units that count: "text", "vision" or "all".
        resampling: Confidence level, number of resamples and seed.

    Returns:
        The AUROC in [0, 1], 0.5 by chance; equal rates count half.

    Raises:
        ValueError: If a shape, a rate or a label is out of range.

    Example:
        >>> rates = [[0.1, 0.9], [0.3, 0.2], [0.4, 0.8]]
        >>> auroc(rates, [[False, True], [False, False], [True, True]]).value
        1.0
    """
    labels = np.asarray(theory_set)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"`theory_set` holds {np.unique(labels).tolist()[:5]}, expected True (skipped) or False. "
            "Threshold the table first."
        )
    units = _Units.of(skip_rate, labels, scope)
    if reason := units.missing(FEWEST_UNITS, second="theory_set"):
        return units.undefined(reason)

    def separation(rates: Floats, members: Floats) -> Floats:
        inside = members.sum(axis=-1)
        # The Mann-Whitney statistic, as a share of all pairs of a unit inside and one outside.
        wins = (rankdata(rates, axis=-1) * members).sum(axis=-1) - inside * (inside + 1) / 2
        pairs = inside * (members.shape[-1] - inside)
        return np.where(pairs > 0, wins / np.maximum(pairs, 1), math.nan)

    return units.estimate(
        resampled=lambda index: separation(units.rates[index], units.values[index]),
        reordered=lambda order: separation(units.rates, units.values[order]),
        resampling=resampling,
    )


def overlap(
    skip_rate: ArrayLike,
    table: ArrayLike,
    scope: Scope = "all",
    *,
    k: int | None = None,
    resampling: Resampling = USUAL,
) -> Estimate:
    """The Jaccard index of the k most skipped units and the k with the smallest values in a table.

    Units that tie for the last places share them evenly, so the order of layers never decides.

    Args:
        skip_rate: Learned skip rates of shape [layers, 2] in [0, 1]; NaN where no tokens.
        table: A measure of shape [layers, 2], small where redundant; NaN where there is no value.
        scope: The units that count: "text", "vision" or "all".
        k: Size of both sets, from 1 to one less than the units; by default the rounded sum of the skip rates.
        resampling: Confidence level, number of resamples and seed.

    Returns:
        The index in [0, 1]; about k / (2 units - k) by chance.

    Raises:
        ValueError: If a shape, a rate or `k` is out of range.

    Example:
        >>> rates = [[0.1, 0.9], [0.2, 0.3], [0.3, 0.8]]
        >>> overlap(rates, [[5.0, 0.1], [4.0, 0.2], [3.0, 0.3]], k=2).value
        0.3333333333333333
    """
    units = _Units.of(skip_rate, table, scope)
    if k is not None and k < 1:
        raise ValueError(f"`k` is {k}, expected a positive number of units. Leave it out to use the router's own.")
    if reason := units.missing(FEWEST_UNITS):
        return units.undefined(reason)
    size = max(1, min(round(units.rates.sum()), units.count - 1)) if k is None else k
    if size >= units.count:
        return units.undefined(f"k = {size} of {units.count} units leaves nothing to choose")

    def shared(rates: Floats, values: Floats) -> Floats:
        ours, theirs = _membership(rates, size), _membership(-values, size)
        return np.asarray(np.minimum(ours, theirs).sum(axis=-1) / np.maximum(ours, theirs).sum(axis=-1))

    return units.estimate(
        resampled=lambda index: shared(units.rates[index], units.values[index]),
        reordered=lambda order: shared(units.rates, units.values[order]),
        resampling=resampling,
    )


@dataclass(frozen=True)
class _Units:
    """The units of a scope that have a value in both tables, as flat arrays in the order of depth."""

    rates: Floats
    values: Floats
    layer: Orders
    modality: Orders
    shifts: Orders

    @classmethod
    def of(cls, skip_rate: ArrayLike, table: ArrayLike, scope: Scope) -> "_Units":
        rates, values = np.asarray(skip_rate, dtype=np.float64), np.asarray(table, dtype=np.float64)
        if rates.ndim != 2 or rates.shape[1] != len(MODALITIES) or values.shape != rates.shape:
            raise ValueError(
                f"`skip_rate` has shape {rates.shape} and the table {values.shape}, expected [layers, 2] for both "
                "(columns text and vision). Put NaN where a unit has no tokens."
            )
        if np.any((rates < 0) | (rates > 1)):
            raise ValueError(
                f"`skip_rate` goes from {np.nanmin(rates)} to {np.nanmax(rates)}, expected shares in [0, 1]. "
                "Pass skip rates, not run rates, logits or percent."
            )
        if scope not in SCOPES:
            raise ValueError(f"`scope` is {short(scope)}, expected one of {list(SCOPES)}. Choose the units that count.")
        columns = [0, 1] if scope == "all" else [MODALITIES.index(scope)]
        layer, modality = (part.ravel() for part in np.meshgrid(np.arange(len(rates)), columns, indexing="ij"))
        rates, values = rates[layer, modality], values[layer, modality]
        there = ~np.isnan(rates) & ~np.isnan(values)
        # A shift needs the whole depth axis.
        complete = bool(there.size and there.all())
        shifts = _shifts(len(layer) // len(columns) if complete else 0, len(columns))
        return cls(rates[there], values[there], layer[there], modality[there], shifts)

    @property
    def count(self) -> int:
        return len(self.rates)

    def missing(self, needed: int, second: str = "table") -> str:
        """Why there is no estimate; empty if there is one."""
        if self.count < needed:
            return f"{self.count} units have a value, at least {needed} are needed"
        for name, values in (("skip_rate", self.rates), (second, self.values)):
            if (values == values[0]).all():
                return f"`{name}` is {values[0]:g} for all {self.count} units"
        return ""

    def undefined(self, reason: str) -> Estimate:
        nan = math.nan
        return Estimate(nan, nan, nan, nan, nan, False, nan, self.count, reason)

    def confounder(self, given: Given | None, index: Orders) -> list[Floats]:
        if given is None:
            return []
        depth = rankdata(self.layer[index], axis=-1)
        if given == "depth":
            return [depth]
        if given == "depth_curve":
            return [depth, (depth - depth.mean(axis=-1, keepdims=True)) ** 2]
        return [depth, self.modality[index].astype(np.float64)]

    def estimate(self, resampled: Statistic, reordered: Statistic, resampling: Resampling) -> Estimate:
        """The value, its interval from resampled units and its p-values from reordered ones.

        Both statistics take indices of units, since a unit's rate, value, layer and modality stay together.
        """
        rng = np.random.default_rng(resampling.seed)
        low, high = bootstrap(lambda size: resampled(rng.integers(self.count, size=(size, self.count))), resampling)
        exact = self.count <= MOST_UNITS_EXACT
        test = permutation_test(
            (np.arange(self.count),),
            lambda order, axis: reordered(order),
            permutation_type="pairings",
            n_resamples=math.factorial(self.count) if exact else resampling.resamples,
            batch=1000,
            vectorized=True,
            rng=rng,
        )
        value, chance = float(test.statistic), float(test.null_distribution.mean())
        p_shift = math.nan
        if self.shifts.size:
            shifted = reordered(self.shifts)
            # Two-sided as distance from the middle; the margin makes values equal that are equal but for rounding.
            p_shift = float((abs(shifted - shifted.mean()) >= abs(value - shifted.mean()) - 1e-12).mean())
        return Estimate(value, low, high, chance, float(test.pvalue), exact, p_shift, self.count)


def _shifts(layers: int, columns: int) -> Orders:
    """All cyclic shifts of the depth axis, and those of its reflection, as orders of the units."""
    units = np.arange(layers * columns).reshape(layers, columns)
    shifted = [np.roll(way, by, axis=0).ravel() for way in (units, units[::-1]) for by in range(layers)]
    return np.array(shifted, dtype=np.int64)


def _membership(values: Floats, size: int) -> Floats:
    """How far each unit belongs to the `size` largest along the last axis: 1, 0, or a share of the places tied for."""
    last = np.partition(values, -size, axis=-1)[..., -size, None]
    above, tied = values > last, values == last
    places = size - above.sum(axis=-1, keepdims=True)
    return np.asarray(above + tied * places / tied.sum(axis=-1, keepdims=True))


def _residual(values: Floats, confounders: list[Floats]) -> Floats:
    """What is left of values along the last axis once their mean and the confounders are projected out."""
    rest = values - values.mean(axis=-1, keepdims=True)
    for done, confounder in enumerate(confounders):
        # Gram-Schmidt: each confounder loses the earlier ones before it is removed from the values.
        direction = _residual(confounder, confounders[:done])
        length = np.linalg.norm(direction, axis=-1, keepdims=True)
        # In a resample a confounder can be constant: it then removes nothing.
        direction = np.where(length > ROUNDING, direction, 0.0) / np.maximum(length, ROUNDING)
        rest = rest - (rest * direction).sum(axis=-1, keepdims=True) * direction
    return rest
