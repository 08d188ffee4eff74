"""Does the router spend more on hard inputs? Executed FLOPs by group of rows, difficulty of a row and kind of token.

Rows differ in length and in how much of them is image, so that even a router that decides nothing per input spends
different shares on them. What counts here is the excess (ours): executed FLOPs minus what the same tokens would cost if
each (layer, stratum) ran at its average rate, as a share of the dense FLOPs. Strata are prompt text, vision and answer.
A router without adaptivity has an excess of zero everywhere; its control is the same router with the decisions of each
(layer, stratum) shuffled over all tokens of all rows, which keeps every rate and forgets every input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu, permutation_test, rankdata
from torch import Tensor

from skipit.eval.measure.recorded import STRATA, Record
from skipit.eval.statistics import BATCH, USUAL, Figures, Floats, Interval, Resampling, bootstrap, correlation
from skipit.router import InputError
from skipit.theory.cost import CostModel


@dataclass(frozen=True)
class Contrast(Figures):
    """What a group of rows, or a kind of token, is given beyond the rest.

    Attributes:
        share: executed over dense FLOPs of the group's tokens.
        rest: the same of what it is compared with.
        difference: mean excess of the group minus that of the rest, in shares of dense FLOPs; 0 without adaptivity.
        low: lower end of its bootstrap (percentile) interval over rows.
        high: upper end of it.
        p: two-sided permutation p-value: labels shuffled over rows; for kinds of token, swapped within rows.
        effect: P(a member has more excess than a non-member) - P(less), in [-1, 1] (Cliff's delta); for kinds of token
            over rows, kind against rest of the same row.
        control: the difference when decisions are shuffled over tokens and rows.
        rows: with the group, or with tokens of the kind and of the rest.
    """

    share: float
    rest: float
    difference: float
    low: float
    high: float
    p: float
    effect: float
    control: float
    rows: int


@dataclass(frozen=True)
class Association(Interval):
    """Rank correlation of a row's excess with its difficulty: above 0, harder rows are given more.

    It is Spearman's, in [-1, 1], 0 where the excess of all rows is the same, with its bootstrap interval over rows.

    Attributes:
        p: two-sided permutation p-value.
        control: the correlation when decisions are shuffled over tokens and rows.
        rows: how many.
    """

    p: float
    control: float
    rows: int


@dataclass(frozen=True)
class Adaptivity(Figures):
    """How a router's spending depends on its input.

    Attributes:
        rows: how many.
        share: executed over dense FLOPs of all rows.
        spread: standard deviation of the excess over rows, in shares of dense FLOPs.
        spread_control: the same when decisions are shuffled over tokens and rows: what chance alone gives.
        groups: by factor (such as the kind of question) and level, against all rows of other levels.
        difficulty: by measure of difficulty.
        within: the same with the mean rank of a row's level removed from both sides, by measure and factor: are harder
            rows of the same level given more?
        tokens: by kind of token, against the row's other tokens of the same stratum.
        resampling: how the uncertainty was estimated.
    """

    rows: int
    share: float
    spread: float
    spread_control: float
    groups: Mapping[str, Mapping[str, Contrast]]
    difficulty: Mapping[str, Association]
    within: Mapping[str, Mapping[str, Association]]
    tokens: Mapping[str, Contrast]
    resampling: Resampling


def measure_adaptivity(
    records: Sequence[Record],
    costs: CostModel,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    difficulty: Mapping[str, ArrayLike] | None = None,
    resampling: Resampling = USUAL,
) -> Adaptivity:
    """Compare what a router spends on groups of rows, on harder rows and on kinds of token with what chance gives.

    Args:
        records: of all batches, in order.
        costs: of the model's layers.
        groups: for every factor, the level of each row: kind of question, whether the dense answer was right, ...
        difficulty: for every measure, a number per row, larger where harder: the dense model's loss or entropy, ...
        resampling: confidence level, number of resamples, and seed, also of the shuffled control.

    Raises:
        InputError: no records, or there is not one level and one finite number per row.
    """
    rows = sum(record.real.shape[0] for record in records)
    groups, hard = dict(groups or {}), {k: np.asarray(v, np.float64) for k, v in (difficulty or {}).items()}
    _check(rows, groups, hard)
    shuffled = shuffle(records, resampling.seed)
    mine, chance = _Rows.of(records, costs), _Rows.of(shuffled, costs)
    by_factor = {
        factor: {level: _contrast(mine, chance, labels, level, resampling) for level in dict.fromkeys(labels)}
        for factor, labels in groups.items()
    }
    associations = {name: _associate(mine.excess, chance.excess, v, None, resampling) for name, v in hard.items()}
    within = {
        name: {
            factor: _associate(mine.excess, chance.excess, values, labels, resampling)
            for factor, labels in groups.items()
        }
        for name, values in hard.items()
    }
    names = dict.fromkeys(name for record in records for name in record.kinds)
    tokens = {name: _token_contrast(mine, chance, name, resampling) for name in names}
    return Adaptivity(
        rows,
        float(mine.executed.sum() / mine.dense.sum()),
        float(mine.excess.std()),
        float(chance.excess.std()),
        by_factor,
        associations,
        within,
        tokens,
        resampling,
    )


def rates(records: Sequence[Record]) -> Float[Tensor, "layers strata"]:
    """The share of real tokens of each (layer, stratum) that ran, fp64; 0 where there are none."""
    ran = torch.zeros(len(records[0].run), len(STRATA), dtype=torch.float64)
    total = torch.zeros(len(STRATA), dtype=torch.float64)
    for record in records:
        for stratum in range(len(STRATA)):
            here = record.real & (record.stratum == stratum)
            ran[:, stratum] += record.run[:, here].sum(-1)
            total[stratum] += here.sum()
    return ran / total.clamp(min=1)


def shuffle(records: Sequence[Record], seed: int) -> list[Record]:
    """Shuffle each layer's decisions over all real tokens of a stratum, in all rows: every rate stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    runs = [record.run.clone() for record in records]
    for stratum in range(len(STRATA)):
        places = [record.real & (record.stratum == stratum) for record in records]
        pooled = torch.cat([run[:, here] for run, here in zip(runs, places, strict=True)], -1)
        order = torch.rand(pooled.shape, generator=generator).argsort(-1)
        parts = pooled.gather(-1, order).split([int(here.sum()) for here in places], -1)
        for run, here, part in zip(runs, places, parts, strict=True):
            run[:, here] = part
    return [replace(record, run=run) for record, run in zip(records, runs, strict=True)]


@dataclass(frozen=True)
class _Rows:
    """Sums over the tokens of every row, [rows], and for every kind of token those of the kind and of the rest."""

    executed: Floats
    dense: Floats
    excess: Floats
    kinds: Mapping[str, tuple[Floats, Floats]]  # [rows, (executed, excess, dense)] of the kind and of the rest

    @classmethod
    def of(cls, records: Sequence[Record], costs: CostModel) -> "_Rows":
        average = rates(records)
        sums: list[Tensor] = []
        names = dict.fromkeys(name for record in records for name in record.kinds)
        kinds: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
        for record in records:
            executed, dense = record.flops(costs)
            expected, _ = record.flops(costs, average[:, record.stratum])
            values = torch.stack([executed, executed - expected, dense], -1) * record.real[..., None]
            sums.append(values.sum(1))
            for name, (inside, outside) in kinds.items():
                kind = record.kinds.get(name, torch.zeros_like(record.real)) & record.real
                rest = torch.zeros_like(kind)
                for stratum in range(len(STRATA)):
                    here = record.real & (record.stratum == stratum)
                    rest |= here & ~kind & (kind & here).any(-1, keepdim=True)
                inside.append((values * kind[..., None]).sum(1))
                outside.append((values * rest[..., None]).sum(1))
        executed, excess, dense = torch.cat(sums).numpy().T
        pairs = {name: (torch.cat(a).numpy(), torch.cat(b).numpy()) for name, (a, b) in kinds.items()}
        return cls(executed, dense, excess / dense, pairs)


def _contrast(mine: _Rows, chance: _Rows, labels: Sequence[str], level: str, resampling: Resampling) -> Contrast:
    inside = np.array([label == level for label in labels])
    share, rest = (
        float(mine.executed[rows].sum() / mine.dense[rows].sum()) if rows.any() else nan for rows in (inside, ~inside)
    )
    control = _difference(chance.excess[inside], chance.excess[~inside]) if 0 < inside.sum() < len(inside) else nan
    members, others = mine.excess[inside], mine.excess[~inside]
    if min(len(members), len(others)) < 2:
        return Contrast(share, rest, nan, nan, nan, nan, nan, float(control), len(members))
    rng = np.random.default_rng(resampling.seed)
    low, high = bootstrap(lambda size: _drawn(members, size, rng) - _drawn(others, size, rng), resampling)
    p = _p_value((members, others), _difference, "independent", resampling)
    wins = mannwhitneyu(members, others).statistic / (len(members) * len(others))
    value = float(_difference(members, others))
    return Contrast(share, rest, value, low, high, p, float(2 * wins - 1), float(control), len(members))


def _token_contrast(mine: _Rows, chance: _Rows, name: str, resampling: Resampling) -> Contrast:
    inside, outside = mine.kinds[name]
    here = (inside[:, 2] > 0) & (outside[:, 2] > 0)
    if here.sum() < 2:
        return Contrast(nan, nan, nan, nan, nan, nan, nan, nan, int(here.sum()))
    kind, rest = (values[here, 1] / values[here, 2] for values in (inside, outside))
    share, other = (float(values[here, 0].sum() / values[here, 2].sum()) for values in (inside, outside))
    control = _difference(*(values[here, 1] / values[here, 2] for values in chance.kinds[name]))
    rng = np.random.default_rng(resampling.seed)
    low, high = bootstrap(lambda size: _drawn(kind - rest, size, rng), resampling)
    p = _p_value((kind, rest), _difference, "samples", resampling)
    effect = float(np.sign(kind - rest).mean())
    return Contrast(share, other, float(_difference(kind, rest)), low, high, p, effect, float(control), int(here.sum()))


def _associate(
    excess: Floats, chance: Floats, hard: Floats, labels: Sequence[str] | None, resampling: Resampling
) -> Association:
    if len(excess) < 4:
        return Association(nan, nan, nan, nan, nan, len(excess))
    codes = np.zeros(len(excess), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    spent, by_chance, harder = (_centred(values, codes) for values in (excess, chance, hard))
    control = float(_cosine(by_chance, harder))
    rng = np.random.default_rng(resampling.seed)

    def draw(size: int) -> Floats:
        index = rng.integers(len(spent), size=(size, len(spent)))
        return _cosine(*(values[index] - values[index].mean(-1, keepdims=True) for values in (spent, harder)))

    low, high = bootstrap(draw, resampling)
    p = _p_value((spent,), lambda values, axis=-1: _cosine(values, harder), "pairings", resampling)
    return Association(float(_cosine(spent, harder)), low, high, p, control, len(excess))


def _p_value(data: tuple[Floats, ...], statistic: Any, kind: str, resampling: Resampling) -> float:
    """Two-sided, from random permutations of a kind that `scipy.stats.permutation_test` knows."""
    test = permutation_test(
        data,
        statistic,
        permutation_type=kind,
        n_resamples=resampling.resamples,
        batch=BATCH,
        vectorized=True,
        rng=resampling.seed,
    )
    return float(test.pvalue)


def _drawn(values: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Means of resamples."""
    return np.asarray(values[rng.integers(len(values), size=(size, len(values)))].mean(-1))


def _difference(first: Floats, second: Floats, axis: int = -1) -> Floats:
    return first.mean(axis=axis) - second.mean(axis=axis)


def _centred(values: Floats, codes: NDArray[np.int64]) -> Floats:
    """Ranks without their level's mean."""
    ranks = rankdata(values)
    return np.asarray(ranks - (np.bincount(codes, ranks) / np.bincount(codes))[codes])


def _cosine(first: Floats, second: Floats) -> Floats:
    """Of centred values along the last axis; 0 where one has no spread: nothing depends on anything then."""
    return np.nan_to_num(correlation(first, second))


def _check(rows: int, groups: Mapping[str, Sequence[str]], hard: Mapping[str, Floats]) -> None:
    if rows == 0:
        raise InputError("`records`: got no rows, expected those of at least one batch.")
    for name, labels in groups.items():
        if len(labels) != rows:
            raise InputError(f"`groups[{name!r}]`: got {len(labels)} levels, expected one for each of {rows} rows.")
    for name, values in hard.items():
        if values.shape != (rows,) or not np.isfinite(values).all():
            raise InputError(
                f"`difficulty[{name!r}]`: got shape {values.shape} with {int((~np.isfinite(values)).sum())} values "
                f"that are not finite, expected one finite number for each of {rows} rows."
            )
