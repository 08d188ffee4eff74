"""Certificates from greedy answers: dense and gated, from safe to fast, on tiny models of the real classes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LAYERS, WIDTH, build, inputs
from torch import Tensor

from skipit.eval.measure.certificate import certify_thresholds, gate_logits, greedy_answers
from skipit.router import FixedUnits, Gated, InputError, Trace, attach, running, set_gates
from skipit.theory.cost import CostModel, trace_compute
from skipit.theory.risk import certify, threshold_grid

ROWS = [{"text": [3 + i, "image", 5 + i % 7, 6, 7 + i % 3]} for i in range(24)]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The pixels of a row depend on its text alone, not on the batch that it is in."""
    batch = inputs("llava", [row["text"] for row in rows])
    torch.manual_seed(1)
    pixels = torch.randn(40, 3, 8, 8)
    return {**batch, "pixel_values": pixels[[row["text"][0] for row in rows]]}


@pytest.fixture
def model() -> Any:
    """Gates with reasons of the tokens' own."""
    gated = build("llava")
    attach(gated)
    source = torch.Generator().manual_seed(4)
    set_gates(gated, torch.randn(LAYERS, 2, WIDTH, generator=source), torch.randn(LAYERS, 2, generator=source))
    return gated


def test_answers_are_those_of_generate_row_by_row_and_end_where_they_end(model: Any) -> None:
    model.generation_config.eos_token_id = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    answers, compute = greedy_answers(model, ROWS, collate, batch_size=7, max_new_tokens=6, policy=Gated(0.0))
    executed = dense = 0.0
    for row, answer in zip(ROWS, answers, strict=True):
        trace = Trace()
        batch = collate([row])
        with torch.no_grad(), running(trace=trace):
            alone = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert answer == alone.tolist()
        cost = trace_compute(CostModel.of(model), trace.steps)
        executed, dense = executed + float(cost.executed.sum()), dense + float(cost.dense.sum())
    assert any(len(answer) < 6 for answer in answers)
    assert compute == pytest.approx(executed / dense, abs=1e-6)


def test_a_dense_run_costs_everything_and_ignores_the_gates(model: Any) -> None:
    answers, compute = greedy_answers(model, ROWS, collate, max_new_tokens=3, mode="dense")
    everything, spent = greedy_answers(
        model, ROWS, collate, max_new_tokens=3, policy=FixedUnits(torch.ones(LAYERS, 2, dtype=torch.bool))
    )
    assert compute == 1.0
    assert answers == everything
    assert 1.0 < spent < 1.1  # gates cost something


def test_logits_are_of_real_tokens_in_the_dense_model(model: Any) -> None:
    logits = gate_logits(model, ROWS[:5], collate, batch_size=2)
    assert logits.shape == (LAYERS * 5 * 8,)
    assert torch.allclose(
        logits.sort().values, gate_logits(model, ROWS[:5], collate, batch_size=5).sort().values, atol=1e-4
    )


def test_the_fastest_certified_threshold_is_the_last_before_the_first_failure(model: Any) -> None:
    grid = threshold_grid(gate_logits(model, ROWS, collate))
    seen = []
    found = certify_thresholds(
        model, ROWS, collate, grid=grid, risk=0.3, confidence=0.9, max_new_tokens=2, progress=seen.append
    )
    passed = [trial.p_value <= 0.1 for trial in found.trials]
    assert passed[:-1] == [True] * (len(passed) - 1)
    assert len(found.trials) == len(grid) or not passed[-1]
    assert sum(seen) == len(ROWS) * (1 + len(found.trials))
    certified = [trial for trial, good in zip(found.trials, passed, strict=True) if good]
    assert found.chosen == (certified[-1] if certified else None)
    computes = [trial.compute for trial in found.trials]
    assert computes == sorted(computes, reverse=True)


def test_a_threshold_that_runs_everything_never_disagrees_and_one_that_runs_nothing_does(model: Any) -> None:
    found = certify_thresholds(model, ROWS, collate, grid=[-1e6, 1e6], risk=0.2, confidence=0.9, max_new_tokens=3)
    assert [trial.disagreements == 0 for trial in found.trials] == [True, False]
    assert found.chosen == found.trials[0]
    assert "at threshold -1000000.000" in found.summary()
    assert found.to_json()["chosen"]["disagreements"] == 0


def test_testing_stops_at_the_first_failure(model: Any) -> None:
    found = certify_thresholds(model, ROWS, collate, grid=[1e6, 2e6, 3e6], risk=0.2, confidence=0.9, max_new_tokens=3)
    assert (len(found.trials), found.chosen, found.summary()) == (1, None, "nothing is certified.")


def test_too_few_rows_are_refused_before_anything_runs(model: Any) -> None:
    with pytest.raises(InputError, match=r"24 rows to certify with: a risk of 0.02 .* needs at least 149"):
        certify_thresholds(model, ROWS, None, grid=[0.0], risk=0.02, confidence=0.95)


@pytest.mark.slow
def test_random_splits_of_measured_answers_violate_the_risk_less_often_than_promised() -> None:
    """The reference model with gates from its own profile; the rows measured are the population."""
    from skipit.router.checkpoint import load_dense
    from skipit.theory.plan import make_plan
    from skipit.train.data.collate import Collator
    from skipit.train.profiling import profile_model
    from skipit.train.reference import WEIGHTS
    from skipit.train.reference.data import reference_dataset

    reference, processor = load_dense(WEIGHTS)
    plan = make_plan(profile_model(reference, processor, reference_dataset("train", 48)), 0.5)
    attach(reference)
    set_gates(reference, plan.weight, plan.bias)
    prompts = Collator(processor, with_completion=False)
    logits = gate_logits(reference, reference_dataset("calibration", 32, seed=1), prompts)
    # Farther than `threshold_grid` goes: up to where more rows are answered otherwise than any of the risks below.
    grid = np.quantile(logits.double().numpy(), (0.4, 0.6, 0.7, 0.8, 0.87, 0.93)).tolist()
    pool = reference_dataset("calibration", 240)
    wanted, _ = greedy_answers(reference, pool, prompts, max_new_tokens=12, mode="dense")
    disagrees = []
    for threshold in grid:
        answers, _ = greedy_answers(reference, pool, prompts, max_new_tokens=12, policy=Gated(threshold))
        disagrees.append([found != right for found, right in zip(answers, wanted, strict=True)])
    population = np.array(disagrees)
    random = np.random.default_rng(0)
    for risk, confidence, rows in ((0.05, 0.9, 120), (0.1, 0.8, 60)):
        assert population.mean(1).max() > risk  # else nothing could be violated
        violated = 0
        for _ in range(200):
            index = certify(torch.from_numpy(population[:, random.integers(0, 240, rows)]), risk, confidence).index
            violated += index is not None and population.mean(1)[index] > risk
        promised = 200 * (1 - confidence)
        assert violated <= promised + 3 * math.sqrt(promised * confidence)
