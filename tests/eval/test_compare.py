"""A comparison says what was measured: the same rows, real figures, a table that explains itself."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from skipit.eval.claims.tracking import track
from skipit.eval.compare import Comparison, compare, theory_tables
from skipit.eval.measure.latency import Latency
from skipit.eval.measure.recorded import Recorded
from skipit.eval.measure.runner import Outcome
from skipit.eval.statistics import Resampling
from skipit.router import RouterConfig, attach, gate_state, running, set_gates
from skipit.router.errors import InputError
from skipit.theory.profile import Profile
from skipit.train.data.sources import load_model
from skipit.train.profiling import profile_model
from skipit.train.reference.data import reference_dataset


def outcome(accuracy: float, compute: float, kinds: dict[str, float] | None = None) -> Outcome:
    units = torch.full((4, 2), compute)
    recorded = Recorded(["1"] * 20, torch.ones(20).bool(), torch.zeros(20), torch.ones(20).long(), [])
    return Outcome(recorded, accuracy, kinds or {"easy": 1.0, "[hard]": accuracy}, compute, units, 1 - units)


@pytest.fixture
def comparison() -> Comparison:
    rates = np.array([[0.1, 0.9], [0.0, 0.2], [0.3, 0.6], [0.4, 0.8]])
    tables = {
        "damage": [[5.0, 0.2], [9.0, 4.0], [0.7, 0.3], [0.6, 0.1]],
        "geometric": [[1.0, 1.0]] * 4,
        "cross-attention": [[math.nan, 0.1], [math.nan, 0.4], [math.nan, 0.3], [math.nan, 0.2]],
    }
    return Comparison(
        {"dense": outcome(0.95, 1.0), "gated": outcome(0.9, 0.5)},
        {"dense": Latency(10.0, 2.0, 1.0, 1.0, 15), "gated": Latency(6.25, 1.6, 1.61, 1.26, 15)},
        {"dense": 1.0, "gated": 0.925},
        {"gated": track(rates, tables, rates > 0.5, resampling=Resampling(resamples=200))},
    )


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL} " + label))
    return [cell.strip() for cell in line.split("\N{BOX DRAWINGS LIGHT VERTICAL}")[2:-1]]


def test_the_compiled_dense_model_is_the_other_baseline(comparison: Comparison) -> None:
    assert "`skipit eval` compares with it compiled (torch.compile), too." in comparison.table()
    assert comparison.to_json()["dense"]["compiled"] is None
    found = replace(comparison, compiled=Latency(5.0, 1.0, 2.0, 2.1, 15))
    assert cells(found.table(), "  over dense compiled, 5.00 ms") == ["0.50x", "0.81x"]
    assert cells(found.table(), "  over dense compiled, 1.00 ms") == ["0.48x", "0.60x"]
    assert "too." not in found.table()
    assert found.to_json()["dense"]["compiled"]["prefill_ms"] == 5.0
    assert "compiled: no compiler" in replace(comparison, compiled="no compiler").table()


def test_table(comparison: Comparison) -> None:
    table = comparison.table()
    assert table.splitlines()[0] == "20 rows"
    assert max(map(len, table.splitlines())) <= 100
    assert cells(table, "accuracy") == ["95.0%", "90.0%"]
    assert cells(table, "  [hard]") == ["95.0%", "90.0%"]
    assert cells(table, "same answer as dense") == ["100.0%", "92.5%"]
    assert cells(table, "decoder FLOPs executed") == ["100.0%", "50.0%"]
    assert cells(table, "prefill, ms (speed-up)") == ["10.00 (1.00x)", "6.25 (1.61x)"]
    assert cells(table, "decode step, ms (speed-up)") == ["2.00 (1.00x)", "1.60 (1.26x)"]
    assert cells(table, "rank corr. of skips and damage") == ["", "-0.98"]
    estimate = comparison.tracking["gated"].tables["damage"]["all"].spearman
    assert cells(table, "  p, p_shift")[1] == f"{estimate.p:.3f}, {estimate.p_shift:.3f}".replace("0.000", "<0.001")
    assert cells(table, "  with geometric redundancy")[1] == "undefined"
    assert cells(table, "  with cross-attention")[1] == "-1.00"
    assert cells(table, "  AUROC of theory's skip set")[1] == "1.00"


def test_the_table_explains_itself(comparison: Comparison) -> None:
    table = comparison.table()
    for said in (
        "medians of 15 interleaved repeats of one row",
        "negative: redundant units are skipped more",
        "p_shift:",
    ):
        assert said in table
    without = Comparison(comparison.outcomes, comparison.latency, comparison.same_answer, {}).table()
    assert "medians of 15" in without
    assert "p_shift" not in without
    one_kind = {"dense": outcome(0.5, 1.0, {"all": 0.5})}
    assert "  all" not in Comparison(one_kind, comparison.latency, comparison.same_answer, {}).table()


def test_json(comparison: Comparison) -> None:
    values = json.loads(json.dumps(comparison.to_json()))
    assert values["dense"]["tracking"] is None
    assert values["gated"]["latency"]["prefill_ms"] == 6.25
    assert values["gated"]["tracking"]["tables"]["damage"]["all"]["spearman"]["value"] == pytest.approx(
        -0.976, abs=1e-3
    )


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("test", 6)


@pytest.fixture(scope="module")
def measured(rows: Dataset) -> Profile:
    return profile_model(*load_model("reference"), rows, draws=1)


def gated(runs: Callable[[torch.Tensor], torch.Tensor], kv: Any = "retain") -> Any:
    """The reference model with constant gates."""
    model, _ = load_model("reference")
    attach(model, RouterConfig(kv=kv, operating_points={"dense": -100.0}))
    gates = gate_state(model)
    layer = torch.arange(12)[:, None].expand(12, 2)
    set_gates(model, torch.zeros_like(gates["weight"]), torch.where(runs(layer), 5.0, -5.0))
    return model


def test_compare(rows: Dataset, measured: Profile) -> None:
    dense, processor = load_model("reference")
    seen: list[int] = []
    models = {"all": gated(lambda layer: layer >= 0), "even": gated(lambda layer: layer % 2 == 0, "evict")}
    models["opened"] = models["even"]
    contexts = {"opened": lambda: running(budget="dense")}
    result = compare(
        dense, models, processor, rows, measured, batch_size=4, repeats=1, contexts=contexts, progress=seen.append
    )
    assert seen == [4, 2] * 4
    ours, theirs = result.outcomes["all"], result.outcomes["dense"]
    assert ours.answers == theirs.answers == result.outcomes["opened"].answers
    assert theirs.accuracy >= 5 / 6
    assert result.same_answer == {"dense": 1, "all": 1, "opened": 1, "even": result.same_answer["even"]}
    assert result.outcomes["even"].skip_rate.tolist() == [[layer % 2.0] * 2 for layer in range(12)]
    assert result.outcomes["even"].compute == pytest.approx(0.5, abs=0.01)
    assert set(result.tracking) == {"all", "even", "opened"}
    assert result.tracking["even"].theory_set["all"].reason == ""
    assert result.latency["dense"].repeats == 1


def test_a_row_that_cannot_be_compared_is_named(rows: Dataset) -> None:
    dense, processor = load_model("reference")
    bad = [*rows.select(range(3)), {**rows[3], "images": ["no.png"]}]
    with pytest.raises(InputError, match="row 3: image 0 cannot be read"):
        compare(dense, {}, processor, bad, None, repeats=1)
    with pytest.raises(InputError, match="row 1: no column answer or completion; found: images, prompt"):
        compare(dense, {}, processor, [rows[0], {k: rows[1][k] for k in ("images", "prompt")}], None, repeats=1)


def test_theory_tables(measured: Profile) -> None:
    for kv in ("retain", "evict"):
        tables = theory_tables(measured, kv)
        assert list(tables) == ["damage", "geometric", "cross-attention"]
        assert np.array_equal(tables["damage"], measured.damage[kv].unit.numpy(), equal_nan=True)
        assert np.isnan(tables["cross-attention"][:, 0]).all()
        assert np.array_equal(tables["cross-attention"][:, 1], measured.var_text.numpy())
