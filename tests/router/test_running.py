"""`running` changes what happens within its block, and nothing else."""

from typing import Any

import pytest
import torch
from tiny_models import ROWS, build, inputs
from torch import Tensor

from skipit.router import FixedUnits, RouterConfig, RouterConfigError, SkipCache, Trace, attach, running
from skipit.router.call import DENSE, KWARG, Call
from skipit.router.running import _running

SKIP_ALL = FixedUnits(torch.zeros(4, 2, dtype=torch.bool))


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def seen(model: Any, batch: dict[str, Tensor]) -> Call:
    """What the layers are told in a call."""
    calls: list[Call] = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda m, a, k: calls.append(k.get(KWARG)), with_kwargs=True)
    logits(model, batch)
    handle.remove()
    return calls[0]


def test_options_nest_and_are_restored() -> None:
    before, trace = _running.get(), Trace()
    with running(mode="masked", trace=trace):
        with running(kv="evict", mode="gathered"):
            assert (_running.get().mode, _running.get().kv, _running.get().trace) == ("gathered", "evict", trace)
        assert (_running.get().mode, _running.get().kv, _running.get().trace) == ("masked", None, trace)
        with pytest.raises(KeyError), running(budget=0.5):
            raise KeyError
        assert _running.get().budget is None
    assert _running.get() is before


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match="speed"), running(speed=2):
        pass


def test_what_layers_are_told() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model, RouterConfig(kv="evict", threshold=-1.0, operating_points={"0.5": 0.5}))
    call = seen(model, batch)
    assert (call.mode, call.kv, call.policy.threshold, call.past, call.step) == ("gathered", "evict", -1.0, 0, None)
    assert torch.equal(call.real, batch["attention_mask"].bool())
    for row in range(3):
        assert call.position[row][call.real[row]].tolist() == list(range(int(call.real[row].sum())))
    with running(budget=0.5, kv="retain", mode="masked"):
        call = seen(model, batch)
    assert (call.mode, call.kv, call.policy.threshold) == ("masked", "retain", 0.5)
    with running(policy=SKIP_ALL):
        assert seen(model, batch).policy is SKIP_ALL
    with running(mode="dense"):
        assert seen(model, batch) == DENSE
    assert seen(model.train(), batch).mode == "masked"


def test_without_a_mask_every_token_is_real() -> None:
    model = build("llava")
    attach(model)
    for mask in (None, torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()):
        call = seen(model, {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": mask})
        assert call.real.all()
        assert call.position.tolist() == [[0, 1, 2]]


def test_positional_arguments() -> None:
    model = build("llava")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        attach(model)
        assert torch.equal(model(ids).logits, expected)
        with running(mode="dense"):
            assert torch.equal(model(ids).logits, expected)


def test_a_budget_that_was_not_calibrated() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model, RouterConfig(operating_points={"0.5": 0.5}))
    with (
        running(budget=0.3),
        pytest.raises(RouterConfigError, match=r"`budget`: got '0.3', this router is calibrated for: 0.5"),
    ):
        model(**batch)


def test_who_makes_the_cache() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    with torch.no_grad():
        assert isinstance(model(**batch).past_key_values, SkipCache)
        assert model(**batch, use_cache=False).past_key_values is None
        model.config.text_config.use_cache = False
        assert model(**batch).past_key_values is None
        mine = SkipCache(4)
        assert model(**batch, past_key_values=mine).past_key_values is mine


def test_a_trace_is_filled_in_order() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    trace = Trace()
    with running(trace=trace):
        logits(model, batch)
        with running(policy=SKIP_ALL):
            logits(model, batch)
    first, second = trace.steps
    assert first.run.shape == (4, *batch["input_ids"].shape)
    assert torch.equal(first.run, batch["attention_mask"].bool().expand(4, -1, -1))
    assert first.probability.shape == first.run.shape
    assert not second.run.any()
    assert not second.probability.any()
    logits(model, batch)
    assert len(trace.steps) == 2
