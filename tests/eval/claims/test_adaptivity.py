import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipit.eval.claims.adaptivity import Adaptivity, measure_adaptivity, rates, shuffle
from skipit.eval.measure.recorded import Record
from skipit.eval.statistics import Resampling
from skipit.router import Decision, InputError, Step
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel, LayerCost, trace_flops

COSTS = CostModel((LayerCost(100.0, 10.0, 1.0, 60.0, 0.5, 8),) * 3)
FEW = Resampling(resamples=300)
ROWS, SEQ = 24, 12


def record(run: Tensor, seed: int = 0, **more: object) -> Record:
    """Rows of two pads, six vision tokens, two text tokens and two answer tokens; odd rows have one pad more."""
    real = torch.ones(ROWS, SEQ, dtype=torch.bool)
    real[:, :2] = False
    real[1::2, 2] = False
    stratum = torch.zeros(ROWS, SEQ, dtype=torch.int64)
    stratum[:, 2:8], stratum[:, 10:] = 1, 2
    return Record(run & real, stratum, real, **more)  # type: ignore[arg-type]


def bernoulli(rate: Tensor | float, seed: int = 0) -> Tensor:
    return torch.rand(3, ROWS, SEQ, generator=torch.Generator().manual_seed(seed)) < rate


LABELS = ["hard"] * 8 + ["easy"] * 16
HARD_ROWS = torch.tensor([0.9] * 8 + [0.4] * 16)[None, :, None]


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_a_router_that_runs_more_for_a_group_is_found_and_the_shuffled_control_is_not(kv: KVPolicy) -> None:
    records = [record(bernoulli(HARD_ROWS), kv=kv)]
    loss = HARD_ROWS[0, :, 0] + 0.01 * torch.arange(ROWS) / ROWS
    found = measure_adaptivity(records, COSTS, groups={"kind": LABELS}, difficulty={"loss": loss}, resampling=FEW)
    hard, easy = found.groups["kind"]["hard"], found.groups["kind"]["easy"]
    assert hard.difference > 0.25
    assert hard.low > 0
    assert hard.p < 0.02
    assert hard.effect > 0.9
    assert hard.share - hard.rest == pytest.approx(hard.difference, abs=0.05)
    assert easy.difference == pytest.approx(-hard.difference)
    assert (hard.rows, easy.rows) == (8, 16)
    assert abs(hard.control) < 0.1
    assert found.spread > 2 * found.spread_control
    assert found.difficulty["loss"].value > 0.6
    assert found.difficulty["loss"].low > 0
    assert found.difficulty["loss"].p < 0.02
    assert abs(found.difficulty["loss"].control) < 0.5
    # Within a group the router does not know which row is harder.
    assert abs(found.within["loss"]["kind"].value) < 0.4


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_a_constant_router_has_exactly_no_adaptivity(kv: KVPolicy) -> None:
    units = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    base = record(torch.ones(3, ROWS, SEQ, dtype=torch.bool), kv=kv)
    cell = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    cell[:, 4:6] = True
    constant = replace(base, run=units[:, base.stratum] & base.real, kinds={"cell": cell})
    loss = torch.arange(ROWS).double()
    parity = ["even", "odd"] * (ROWS // 2)  # rows of different length: the share differs, the excess does not
    found = measure_adaptivity([constant], COSTS, groups={"g": parity}, difficulty={"loss": loss}, resampling=FEW)
    for contrast in (*found.groups["g"].values(), found.tokens["cell"]):
        assert (contrast.difference, contrast.low, contrast.high, contrast.effect) == (0, 0, 0, 0)
        assert contrast.control == 0
        assert contrast.p == 1
    assert found.groups["g"]["even"].share != found.groups["g"]["odd"].share
    assert found.spread == found.spread_control == 0
    assert found.difficulty["loss"].value == found.within["loss"]["g"].value == 0
    assert found.difficulty["loss"].p == 1


def test_a_router_that_runs_more_for_a_kind_of_token_is_found() -> None:
    cell = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    cell[:, 4:6] = True
    rate = torch.where(cell, 0.9, 0.3)
    found = measure_adaptivity([record(bernoulli(rate), kinds={"cell": cell})], COSTS, resampling=FEW)
    contrast = found.tokens["cell"]
    assert contrast.difference > 0.3
    assert contrast.low > 0
    assert contrast.p < 0.02
    assert contrast.effect > 0.8
    assert contrast.share > contrast.rest
    assert abs(contrast.control) < 0.12
    assert contrast.rows == ROWS
    # The rest is of the same stratum: text and answers run at the lower rate and do not blur the comparison.
    text = torch.zeros_like(cell)
    text[:, 8:10] = True
    alone = measure_adaptivity([record(bernoulli(rate), kinds={"text": text})], COSTS, resampling=FEW).tokens["text"]
    assert alone.rows == 0
    assert math.isnan(alone.difference)


def test_shuffling_keeps_every_rate_and_pads() -> None:
    records = [record(bernoulli(HARD_ROWS, 1)), record(bernoulli(0.2, 2))]
    shuffled = shuffle(records, seed=3)
    assert torch.equal(rates(shuffled), rates(records))
    assert not any((r.run & ~r.real).any() for r in shuffled)
    assert not torch.equal(shuffled[0].run, records[0].run)
    assert all(torch.equal(a.run, b.run) for a, b in zip(shuffled, shuffle(records, seed=3), strict=True))


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_a_record_of_a_generation_costs_what_its_steps_cost(kv: KVPolicy) -> None:
    def step(run: Tensor, real: Tensor, past: int) -> Step:
        decisions = {layer: Decision(run[layer]) for layer in range(3)}
        return Step(torch.zeros_like(real, dtype=torch.int64), real, past, kv, decisions=decisions)

    real = torch.ones(ROWS, 4, dtype=torch.bool)
    real[::2, 0] = False
    steps = [step(bernoulli(0.5)[..., :4], real, 0)]
    steps += [step(bernoulli(0.5, n)[..., :1], torch.ones(ROWS, 1, dtype=torch.bool), 3 + n) for n in (1, 2)]
    joined = Record.of(steps)
    executed, dense = trace_flops(COSTS, steps)
    spent, full = joined.flops(COSTS)
    assert torch.allclose(spent, torch.cat([e.sum(0) for e in executed], -1))
    assert torch.allclose(full, torch.cat([d.sum(0) for d in dense], -1))
    assert joined.stratum[0].tolist() == [0, 0, 0, 0, 2, 2]
    with pytest.raises(InputError, match="3 steps of 2 calls"):
        Record.of([*steps[:2], steps[0]])
    with pytest.raises(InputError, match=r"`cell`: got a mask of shape \(24, 3\), expected \(24, 4\)"):
        Record.of(steps, kinds={"cell": real[:, :3]})
    kinds = Record.of(steps, answer=real, kinds={"cell": real}).kinds["cell"]
    assert kinds.shape == joined.real.shape
    assert not kinds[:, 4:].any()


def test_batches_add_up_and_results_are_json() -> None:
    whole = record(bernoulli(HARD_ROWS))
    parts = [
        replace(whole, run=whole.run[:, rows], stratum=whole.stratum[rows], real=whole.real[rows])
        for rows in (slice(0, 10), slice(10, None))
    ]
    one, two = (measure_adaptivity(r, COSTS, groups={"kind": LABELS}, resampling=FEW) for r in ([whole], parts))
    a, b = (found.groups["kind"]["hard"] for found in (one, two))
    assert (a.share, a.difference, a.p) == pytest.approx((b.share, b.difference, b.p))
    written = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert written["groups"]["kind"]["hard"]["rows"] == 8
    assert isinstance(one, Adaptivity)


def test_bad_input_is_named() -> None:
    records = [record(bernoulli(0.5))]
    with pytest.raises(InputError, match="no rows"):
        measure_adaptivity([], COSTS)
    with pytest.raises(InputError, match=r"`groups\['kind'\]`: got 2 levels, expected one for each of 24 rows"):
        measure_adaptivity(records, COSTS, groups={"kind": ["a", "b"]})
    with pytest.raises(InputError, match=r"`difficulty\['loss'\]`: got shape \(24,\) with 1 values that are not"):
        measure_adaptivity(records, COSTS, difficulty={"loss": [math.nan] + [0.0] * 23})


def test_a_level_of_one_row_has_no_interval() -> None:
    labels = ["a"] + ["b"] * (ROWS - 1)
    found = measure_adaptivity([record(bernoulli(0.5))], COSTS, groups={"g": labels}, resampling=FEW).groups["g"]["a"]
    assert found.rows == 1
    assert 0 < found.share < 1
    assert math.isnan(found.difference)
    assert found.to_json()["difference"] is None
