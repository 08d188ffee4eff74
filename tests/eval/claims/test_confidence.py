"""Calibration of two models on the same rows: errors of known cases, pairing, and verdicts that follow."""

import json

import pytest
import torch

from skipit.eval.claims.confidence import compare_confidence
from skipit.eval.measure.recorded import Recorded
from skipit.eval.metrics.confidence import expected_calibration_error
from skipit.eval.statistics import Resampling
from skipit.router import InputError

FEW = Resampling(resamples=500)
ROWS = 400


def recorded(
    confidence: float | torch.Tensor, accuracy: float, rows: int = ROWS, seed: int = 0, tokens: int = 2
) -> Recorded:
    right = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < accuracy
    p = torch.as_tensor(confidence, dtype=torch.float64).expand(rows)
    return Recorded(["x"] * rows, right, p.log(), torch.full((rows,), tokens), [])


def test_figures_are_those_of_the_metric() -> None:
    spread = torch.linspace(0.01, 0.99, ROWS, dtype=torch.float64)
    dense, gated = recorded(spread, 0.6), recorded(spread.flip(0), 0.6)
    found = compare_confidence(dense, gated, bins=7, resampling=FEW)
    assert found.dense.error.value == pytest.approx(expected_calibration_error(dense.product, dense.right, 7))
    assert found.gated.error.value == pytest.approx(expected_calibration_error(gated.product, gated.right, 7))
    assert found.error_change.value == pytest.approx(found.gated.error.value - found.dense.error.value)
    assert found.dense.brier.value == pytest.approx((dense.product - dense.right.double()).square().mean().item())
    assert found.brier_change.value == pytest.approx(found.gated.brier.value - found.dense.brier.value)
    assert found.dense.accuracy.value == dense.right.double().mean()
    assert found.dense.confidence.value == pytest.approx(0.5)
    assert sum(number for number, _, _ in found.dense.bins) == ROWS
    by_hand = [(c, r) for c, r in zip(dense.product.tolist(), dense.right.tolist(), strict=True) if 1 / 7 <= c < 2 / 7]
    number, confidence, accuracy = found.dense.bins[1]
    assert number == len(by_hand)
    assert confidence == pytest.approx(sum(c for c, _ in by_hand) / number)
    assert accuracy == pytest.approx(sum(r for _, r in by_hand) / number)


@pytest.mark.parametrize(
    ("dense", "gated", "verdict"),
    [
        (recorded(0.9, 0.9), recorded(0.9, 0.6), "worse"),
        (recorded(0.9, 0.6), recorded(0.6, 0.6), "better"),
        (recorded(0.9, 0.9), recorded(0.9, 0.9), "no difference shown"),
        (recorded(0.9, 0.9, 20), recorded(0.9, 0.9, 20, seed=1), "no difference shown"),
    ],
)
def test_verdicts_follow_from_the_paired_interval(dense: Recorded, gated: Recorded, verdict: str) -> None:
    found = compare_confidence(dense, gated, resampling=FEW)
    assert found.verdict == verdict
    assert found.to_json()["verdict"] == verdict
    assert found.error_change.low <= found.error_change.value <= found.error_change.high


def test_less_confidence_that_is_as_right_is_no_worse_calibration() -> None:
    """An unsure model has more error by chance: the interval leaves out zero, and yet nothing is shown."""
    unsure = torch.linspace(0.3, 0.99, ROWS, dtype=torch.float64)
    right = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) < unsure
    gated = Recorded(["x"] * ROWS, right, unsure.log(), torch.full((ROWS,), 2), [])
    found = compare_confidence(recorded(0.999, 0.999), gated, resampling=FEW)
    assert found.error_change.low > 0
    assert found.by_chance[0] < found.error_change.value < found.by_chance[1]
    assert found.verdict == "no difference shown"


def test_long_answers_have_a_confidence_per_token_too() -> None:
    found = compare_confidence(recorded(0.25, 0.5), recorded(0.25, 0.5, tokens=1), "mean", resampling=FEW)
    assert found.dense.confidence.value == pytest.approx(0.5)
    assert found.gated.confidence.value == pytest.approx(0.25)
    assert found.kind == "mean"


def test_results_are_json() -> None:
    found = compare_confidence(recorded(0.95, 0.9), recorded(0.95, 0.9), resampling=FEW)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["dense"]["bins"][0] == [0, None, None]
    assert written["dense"]["bins"][9][0] == ROWS
    assert written["error_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="`dense` and `gated`: got 400 and 3 rows, expected the same rows"):
        compare_confidence(recorded(0.5, 0.5), recorded(0.5, 0.5, 3))
    with pytest.raises(InputError, match="`kind`: got 'sum', expected 'product' or 'mean'"):
        compare_confidence(recorded(0.5, 0.5), recorded(0.5, 0.5), "sum")  # type: ignore[arg-type]
