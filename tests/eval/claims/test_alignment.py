"""Alignment of recorded rows: the metric's figures, and intervals that come from rows."""

import json

import pytest
import torch

from skipit.eval.claims.alignment import align
from skipit.eval.measure.recorded import Record
from skipit.eval.metrics import SkipAlignment
from skipit.eval.statistics import Resampling
from skipit.router import InputError

FEW = Resampling(resamples=400)
SET = torch.tensor([[False, True], [False, False], [True, True]])
WEIGHT = torch.tensor([[1.0, 2.0], [0.5, 2.0], [1.0, 3.0]])


def record(rows: int, seed: int, rate: torch.Tensor | float = 0.6) -> Record:
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(rows, 8, dtype=torch.bool)
    real[::2, 0] = False
    stratum = torch.tensor([0, 1, 1, 1, 0, 0, 2, 2]).expand(rows, 8)
    return Record((torch.rand(3, rows, 8, generator=generator) < rate) & real, stratum, real)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_figures_are_those_of_the_metric(weight: torch.Tensor | None) -> None:
    records = [record(5, 0), record(3, 1)]
    found = align(records, SET, weight, FEW)
    metric = SkipAlignment(SET, weight)
    for one in records:
        metric.update(one.run, (one.stratum == 1).long(), one.real)
    for name, value in metric.compute().items():
        interval = getattr(found, name)
        assert interval.value == pytest.approx(value.item())
        assert interval.low <= interval.value <= interval.high
    assert found.rows == 8
    assert set(json.loads(json.dumps(found.to_json(), allow_nan=False))) == {*metric.compute(), "rows"}


def test_a_router_that_follows_the_set_is_told_from_one_that_does_not_know_it() -> None:
    vision = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0])
    follows = torch.where(SET[:, vision], 0.2, 0.8)[:, None]  # it runs what the set skips less often
    found = align([record(60, 0, follows)], SET, resampling=FEW)
    blind = align([record(60, 0, 0.5)], SET, resampling=FEW)
    assert found.balanced.low > 0.7
    assert found.inside.value == pytest.approx(0.8, abs=0.05)
    assert found.outside.value == pytest.approx(0.2, abs=0.05)
    assert blind.balanced.low < 0.5 < blind.balanced.high


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="`records`: got none, expected those of at least one batch"):
        align([], SET)
    with pytest.raises(ValueError, match="`weight` goes from -1"):
        align([record(2, 0)], SET, -torch.ones(3, 2))
