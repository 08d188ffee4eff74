"""What measured times of a layer say: from when on packing pays, and what a share of skipped tokens costs."""

import json
from pathlib import Path

import pytest
import torch

from skipit.router.errors import CheckpointError
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime, load_times

WIDTH = 8
FLOPS = 4 * WIDTH**2  # that packing one token fewer saves


def times(*rows: LayerTime) -> LayerTimes:
    ends = [
        LayerTime(size, skipped, kv, None, 1.0, 0.1 if skipped else 1.0)
        for size in (10, 1000)
        for skipped in (0, size)
        for kv in ("retain", "evict")
    ]
    steps = {10: StepTime(0.5, 1.0, 0.1), 1000: StepTime(0.7, 1.2, 0.3)}
    return LayerTimes("a machine", "float32", WIDTH, 100.0, "wall time", {10: 1.0, 1000: 9.0}, (*ends, *rows), steps)


def both(tokens: int, skipped: int, packed: float, whole: float) -> list[LayerTime]:
    return [
        LayerTime(tokens, skipped, "retain", "packed", 1.0, packed),
        LayerTime(tokens, skipped, "retain", "whole", 1.0, whole),
    ]


def test_packing_pays_from_where_the_measured_cases_lose_least() -> None:
    crossing = times(*both(10, 5, 1.6, 1.2), *both(1000, 250, 1.01, 1.0), *both(1000, 500, 0.8, 0.9))
    assert crossing.packing_pays == 250 * FLOPS
    # One small case against the others' order does not turn them over.
    noisy = times(*both(10, 5, 1.19, 1.2), *both(1000, 250, 1.1, 1.0), *both(1000, 500, 0.8, 0.9))
    assert noisy.packing_pays == 250 * FLOPS
    assert times(*both(10, 5, 0.9, 1.0)).packing_pays == 0
    assert times(*both(10, 5, 1.0, 0.9)).packing_pays == 5 * FLOPS


def test_time_is_linear_between_the_cases_of_the_route_that_is_taken() -> None:
    found = times(*both(10, 5, 1.6, 1.2), *both(1000, 500, 0.6, 0.9))
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found.relative("retain", 10, shares).tolist() == pytest.approx([1.0, 1.1, 1.2, 0.65, 0.1])
    assert found.relative("retain", 1000, shares).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.35, 0.1])
    assert float(found.relative("retain", 100, shares)[2]) == pytest.approx(0.9)  # between them in the logarithm
    assert float(found.relative("retain", 9000, shares)[2]) == pytest.approx(0.6)
    assert float(found.relative("evict", 10, shares)[2]) == pytest.approx(0.55)


def test_a_step_is_linear_in_the_logarithm_of_the_prompt() -> None:
    found = times()
    assert found.step(1) == found.steps[10]
    assert found.step(9000) == found.steps[1000]
    between = found.step(100)
    assert (between.ms, between.entered, between.left_out) == pytest.approx((0.6, 1.1, 0.2))


def test_saved_and_read(tmp_path: Path) -> None:
    found, path = times(*both(10, 5, 0.9, 1.0)), tmp_path / "new" / "file.json"
    found.save(path)
    assert load_times(path) == found
    assert json.loads(path.read_text())["packing_pays"] == 0
    written = path.read_text()
    for damaged in ("{}", '{"rows": 3}', written.replace('"route"', '"way"'), written.replace('"steps"', '"other"')):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"file\.json is not what `skipit bench` writes"):
            load_times(path)
