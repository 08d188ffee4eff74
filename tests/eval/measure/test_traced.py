"""`skipit.generate` answers as the model does, and its trace is what ran."""

import pytest
import torch
from families import LAYERS, ROWS, WIDTH, build, inputs

import skipit
from skipit.router import InputError, RouterConfig, RouterConfigError, SkipItError, attach, running, set_gates
from skipit.theory.cost import CostModel, trace_compute

NEW_TOKENS = {"max_new_tokens": 5, "do_sample": False}


def gated(kv: str = "retain"):  # type: ignore[no-untyped-def]
    model = build("llava")
    attach(model, RouterConfig(kv=kv, operating_points={"0.5": 0.3}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    set_gates(model, torch.randn(LAYERS, 2, WIDTH, generator=generator), torch.zeros(LAYERS, 2))
    return model


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_trace(kv: str) -> None:
    model, batch = gated(kv), inputs("llava", ROWS)
    expected = model.generate(**batch, **NEW_TOKENS)
    assert torch.equal(skipit.generate(model, **batch, **NEW_TOKENS), expected)
    output, trace = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    assert torch.equal(output, expected)
    tokens = output.shape[1] - 1  # the last token is never fed back
    assert trace.run.shape == trace.flops.shape == (LAYERS, len(ROWS), tokens)
    assert torch.equal(trace.real[:, : batch["input_ids"].shape[1]], batch["attention_mask"].bool())
    assert not trace.run[:, ~trace.real].any()
    assert not trace.flops[:, ~trace.real].any()
    assert torch.equal(trace.depth, trace.run.sum(0))
    costs = CostModel.of(model)
    assert trace.share == pytest.approx(float(trace_compute(costs, trace.trace.steps).share))
    assert 0 < trace.share < 1
    # A token that runs a layer costs more there than one that skips it.
    linear = costs.layers[0].linear
    assert (trace.flops[trace.run] >= linear).all()
    assert (trace.flops[~trace.run] < linear).all()


def test_a_budget_is_an_operating_point() -> None:
    model, batch = gated(), inputs("llava", ROWS)
    _, at = skipit.generate(model, return_trace=True, budget=0.5, **batch, **NEW_TOKENS)
    with running(budget="0.5"):
        _, same = skipit.generate(model, return_trace=True, budget="0.5", **batch, **NEW_TOKENS)
    assert torch.equal(at.run, same.run)
    _, default = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    assert at.share < default.share


def test_errors() -> None:
    model, batch = gated(), inputs("llava", ROWS)
    with pytest.raises(RouterConfigError, match=r"`budget`: got '0.7', this router is calibrated for: 0.5"):
        skipit.generate(model, budget=0.7, **batch)
    with pytest.raises(InputError, match="`return_trace`: beam search moves rows"):
        skipit.generate(model, return_trace=True, num_beams=2, **batch, **NEW_TOKENS)
    with pytest.raises(SkipItError, match="has no gates"):
        skipit.generate(build("llava"), **batch)
