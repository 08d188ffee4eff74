"""`running` changes what happens within its block, and nothing else."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from inspect import ismethod, signature
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ROWS, build, inputs
from torch import Tensor

from skipit.router import (
    FixedUnits,
    InputError,
    RouterConfig,
    RouterConfigError,
    SkipCache,
    Trace,
    UnsupportedModelError,
    attach,
    detach,
    running,
)
from skipit.router.call import KWARG, Call, Dense
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
        assert seen(model, batch) == Dense()
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


def in_thread(target: Any, pool: ThreadPoolExecutor | None = None) -> Any:
    with ThreadPoolExecutor(1) if pool is None else nullcontext(pool) as workers:
        return workers.submit(target).result(timeout=60)


def test_a_method_takes_its_options_along() -> None:
    """A thread has those of where `generate` was taken from the model, if it has set none itself."""
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    new = {"max_new_tokens": 2, "do_sample": False}
    old, trace = ThreadPoolExecutor(1), Trace()
    in_thread(int, old)
    with running(trace=trace):
        in_thread(partial(model.generate, **batch, **new), old)
        in_thread(partial(model.generate, **batch, **new))
        assert len(trace.steps) == 4
        held, taken = Trace(), model.generate

        def own() -> None:
            with running(trace=held):
                taken(**batch, **new)

        in_thread(own)
        assert (len(trace.steps), len(held.steps)) == (4, 2)
        asyncio.run(asyncio.to_thread(lambda: model.generate(**batch, **new)))  # copies the context
        assert len(trace.steps) == 6
        taken(**batch, **new)
    assert len(trace.steps) == 8
    taken(**batch, **new)  # in its own thread a method has the options that hold there
    in_thread(partial(model.generate, **batch, **new), old)
    assert len(trace.steps) == 8
    old.shutdown()
    assert ismethod(model.generate)
    assert "budget" in signature(model.generate).parameters


def test_a_thread_that_misses_its_options_is_refused() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    message = r"`running`: this thread was started inside a block of another thread, whose options do not reach it"
    new = {"max_new_tokens": 2, "do_sample": False}
    calls = (lambda: logits(model, batch), lambda: model.generate(**batch, **new))
    with running(mode="masked"), ThreadPoolExecutor(1) as pool:
        for call in calls:
            with pytest.raises(InputError, match=message):
                in_thread(call, pool)
        with running(mode="gathered"), pytest.raises(InputError, match=message):  # also in a block that is newer
            in_thread(calls[0], pool)

        def with_defaults() -> Tensor:
            with running():
                return logits(model, batch)

        assert torch.equal(in_thread(with_defaults, pool), logits(model, batch))
    go, pool = threading.Event(), ThreadPoolExecutor(1)
    with running(mode="masked"):
        late = pool.submit(lambda: (go.wait(60), logits(model, batch)))
    go.set()  # when the block is over
    with pytest.raises(InputError, match=message):
        late.result(60)
    answer = model.generate(**batch, **new)
    assert torch.equal(in_thread(partial(model.generate, **batch, **new), pool), answer)
    pool.shutdown()
    assert in_thread(calls[0]) is not None


def test_options_of_a_call_are_nobody_elses() -> None:
    """Those of `generate` itself open no block that another thread could be refused for."""
    model, batch = build("llava"), inputs("llava", ROWS[:1])
    attach(model, RouterConfig(operating_points={"0.5": 0.5}))

    class Streamer:
        found: Any = None

        def put(self, value: Tensor) -> None:
            self.found = in_thread(lambda: logits(model, batch))

        def end(self) -> None:
            pass

    streamer = Streamer()
    model.generate(**batch, max_new_tokens=1, budget=0.5, streamer=streamer)
    assert torch.equal(streamer.found, logits(model, batch))


def test_every_door_has_the_router() -> None:
    model, batch = build("llava"), inputs("llava", [[5, 6, 7]])
    attach(model)
    text = {"input_ids": batch["input_ids"]}
    with running(policy=SKIP_ALL), torch.no_grad():
        states = model.model.get_input_embeddings()(batch["input_ids"])
        for door in (model.model, model.model.language_model, model.get_decoder()):
            trace = Trace()
            with running(trace=trace):
                output = door(**text).last_hidden_state
            assert len(trace.steps) == 1
            assert torch.equal(output, model.get_decoder().norm(states))
        with pytest.raises(
            InputError, match=r"cannot tell text from vision tokens.*Pass `input_ids`, or, to a model that"
        ):
            model.get_decoder()(inputs_embeds=states)
        with pytest.raises(InputError, match=r"`LlamaDecoderLayer` has a gate and was reached without its router"):
            model.get_decoder().layers[0](states)
        with pytest.raises(InputError, match="was reached without its router"):
            model.get_decoder().forward(inputs_embeds=states)


@pytest.mark.parametrize("what", ["alora", "names"])
def test_adapters_that_depend_on_rows(what: str) -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    targets = ["q_proj", "v_proj"]
    if what == "alora":
        config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=[9])
        tuned, call = get_peft_model(model, config).eval(), {}
    else:
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, layers_to_transform=[2, 3])).eval()
        call = {"adapter_names": ["default", "__base__", "default"]}
    with torch.no_grad(), running(policy=FixedUnits(torch.tensor([[True, False]] * 4))):
        if what == "names":  # an adapter that depends on no row, as long as none is named
            assert tuned(**batch).logits.isfinite().all()
        with running(mode="masked"):
            assert tuned(**batch, **call).logits.isfinite().all()
        with pytest.raises(UnsupportedModelError, match="an adapter that depends on a token's row or place"):
            tuned(**batch, **call)


def test_attention_may_be_named_anew() -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    real = batch["attention_mask"].bool()
    attach(model, RouterConfig(kv="evict"))
    policy = FixedUnits(torch.tensor([[True, False]] * 4))
    with running(policy=policy):
        wanted = logits(model, batch)[real]
        twin = deepcopy(model)
        for name in ("eager", "sdpa"):
            twin.set_attn_implementation(name)
            torch.testing.assert_close(logits(twin, batch)[real], wanted)
            assert torch.equal(logits(model, batch)[real], wanted)
        twin.set_attn_implementation("flex_attention")
        with pytest.raises(UnsupportedModelError, match="got 'flex_attention', gated execution supports sdpa, eager"):
            logits(twin, batch)
    detach(model)
    assert model.get_decoder().config._attn_implementation == "sdpa"
