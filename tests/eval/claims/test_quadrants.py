"""The 2x2 experiment: who is in which quadrant, equal compute, and verdicts that follow from what was measured."""

import json
import math
from collections.abc import Callable, Sequence

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from skipit.eval.claims import quadrant_effects
from skipit.eval.claims.quadrant_effects import Quadrants, measure_quadrants
from skipit.eval.claims.quadrants import (
    BOTH,
    NEITHER,
    REDUNDANT,
    UNATTENDED,
    equal_sets,
    split_quadrants,
    vision_tables,
)
from skipit.eval.measure.controlled import RowEffects, row_effects
from skipit.eval.statistics import Resampling
from skipit.router import InputError, attach
from skipit.theory.cost import CostModel, LayerCost
from skipit.theory.profile import profile

FEW = Resampling(resamples=300)
ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12], [6, "image", 15, 16]]
COSTS = CostModel((LayerCost(100.0, 10.0, 1.0, 60.0, 0.5, 8),) * 8)
# Two layers of eight in each quadrant.
REDUNDANCY = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]).double()
ATTENTION = torch.tensor([0.0, 0.1, 0.8, 0.9, 0.2, 0.3, 0.6, 0.7]).double()


def batches() -> list[dict[str, Tensor]]:
    made = tiny_models.inputs("llava", ROWS, "left")
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -2:] = made["input_ids"][:, -2:]
    return [{**made, "labels": labels}]


def test_quadrants_are_split_at_the_medians() -> None:
    assert split_quadrants(REDUNDANCY, ATTENTION) == {
        BOTH: (0, 1),
        REDUNDANT: (2, 3),
        UNATTENDED: (4, 5),
        NEITHER: (6, 7),
    }


def test_layers_at_a_median_and_without_a_value_are_in_no_quadrant() -> None:
    found = split_quadrants([0.1, math.nan, 0.2, 0.3, 0.4, 0.5], [0.1, 0.0, 0.9, 0.2, 0.3, 0.8])
    assert found == {BOTH: (0,), REDUNDANT: (2,), UNATTENDED: (), NEITHER: (5,)}  # layers 3 and 4 are medians


def test_sets_save_what_the_smallest_quadrant_saves() -> None:
    quadrants = {BOTH: (0, 1, 2, 3), REDUNDANT: (4, 5), UNATTENDED: (6,), NEITHER: ()}
    cost = [2.0, 2.0, 2.0, 3.0, 1.0, 1.0, 2.0]
    found = equal_sets(quadrants, cost, draws=9)
    assert sorted(found[BOTH]) == [(0,), (1,), (2,)]  # the layer of cost 3 never fits
    assert found[REDUNDANT] == ((4, 5),)
    assert found[UNATTENDED] == ((6,),)
    assert found[NEITHER] == ()
    assert len(equal_sets(quadrants, cost, draws=2)[BOTH]) == 2


def test_tables_are_those_of_vision() -> None:
    measured = profile(tiny_models.build("llava"), batches())
    redundancy, attention, cost = vision_tables(measured, "evict")
    assert torch.equal(redundancy["geometric"], measured.geometric[:, 1].double())
    assert torch.equal(redundancy["damage"], measured.damage["evict"].unit[:, 1])
    assert (attention >= measured.var_text).all()
    assert (attention >= measured.var_last).all()
    assert torch.equal(cost, measured.unit_cost("evict")[:, 1])


def test_cells_are_the_mean_of_what_their_sets_do() -> None:
    model = tiny_models.build("llava")
    attach(model)
    costs = CostModel.of(model)
    done: list[int] = []
    tables = {"geometric": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    attention = torch.tensor([0.1, 0.9, 0.2, 0.8])
    found = measure_quadrants(
        model,
        batches(),
        tables,
        attention,
        torch.ones(4),
        "evict",
        costs=costs,
        resampling=FEW,
        progress=done.append,
    )["geometric"]
    assert sum(done) == 5
    assert found.cells[UNATTENDED].sets == ((2,),)
    plan = torch.ones(4, 2, dtype=torch.bool)
    plan[2, 1] = False
    (truth,) = row_effects(model, batches(), [plan], "evict", costs=costs)
    assert found.cells[UNATTENDED].kl.value == pytest.approx(truth.mean().kl)
    assert found.cells[UNATTENDED].accuracy.value == truth.mean().exact
    assert found.cells[UNATTENDED].compute == pytest.approx(truth.compute)
    assert found.rows == 3
    assert "The smallest quadrant" in found.note
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["cells"][UNATTENDED]["layers"] == [2]


def outcome(
    monkeypatch: pytest.MonkeyPatch, hurt: Callable[[int], float], rows: int = 200, **more: object
) -> Quadrants:
    """The experiment where skipping a layer makes a share of the rows wrong and costs as many nats."""

    def measured(model: object, batches: object, plans: Sequence[Tensor], *_: object, **__: object) -> list[RowEffects]:
        found = []
        for plan in plans:
            harm = sum(hurt(layer) for layer in (~plan[:, 1]).nonzero()[:, 0].tolist())
            right = (torch.arange(rows) >= round(harm * rows)).double()
            one = torch.ones(rows, dtype=torch.float64)
            found.append(RowEffects(one * 2 * harm, one, one, 2 * one, right, one, 2 * one))
        return found

    monkeypatch.setattr(quadrant_effects, "row_effects", measured)
    tables = {"redundancy": REDUNDANCY, "attention": ATTENTION, "cost": torch.ones(8)} | more
    redundancy = {"damage": tables.pop("redundancy")}
    return measure_quadrants(
        nn.Module(),
        [],
        redundancy,  # type: ignore[arg-type]
        kv="retain",
        costs=COSTS,
        resampling=FEW,
        **tables,  # type: ignore[arg-type]
    )["damage"]


def test_effects_are_differences_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer hurts by 0.05, by 0.10 more where it is not redundant, by 0.02 more where it is attended to.
    found = outcome(monkeypatch, lambda layer: 0.05 + 0.1 * (layer >= 4) + 0.02 * (layer in (2, 3, 6, 7)))
    assert [cell.accuracy.value for cell in found.cells.values()] == pytest.approx([0.9, 0.86, 0.7, 0.66])
    assert [cell.kl.value for cell in found.cells.values()] == pytest.approx([0.1, 0.14, 0.3, 0.34])
    assert found.redundancy_effect["accuracy"].value == pytest.approx(0.2)
    assert found.redundancy_effect["accuracy"].low > 0.1
    assert found.attention_effect["kl"].value == pytest.approx(-0.04)
    assert found.interaction["accuracy"].value == pytest.approx(0)
    assert found.margin["accuracy"].value == pytest.approx(0.04)
    assert found.margin["kl"].value == pytest.approx(-0.04)
    assert found.verdict == {"accuracy": "found", "kl": "found"}
    assert found.conditions == {
        "redundancy": {"accuracy": "found", "kl": "found"},
        "attention": {"accuracy": "found", "kl": "found"},
    }
    assert found.to_json()["conditions"] == found.conditions
    assert found.dense.value == 1
    assert found.note == ""
    assert found.correlation == pytest.approx(
        torch.corrcoef(torch.stack([REDUNDANCY, ATTENTION.argsort().argsort()]))[0, 1]
    )


@pytest.mark.parametrize(
    ("hurt", "rows", "verdict"),
    [
        (lambda layer: 0.1 if layer < 2 else 0.0, 200, "not found"),
        (lambda layer: 0.1, 200, "undecided"),
        (lambda layer: 0.4 * (layer >= 2), 4, "undecided"),  # four rows agree: by chance in an eighth of all cases
        (lambda layer: 0.1 if layer < 2 else 0.12, 12, "undecided"),
    ],
)
def test_verdicts_follow_from_the_margin(
    monkeypatch: pytest.MonkeyPatch, hurt: Callable[[int], float], rows: int, verdict: str
) -> None:
    assert outcome(monkeypatch, hurt, rows).verdict["accuracy"] == verdict


def test_a_condition_may_be_worth_something_where_accuracy_cannot_rank_quadrants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = outcome(monkeypatch, lambda layer: 0.1 if layer in (4, 5) else 0.0)
    assert found.verdict["accuracy"] == "undecided"  # others do as well
    assert found.conditions["redundancy"]["accuracy"] == "found"
    assert found.conditions["attention"] == {"accuracy": "not found", "kl": "not found"}
    assert found.note == (
        "On these rows no loss of accuracy is shown for redundant, unattended; redundant, attended; not redundant, "
        "attended: it cannot rank them."
    )


def test_an_empty_quadrant_is_named_and_what_needs_it_has_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(monkeypatch, lambda layer: 0.05 + 0.05 * (layer >= 4), attention=REDUNDANCY)
    assert found.cells[REDUNDANT].sets == found.cells[UNATTENDED].sets == ()
    assert "Without a set: redundant, attended; not redundant, unattended (none of 8 layers" in found.note
    assert math.isnan(found.cells[REDUNDANT].accuracy.value)
    assert math.isnan(found.redundancy_effect["accuracy"].value)
    assert found.correlation == pytest.approx(1)
    assert found.margin["accuracy"].value == pytest.approx(0.2)  # four layers each: against the one that is left
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["interaction"]["kl"]["value"] is None


def test_bad_input_is_named() -> None:
    with pytest.raises(
        InputError, match=r"got shapes \(8,\) and \(3,\), 0 layers with both values, expected \[layers\]"
    ):
        split_quadrants(REDUNDANCY, [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="3 layers with both values"):
        split_quadrants([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="`draws`: got 0, expected how many sets of a quadrant"):
        equal_sets({BOTH: (0,)}, [1.0], draws=0)
