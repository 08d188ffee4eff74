"""Decisions for a step of many requests are those that each request meets alone, and so is what is counted."""

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WIDTH, build, inputs

import skipit
from skipit.router import RouterConfig, gate_state
from skipit.router.attach import find_router
from skipit.theory.cost import CostModel
from skipit.vllm.decisions import KEPT, Chunk, Decisions, Row
from skipit.vllm.requests import Spending, spending

MOST = 64


def gated(unit: str = "block") -> Any:
    model = build("llava")
    skipit.attach(model, RouterConfig(unit=unit, operating_points={"low": 0.5}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(4)
    shape = (LAYERS, 2, WIDTH)
    skipit.set_gates(model, torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator))
    return model


def decisions(model: Any, **options: Any) -> Decisions:
    config = find_router(model)[1].config
    costs = CostModel.of(model).layers
    made = gate_state(model)
    return Decisions(
        **made, config=model.config, costs=costs, unit=config.unit, most=MOST, like=torch.zeros(1), **options
    )


def prompts(model: Any) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Per row: ids, what enters the decoder, and the trace of running it alone."""
    found = []
    for row in ([5, "image", 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, "image", 16, 17]):
        given = inputs("llava", [row])
        entered: list[Any] = []
        layer = model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda _, args, kept=entered: kept.append(args[0]))
        trace = skipit.Trace()
        with skipit.running(trace=trace), torch.no_grad():
            model(**given)
        hook.remove()
        found.append((given["input_ids"][0], entered[0][0], trace.steps[0]))
    return found


def step(made: Decisions, parts: list[tuple[Row, int, torch.Tensor, torch.Tensor]], padding: int = 3) -> None:
    ids, states = torch.cat([part[2] for part in parts]), torch.cat([part[3] for part in parts])
    made.decide(states, ids, [Chunk(row, past, len(ids)) for row, past, ids, _ in parts], len(ids) + padding)


@pytest.mark.parametrize("unit", ["block", "mlp"])
def test_many_requests_in_pieces(unit: str) -> None:
    model = gated(unit)
    config, rows = find_router(model)[1].config, prompts(model)
    made = decisions(model)
    told = [made.row(str(number), lambda: spending(config, {}), len(ids)) for number, (ids, _, _) in enumerate(rows)]
    first = [(row, 0, ids[:3], states[:3]) for row, (ids, states, _) in zip(told, rows, strict=True)]
    step(made, first)
    expected = torch.cat([trace.run[:, 0, :3] for *_, trace in rows], -1)
    assert torch.equal(made.keep[:, :9, 0].bool(), expected)
    assert not made.keep[:, 9:12].any()
    for layer in range(LAYERS):
        assert torch.equal(made.places(layer), expected[layer].nonzero()[:, 0])
    step(made, [(row, 3, ids[3:], states[3:]) for row, (ids, states, _) in zip(told, rows, strict=True)])
    for row, (ids, _, trace) in zip(told, rows, strict=True):
        from skipit.theory.cost import trace_flops

        (flops,), (dense,) = trace_flops(CostModel.of(model), [trace])
        assert row.spent.tokens == len(ids)
        assert row.spent.token_layers == trace.run.sum()
        assert row.spent.routed == pytest.approx(float(flops.sum()), rel=1e-12)
        assert row.spent.dense == pytest.approx(float(dense.sum()), rel=1e-12)
        assert row.spent.executed >= row.spent.routed
    made.close()
    assert not made.decided


def test_a_request_that_is_run_again_is_counted_once() -> None:
    model = gated()
    ids, states, trace = prompts(model)[0]
    made = decisions(model)
    row = made.row("a", lambda: Spending("default", 0.0), len(ids))
    step(made, [(row, 0, ids[:4], states[:4])])
    step(made, [(row, 0, ids, states)])
    assert row.spent.tokens == len(ids)
    assert row.spent.token_layers == trace.run.sum()


def test_budgets_per_input_are_those_of_the_prompt_alone() -> None:
    model = gated()
    rows, made = prompts(model), decisions(model)
    told = [made.row(str(n), lambda: Spending("input", None, 0.6), len(ids)) for n, (ids, _, _) in enumerate(rows)]
    step(made, [(row, 0, ids, states) for row, (ids, states, _) in zip(told, rows, strict=True)])
    with skipit.running(budget_per="input", budget=0.6), torch.no_grad():
        alone = torch.cat([trace.run[:, 0] for *_, trace in prompts(model)], -1)
    assert torch.equal(made.keep[:, : alone.shape[1], 0].bool(), alone)
    other = made.row("other", lambda: Spending("input", None, 0.6), 5)
    with pytest.raises(RuntimeError, match=r"got 2 tokens after 0 of 5.* Serve with --no-enable-chunked-prefill"):
        step(made, [(other, 0, rows[0][0][:2], rows[0][1][:2])])


def test_where_nothing_was_decided_everything_runs() -> None:
    made = decisions(gated())
    made.keep.zero_()
    made.open(5)
    assert made.keep[:, :5].all()
    assert not made.keep[:, 5:].any()
    assert made.places(0) is None


def test_processes_of_one_model_decide_alike() -> None:
    model = gated()
    ids, states, _ = prompts(model)[0]
    made = decisions(model, agree=torch.zeros_like)
    step(made, [(made.row("a", lambda: Spending("default", 0.0), len(ids)), 0, ids, states)])
    assert not made.keep[:, : len(ids)].any()


def test_the_oldest_requests_are_forgotten_unless_they_run() -> None:
    made = decisions(gated())
    for number in range(KEPT + 3):
        made.row(str(number), lambda: Spending("default", 0.0), 1)
    made.forget({"1": None})
    assert list(made.rows)[:2] == ["1", "3"]
