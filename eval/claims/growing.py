"""Growing sets of skipped units: what skipping one more does, in the theory's order, in its reverse and by depth.

If damage per FLOP orders units rightly, accuracy stays flat longest when the least of it goes first and falls soonest
when the most goes first; sets in the order of depth are the control that knows no measurement. Beside each set's
measured divergence stand the two predictions of statement 10 (docs/theory.md).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.eval.measure.controlled import RowEffects, kl_interval, row_effects
from skipit.eval.statistics import USUAL, Figures, Interval, Resampling, row_interval, spearman
from skipit.router import MODALITIES, InputError
from skipit.router.config import KVPolicy
from skipit.router.errors import short
from skipit.theory.cost import CostModel

from .prediction import plan_without, set_damages
from .tracking import SCOPES, Scope

Batches = Sequence[dict[str, Tensor]]
Order = list[int]
"""Units as layer * 2 + modality, first to be skipped first."""
LEAST, MOST, LAST, FIRST = "least damage first", "most damage first", "last layers first", "first layers first"


def unit_name(unit: int) -> str:
    """A unit in words, such as "vision 7" (counted from layer 0)."""
    return f"{MODALITIES[unit % 2]} {unit // 2}"


def unit_orders(
    damage: Float[Tensor, "layers modality"], cost: Float[Tensor, "layers modality"], scope: Scope = "all"
) -> dict[str, Order]:
    """Four orders in which to skip units: by damage per FLOP saved, both ways, and by depth, both ways.

    Args:
        damage: of every unit; NaN where it has no tokens.
        cost: FLOPs that skipping it saves.
        scope: the units to skip: "text", "vision" or "all".

    Raises:
        InputError: an unknown scope, or no unit of it has a damage and saves anything.

    Example:
        >>> import torch
        >>> damage, cost = torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([[1.0, 4.0], [1.0, 4.0]])
        >>> {name: [unit_name(unit) for unit in order] for name, order in unit_orders(damage, cost).items()}
        {'least damage first': ['vision 0', 'vision 1', 'text 1', 'text 0'],
         'most damage first': ['text 0', 'text 1', 'vision 1', 'vision 0'],
         'last layers first': ['vision 1', 'text 1', 'vision 0', 'text 0'],
         'first layers first': ['vision 0', 'text 0', 'vision 1', 'text 1']}
    """
    if scope not in SCOPES:
        raise InputError(f"`scope`: got {short(scope)}, expected one of {', '.join(SCOPES)}.")
    here = damage.isfinite() & (cost > 0)
    if scope != "all":
        here[:, 1 - MODALITIES.index(scope)] = False
    units = here.flatten().nonzero()[:, 0].tolist()
    if not units:
        raise InputError(
            f"`damage`: no {'' if scope == 'all' else scope + ' '}unit has a finite damage and saves FLOPs, expected "
            "at least one. Profile the model on rows that have such tokens."
        )
    price = (damage.double() / cost.double()).flatten().tolist()
    best = sorted(units, key=lambda unit: price[unit])
    # Of one layer, vision goes first: it is most of the FLOPs.
    deep = sorted(units, key=lambda unit: (-(unit // 2), -(unit % 2)))
    shallow = sorted(units, key=lambda unit: (unit // 2, -(unit % 2)))
    return {LEAST: best, MOST: best[::-1], LAST: deep, FIRST: shallow}


@dataclass(frozen=True)
class SetPoint(Figures):
    """What skipping a set of units does.

    Attributes:
        skipped: how many units.
        added: those that the point before did not skip.
        compute: executed over dense FLOPs on the measured rows, gates counted.
        accuracy: share of rows answered right.
        kl: KL(full || skipping) per answer token, in nats.
        predicted_sum: sum of the units' damages: right where their changes are uncorrelated.
        predicted_aligned: (sum of sqrt D)^2: at most this, to second order (statement 10).
    """

    skipped: int
    added: tuple[str, ...]
    compute: float
    accuracy: Interval
    kl: Interval
    predicted_sum: float
    predicted_aligned: float


@dataclass(frozen=True)
class SetPrediction(Figures):
    """How a rule that combines the damages of single units predicts the divergence of sets.

    Attributes:
        spearman: over all different sets that skip anything; no interval, because sets within one order contain each
            other and are no independent draws.
        median_ratio: of measured over predicted.
        below: share of sets whose measured divergence is at most the prediction.
        sets: how many.
    """

    spearman: float
    median_ratio: float
    below: float
    sets: int


@dataclass(frozen=True)
class GrowingSets(Figures):
    """Curves of growing sets, by order.

    Attributes:
        kv: K/V policy of skipped tokens.
        scope: the units that were skipped.
        rows: measured.
        curves: by name of the order; each begins with no unit skipped and ends with all of the scope.
        prediction: by rule, "sum" and "aligned".
        resampling: how the uncertainty was estimated.
    """

    kv: KVPolicy
    scope: Scope
    rows: int
    curves: Mapping[str, tuple[SetPoint, ...]]
    prediction: Mapping[str, SetPrediction]
    resampling: Resampling


def growing_plans(order: Order, layers: int, step: int = 1) -> list[Bool[Tensor, "layers modality"]]:
    """Plans (True runs) that skip the first 0, `step`, 2 `step`, ... units of an order, and at last all of it.

    Raises:
        InputError: `step` is below 1.

    Example:
        >>> [int((~plan).sum()) for plan in growing_plans([3, 1, 0], layers=2, step=2)]
        [0, 2, 3]
    """
    if step < 1:
        raise InputError(f"`step`: got {step}, expected how many units more each set skips, at least 1.")
    return [plan_without(order[:size], layers) for size in [*range(0, len(order), step), len(order)]]


def measure_growing(
    model: nn.Module,
    batches: Batches,
    damage: Float[Tensor, "layers modality"],
    cost: Float[Tensor, "layers modality"],
    kv: KVPolicy,
    *,
    costs: CostModel,
    scope: Scope = "all",
    step: int = 1,
    resampling: Resampling = USUAL,
    progress: Callable[[int], None] = lambda done: None,
) -> GrowingSets:
    """Skip growing sets of units in every order of `unit_orders` and measure each set once, on the same rows.

    Args:
        model: with gates, which are not asked.
        batches: with labels.
        damage: predicted damage of every unit, such as `Profile.damage[kv].unit`.
        cost: FLOPs that skipping it saves, such as `Profile.unit_cost`.
        kv: K/V policy of skipped tokens.
        costs: of the model's layers.
        scope: the units to skip: "text", "vision" or "all".
        step: units that each set skips beyond the one before.
        resampling: of rows, for the intervals.
        progress: called with 1 after each different plan of each batch: at most 4 per unit and step, and 1.

    Raises:
        InputError: no unit can be skipped, an unknown scope, a `step` below 1, or no row.
    """
    orders = unit_orders(damage, cost, scope)
    plans = {name: growing_plans(order, len(damage), step) for name, order in orders.items()}
    different = {_key(plan): plan for curve in plans.values() for plan in curve}
    effects = row_effects(model, batches, list(different.values()), kv, costs=costs, progress=progress)
    predicted = set_damages(damage, list(different.values()))
    points = {
        key: _point(effect, different[key], (float(predicted["sum"][at]), float(predicted["aligned"][at])), resampling)
        for at, (key, effect) in enumerate(zip(different, effects, strict=True))
    }
    curves: dict[str, tuple[SetPoint, ...]] = {}
    for name, order in orders.items():
        ends = [int((~plan).sum()) for plan in plans[name]]
        curves[name] = tuple(
            SetPoint(end, tuple(unit_name(unit) for unit in order[start:end]), *points[_key(plan)])
            for start, end, plan in zip([0, *ends], ends, plans[name], strict=False)
        )
    measured = [effect.mean().kl for effect in effects]
    used = [at for at, plan in enumerate(different.values()) if not bool(plan.all())]
    prediction = {
        rule: _prediction([float(values[at]) for at in used], [measured[at] for at in used])
        for rule, values in predicted.items()
    }
    return GrowingSets(kv, scope, len(effects[0].right), curves, prediction, resampling)


def _point(
    effect: RowEffects, plan: Tensor, predicted: tuple[float, float], resampling: Resampling
) -> tuple[float, Interval, Interval, float, float]:
    return (effect.compute, row_interval(effect.right, None, resampling), kl_interval(effect, resampling), *predicted)


def _prediction(predicted: list[float], measured: list[float]) -> SetPrediction:
    pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if math.isfinite(p)]
    ratios = [m / p for p, m in pairs if p > 0]
    below = sum(m <= p for p, m in pairs) / len(pairs) if pairs else math.nan
    median = statistics.median(ratios) if ratios else math.nan
    return SetPrediction(spearman(predicted, measured), median, below, len(pairs))


def _key(plan: Tensor) -> bytes:
    return plan.numpy().tobytes()
