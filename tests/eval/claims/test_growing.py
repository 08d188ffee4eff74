"""Growing sets: orders, what each point says, and that predictions are compared with what was measured."""

import json
import math
from itertools import pairwise

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.eval.claims.growing import (
    FIRST,
    LAST,
    LEAST,
    MOST,
    GrowingSets,
    growing_plans,
    measure_growing,
    unit_orders,
)
from skipit.eval.claims.prediction import set_damages
from skipit.eval.claims.single_units import measure_units
from skipit.eval.measure.controlled import row_effects
from skipit.eval.plots import draw_growing_sets, draw_scatter
from skipit.eval.statistics import Resampling
from skipit.router import InputError, attach
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel

DAMAGE = torch.tensor([[3.0, 0.5], [1.0, math.nan], [2.0, 4.0], [0.1, 0.0]])
COST = torch.tensor([[1.0, 10.0], [1.0, 0.0], [1.0, 10.0], [1.0, 10.0]])
FEW = Resampling(resamples=200)
ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12], [6, "image", 15, 16]]


def batches() -> list[dict[str, Tensor]]:
    made = tiny_models.inputs("llava", ROWS, "left")
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -2:] = made["input_ids"][:, -2:]
    return [{**made, "labels": labels}]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = tiny_models.build("llava")
    attach(made)
    return made


def measured(model: torch.nn.Module, kv: KVPolicy = "retain", **more: object) -> GrowingSets:
    return measure_growing(
        model,
        batches(),
        DAMAGE,
        COST,
        kv,
        costs=CostModel.of(model),
        resampling=FEW,
        **more,  # type: ignore[arg-type]
    )


def test_orders_are_by_damage_per_flop_and_by_depth() -> None:
    orders = unit_orders(DAMAGE, COST)
    # 0.5 / 10 for vision in layer 0 comes before 0.1 / 1 for text in layer 3; the unit without tokens is in none.
    assert orders[LEAST] == [7, 1, 6, 5, 2, 4, 0]
    assert orders[MOST] == orders[LEAST][::-1]
    assert orders[LAST] == [7, 6, 5, 4, 2, 1, 0]
    assert orders[FIRST] == [1, 0, 2, 5, 4, 7, 6]
    assert unit_orders(DAMAGE, COST, "vision")[LEAST] == [7, 1, 5]
    assert unit_orders(DAMAGE, COST, "text")[MOST] == [0, 4, 2, 6]


def test_plans_grow_from_nothing_to_everything() -> None:
    plans = growing_plans([3, 1, 0], layers=2, step=2)
    assert [(~plan).flatten().nonzero()[:, 0].tolist() for plan in plans] == [[], [1, 3], [0, 1, 3]]
    assert all(bool((a | ~b).all()) for a, b in pairwise(plans))


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_every_point_is_what_its_plan_does(model: torch.nn.Module, kv: KVPolicy) -> None:
    done: list[int] = []
    found = measured(model, kv, progress=done.append)
    orders = unit_orders(DAMAGE, COST)
    distinct = {plan.numpy().tobytes() for order in orders.values() for plan in growing_plans(order, 4)}
    assert sum(done) == len(distinct) < 4 * 8
    for name, curve in found.curves.items():
        plans = growing_plans(orders[name], 4)
        truth = row_effects(model, batches(), plans, kv, costs=CostModel.of(model))
        predicted = set_damages(DAMAGE, plans)
        assert [point.skipped for point in curve] == list(range(8))
        for at, (point, effect) in enumerate(zip(curve, truth, strict=True)):
            assert point.compute == pytest.approx(effect.compute)
            assert point.accuracy.value == effect.mean().exact
            assert point.kl.value == pytest.approx(effect.mean().kl)
            assert point.predicted_sum == pytest.approx(predicted["sum"][at].item())
            assert point.predicted_aligned == pytest.approx(predicted["aligned"][at].item())
        shares = [point.compute for point in curve]
        assert shares == sorted(shares, reverse=True)
        assert curve[0].kl.value == pytest.approx(0, abs=1e-6)
        assert sum((point.added for point in curve), ()) == tuple(
            f"{('text', 'vision')[unit % 2]} {unit // 2}" for unit in orders[name]
        )
    assert len({tuple(curve)[-1].kl.value for curve in found.curves.values()}) == 1


def test_rules_are_compared_with_what_was_measured(model: torch.nn.Module) -> None:
    found = measured(model)
    pairs = {
        tuple(sorted(sum((p.added for p in curve[: at + 1]), ()))): (point.predicted_aligned, point.kl.value)
        for curve in found.curves.values()
        for at, point in enumerate(curve)
        if at
    }
    aligned = found.prediction["aligned"]
    assert aligned.sets == len(pairs)
    assert aligned.below == sum(kl <= predicted for predicted, kl in pairs.values()) / len(pairs)
    assert -1 <= aligned.spearman <= 1
    assert found.prediction["sum"].median_ratio >= aligned.median_ratio > 0


def test_results_are_json_and_can_be_drawn(model: torch.nn.Module) -> None:
    found = measured(model, scope="vision", step=2)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [point["skipped"] for point in written["curves"][LEAST]] == [0, 2, 3]
    assert set(written["curves"][LEAST][0]["accuracy"]) == {"value", "low", "high"}
    curves = {
        name: [(point.compute, point.accuracy.value, point.kl.value) for point in curve]
        for name, curve in found.curves.items()
    }
    lines = draw_growing_sets(curves).axes[0].get_lines()
    assert [line.get_label() for line in lines] == [LEAST, MOST, LAST, FIRST]


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_single_units_are_skipped_alone(model: torch.nn.Module, kv: KVPolicy) -> None:
    found = measure_units(model, batches(), DAMAGE, kv)
    assert torch.equal(found.measured.isnan(), DAMAGE.isnan())
    plan = torch.ones(4, 2, dtype=torch.bool)
    plan[2, 1] = False
    (truth,) = row_effects(model, batches(), [plan], kv)
    assert found.measured[2, 1].item() == pytest.approx(truth.mean().kl)
    assert found.accuracy[2, 1] == truth.mean().exact
    assert found.rows == 3
    assert found.correlation["text"].units == 4
    assert found.correlation["vision"].units == 3
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["measured"][1][1] is None
    assert "over 7 units" in draw_scatter(found.predicted, found.measured, ("a", "b")).axes[0].get_title()


def test_errors_say_what_to_do(model: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="`scope`: got 'image', expected one of text, vision, all"):
        unit_orders(DAMAGE, COST, "image")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`damage`: no vision unit has a finite damage and saves FLOPs"):
        unit_orders(DAMAGE, torch.zeros(4, 2), "vision")
    with pytest.raises(InputError, match="`step`: got 0, expected how many units more each set skips"):
        growing_plans([0], layers=1, step=0)
