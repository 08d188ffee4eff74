"""The laws of gated execution, for every family, K/V policy and pattern of skipping.

Each law is stated once. "Same" is bit for bit where nothing may be computed differently, and 1e-5 of the largest
logit, in fp32, where the same sums are taken in another order.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import FAMILIES, LAYERS, ROWS, WIDTH, attention_of, build, independent, inputs
from tiny_models import PATTERNS, logits, same
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipit.router import (
    Gated,
    Policy,
    RouterConfig,
    SkipCache,
    SkipItError,
    Trace,
    UnsupportedModelError,
    attach,
    detach,
    find_router,
    gate_state,
    gated_layers,
    running,
    set_gates,
)
from skipit.router.cache import ImageCacheLayer
from skipit.router.call import Route
from skipit.router.checkpoint import load, load_router, save_gated
from skipit.theory.cost import CostModel, trace_compute

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
EVERY_PATTERN = pytest.mark.parametrize("pattern", PATTERNS)
EVERY_ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
NEW_TOKENS = {"max_new_tokens": 5, "do_sample": False}


def gated(family: str, pattern: str, kv: str = "retain", attention: str = "sdpa") -> tuple[Any, Policy]:
    """A gated model and the policy of a pattern."""
    model = build(family, attention=attention)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    return model, PATTERNS[pattern](model)


def part(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The tokens `start` to `stop` of a batch, to be run after those before; pixels belong to the first part."""
    out = {"attention_mask": batch["attention_mask"][:, :stop]}
    for name in ("input_ids", "token_type_ids", "mm_token_type_ids", "cross_attention_mask"):
        if name in batch:
            out[name] = batch[name][:, start:stop]
    if "position_ids" in batch:
        out["position_ids"] = batch["position_ids"][..., start:stop]
    if start == 0:
        out |= {k: v for k, v in batch.items() if k not in out}
    return out


def placed(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its M-RoPE positions, for models that have them: transformers cannot find them for a later part."""
    if "image_grid_thw" not in batch and "video_grid_thw" not in batch:
        return batch
    names = (
        "input_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
        "mm_token_type_ids",
    )
    positions, _ = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    return {**batch, "position_ids": positions}


def in_parts(model: Any, batch: dict[str, Tensor], cuts: list[int]) -> tuple[Tensor, SkipCache]:
    """Logits of all tokens when they are run one part after the other with a cache."""
    batch = placed(model, batch)
    ends = [*cuts, batch["input_ids"].shape[1]]
    cache, pieces = None, []
    for start, stop in zip([0, *cuts], ends, strict=True):
        with torch.no_grad():
            output = model(**part(batch, start, stop), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert isinstance(cache, SkipCache)
    return torch.cat(pieces, dim=1), cache


def running_tokens(trace: Trace) -> Tensor:
    """How many tokens ran each layer in all steps of a trace: [layers]."""
    return torch.stack([step.run.sum((1, 2)) for step in trace.steps]).sum(0)


class TestAllRun:
    """A router that lets everything run is the base model, bit for bit."""

    @EVERY_FAMILY
    @EVERY_ATTENTION
    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_forward(self, family: str, attention: str, padding: str) -> None:
        model, batch = build(family, attention=attention), inputs(family, ROWS, padding)
        more = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        with torch.no_grad():
            base = model(**batch, **more)
            attach(model)
            ours = model(**batch, **more)
        assert torch.equal(ours.logits, base.logits)
        assert len(ours.hidden_states) == len(base.hidden_states) == LAYERS + 1
        assert all(map(torch.equal, ours.hidden_states, base.hidden_states))
        if attention == "eager":
            assert len(ours.attentions) == LAYERS
            assert all(map(torch.equal, ours.attentions, base.attentions))

    @EVERY_FAMILY
    @pytest.mark.parametrize(
        "how",
        [
            NEW_TOKENS,
            NEW_TOKENS | {"num_beams": 3, "num_return_sequences": 2},
            {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2},
        ],
        ids=["greedy", "beams", "samples"],
    )
    def test_generate(self, family: str, how: dict[str, Any]) -> None:
        model, batch = build(family), inputs(family, ROWS)
        torch.manual_seed(7)
        base = model.generate(**batch, **how)
        attach(model)
        torch.manual_seed(7)
        assert torch.equal(model.generate(**batch, **how), base)

    @EVERY_FAMILY
    def test_training(self, family: str) -> None:
        model, batch = build(family).train(), inputs(family, ROWS, "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

        def step() -> tuple[Tensor, list[Tensor | None]]:
            model.zero_grad()
            output = model(**batch, labels=labels, use_cache=False)
            output.loss.backward()
            return output.logits, [p.grad for n, p in model.named_parameters() if "layer_gate" not in n]

        base, base_gradients = step()
        attach(model)
        ours, gradients = step()
        assert torch.equal(ours, base)
        for got, expected in zip(gradients, base_gradients, strict=True):
            assert (got is None) == (expected is None)
            assert got is None or torch.equal(got, expected)

    @EVERY_FAMILY
    def test_dense_mode_is_the_base_whatever_the_gates_say(self, family: str) -> None:
        model, batch = build(family), inputs(family, ROWS)
        base = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
        attach(model)
        _skip_all_by_gates(model)
        with running(mode="dense"):
            ours = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
        assert isinstance(ours.past_key_values, DynamicCache)
        assert all(map(torch.equal, ours.logits, base.logits))


class TestBudgetOfOne:
    """Where nothing may be skipped nothing is decided: the base model bit for bit, whatever the gates say."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @pytest.mark.parametrize("options", [{}, {"mode": "masked"}, {"granularity": "sequence"}], ids=str)
    def test_generate(self, family: str, kv: str, options: dict[str, Any]) -> None:
        model, batch = build(family), inputs(family, ROWS)
        how = {**NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
        base = model.generate(**batch, **how)
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        _no_gates(model)
        for asked in ({}, {"trace": Trace()}):
            with running(**options, **asked):
                ours = model.generate(**batch, **how, budget=1.0)
            assert all(map(torch.equal, ours.logits, base.logits))
        steps = asked["trace"].steps
        assert len(steps) == NEW_TOKENS["max_new_tokens"]
        assert all(torch.equal(step.run, step.real.expand_as(step.run)) for step in steps)
        compute = trace_compute(CostModel.of(model), steps)
        assert torch.equal(compute.executed, compute.dense)  # no gates among them

    @EVERY_FAMILY
    def test_hidden_states_and_gradients(self, family: str) -> None:
        model, batch = build(family).train(), inputs(family, ROWS, "right")
        outputs, gradients = [], []
        for budget in (None, 1):
            model.zero_grad()
            if budget:
                attach(model)
                _no_gates(model)
            with running(budget=budget):
                outputs.append(model(**batch, use_cache=False, output_hidden_states=True))
            outputs[-1].logits.square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(map(torch.equal, outputs[0].hidden_states, outputs[1].hidden_states))
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())

    @pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mllama"])
    def test_a_prompt_may_spend_all(self, family: str) -> None:
        model, batch = build(family), inputs(family, ROWS)
        base = model.generate(**batch, **NEW_TOKENS)
        attach(model)
        _no_gates(model)
        assert torch.equal(model.generate(**batch, **NEW_TOKENS, budget=1, budget_per="input"), base)

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_the_budget_may_change_between_calls(self, family: str, kv: str) -> None:
        model, batch = build(family), inputs(family, ROWS)
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        policy, batch = PATTERNS["gates"](model), placed(model, batch)
        length, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
        cuts = ((0, length - 3), (length - 3, length - 1), (length - 1, length))
        for order in ((1, None, 1), (None, 1, None)):
            if family == "gemma3" and order[0]:
                continue  # its dense cache drops tokens outside the sliding window
            found = []
            for everything in ({"budget": 1}, {"policy": Gated(-1e9)}):  # the second one decides
                cache, pieces = None, []
                for (start, stop), budget in zip(cuts, order, strict=True):
                    with running(**everything if budget else {"policy": policy}), torch.no_grad():
                        output = model(**part(batch, start, stop), past_key_values=cache, use_cache=True)
                    cache, pieces = output.past_key_values, [*pieces, output.logits]
                found.append(torch.cat(pieces, dim=1)[real])
            assert same(*found)


class TestMaskedIsGathered:
    """Computing everything and discarding gives what computing only what is needed gives."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    @EVERY_ATTENTION
    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_forward(self, family: str, kv: str, pattern: str, attention: str, padding: str) -> None:
        model, policy = gated(family, pattern, kv, attention)
        batch = inputs(family, ROWS, padding)
        real = batch["attention_mask"].bool()
        traces = Trace(), Trace()
        masked = logits(model, batch, policy=policy, mode="masked", trace=traces[0])
        gathered = logits(model, batch, policy=policy, trace=traces[1])
        assert torch.equal(traces[0].steps[0].run, traces[1].steps[0].run)
        assert 0 <= running_tokens(traces[0]).sum() < LAYERS * real.sum()
        assert same(gathered[real], masked[real])

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_a_model_in_training_without_gradient(self, family: str, kv: str) -> None:
        model, policy = gated(family, "gates", kv)
        batch = inputs(family, ROWS, "right")
        real = batch["attention_mask"].bool()
        expected = logits(model, batch, policy=policy)
        assert same(logits(model.train(), batch, policy=policy)[real], expected[real])

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    def test_generate(self, family: str, kv: str, pattern: str) -> None:
        model, policy = gated(family, pattern, kv)
        batch = inputs(family, ROWS)
        for how in (NEW_TOKENS, NEW_TOKENS | {"num_beams": 3}, {"max_new_tokens": 5, "do_sample": True}):
            sequences = []
            for mode in ("masked", "gathered"):
                torch.manual_seed(7)
                with running(policy=policy, mode=mode):
                    sequences.append(
                        model.generate(**batch, **how, num_return_sequences=1 + how.get("num_beams", 1) // 2)
                    )
            assert torch.equal(*sequences)

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_modes_may_change_between_calls(self, family: str, kv: str) -> None:
        model, policy = gated(family, "tokens", kv)
        for rows in (ROWS, ROWS[2:]):
            batch = placed(model, inputs(family, rows))
            length = batch["input_ids"].shape[1]
            ends = [0, length - 4, length - 2, length - 1, length]
            modes = ("masked", "gathered", "gathered", "masked")
            cache, pieces = None, []
            for start, stop, mode in zip(ends, ends[1:], modes, strict=False):
                with running(policy=policy, mode=mode), torch.no_grad():
                    output = model(**part(batch, start, stop), past_key_values=cache, use_cache=True)
                cache, pieces = output.past_key_values, [*pieces, output.logits]
            real = batch["attention_mask"].bool()
            assert same(torch.cat(pieces, dim=1)[real], logits(model, batch, policy=policy)[real])


class TestCachedIsUncached:
    """Prefill and decoding steps give what one pass over all tokens gives."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    @EVERY_ATTENTION
    @pytest.mark.parametrize("cuts", [(-3, -2, -1), (-4,)], ids=["token by token", "two pieces"])
    def test_pieces(self, family: str, kv: str, pattern: str, attention: str, cuts: tuple[int, ...]) -> None:
        model, policy = gated(family, pattern, kv, attention)
        batch = inputs(family, ROWS)
        length = batch["input_ids"].shape[1]
        real = batch["attention_mask"].bool()
        full = logits(model, batch, policy=policy)
        with running(policy=policy):
            got, _ = in_parts(model, batch, [length + cut for cut in cuts])
        assert same(got[real], full[real])

    @EVERY_FAMILY
    @EVERY_POLICY
    @pytest.mark.parametrize("row", range(3))
    def test_one_row(self, family: str, kv: str, row: int) -> None:
        model, policy = gated(family, "tokens", kv)
        batch = inputs(family, [ROWS[row]])
        length = batch["input_ids"].shape[1]
        with running(policy=policy):
            got, _ = in_parts(model, batch, [length - 3, length - 2, length - 1])
        assert same(got, logits(model, batch, policy=policy))

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_a_cache_of_the_dense_model_is_taken_over(self, family: str, kv: str) -> None:
        if family == "gemma3":
            pytest.skip("its dense cache drops tokens outside the sliding window")
        model, policy = gated(family, "tokens", kv)
        batch = placed(model, inputs(family, ROWS))
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            with running(mode="dense"):
                cache = model(**part(batch, 0, length - 2), use_cache=True).past_key_values
            with running(policy=policy):
                got = model(**part(batch, length - 2, length), past_key_values=cache, use_cache=True)
        assert isinstance(got.past_key_values, SkipCache)
        assert got.past_key_values.get_seq_length() == length

    @pytest.mark.parametrize("family", ["llava", "mllama"])
    @EVERY_POLICY
    @EVERY_PATTERN
    def test_assisted_generation_crops_the_cache(self, family: str, kv: str, pattern: str) -> None:
        model, policy = gated(family, pattern, kv)
        batch = inputs(family, [[5, "image", 6, 7, 8, 9, 6, 7, 8, 9, 6, 7]])
        with running(policy=policy):
            plain = model.generate(**batch, max_new_tokens=12, do_sample=False)
            assisted = model.generate(**batch, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(assisted, plain)


class TestAloneIsPadded:
    """A row does not know who shares its batch."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_forward(self, family: str, kv: str, pattern: str, padding: str) -> None:
        model, policy = gated(family, pattern, kv)
        rows = independent(family)
        batch = inputs(family, rows, padding)
        together = logits(model, batch, policy=policy)
        for row in range(len(rows)):
            real = batch["attention_mask"][row].bool()
            assert same(together[row][real], logits(model, inputs(family, rows[row : row + 1]), policy=policy)[0])

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    def test_generate(self, family: str, kv: str, pattern: str) -> None:
        model, policy = gated(family, pattern, kv)
        rows = independent(family)
        batch = inputs(family, rows)
        length = batch["input_ids"].shape[1]
        with running(policy=policy):
            together = model.generate(**batch, **NEW_TOKENS)
            for row in range(len(rows)):
                one = inputs(family, rows[row : row + 1])
                alone = model.generate(**one, **NEW_TOKENS)
                assert torch.equal(together[row, length:], alone[0, one["input_ids"].shape[1] :])


class TestSavedIsLoaded:
    """A checkpoint is the model that was saved, gated and dense."""

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_round_trip(self, family: str, kv: str, tmp_path: Path) -> None:
        model, _ = gated(family, "gates", kv)
        batch = inputs(family, ROWS)
        before = logits(model, batch)
        save_gated(model, None, tmp_path / "out", card="# A card")
        assert torch.equal(logits(model, batch), before)  # saving changed nothing

        config, gates = load_router(tmp_path / "out")
        assert config == RouterConfig(kv=kv)  # type: ignore[arg-type]
        assert all(torch.equal(gates[name], value) for name, value in gate_state(model).items())
        assert (tmp_path / "out" / "README.md").read_text() == "# A card"

        dense, about = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(dense) is type(build(family))
        detach(model)
        assert torch.equal(logits(dense.eval(), batch), logits(model, batch))

    def test_load(self, tmp_path: Path) -> None:
        from studies.architecture import build_model, build_processor

        model = build_model()
        attach(model, RouterConfig(kv="evict", threshold=0.1, operating_points={"0.5": 0.1}))
        set_gates(model, torch.randn(12, 2, 128), torch.randn(12, 2))
        save_gated(model, build_processor(), tmp_path / "out")
        loaded, processor = load(tmp_path / "out")
        batch = processor(text="USER: what is it ? ASSISTANT:", return_tensors="pt")
        assert find_router(loaded)[1].config == find_router(model)[1].config
        assert not loaded.training
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        # Equal weights at other addresses: some processors then choose another kernel, which rounds otherwise.
        assert same(logits(loaded, batch), logits(model, batch))


class TestDetachLeavesNoTrace:
    """After `detach` a model is what it was before `attach`."""

    @EVERY_FAMILY
    @EVERY_ATTENTION
    def test_everything_is_as_before(self, family: str, attention: str) -> None:
        model, batch = build(family, attention=attention), inputs(family, ROWS)
        expected, before = logits(model, batch), _anatomy(model)
        own_keys = list(model.state_dict())
        attach(model)
        assert _anatomy(model) != before
        assert [key for key in model.state_dict() if "layer_gate" not in key] == own_keys
        assert isinstance(model.get_decoder().layers[0], before["types"][_first_layer(model)])
        _skip_all_by_gates(model)
        model.generate(**batch, **NEW_TOKENS)
        detach(model)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # Qwen's own state
        assert _anatomy(model) == before
        assert torch.equal(logits(model, batch), expected)

    def test_twice(self) -> None:
        model = build("llava")
        attach(model)
        with pytest.raises(SkipItError, match=r"already has gates; call `detach\(model\)` first"):
            attach(model)
        detach(model)
        for call in (detach, find_router, gated_layers, gate_state):
            with pytest.raises(
                SkipItError, match=r"`LlavaForConditionalGeneration` has no gates; call `attach\(model\)`"
            ):
                call(model)
        attach(model)


class TestAnythingMaySkip:
    """Whatever is skipped, `generate` works, and a layer's cache holds what the policy says and nothing else."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    @pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "one row"])
    def test_cache(self, family: str, kv: str, pattern: str, rows: list[list[int | str]]) -> None:
        model, policy = gated(family, pattern, kv)
        batch = inputs(family, rows)
        trace = Trace()
        with running(policy=policy, trace=trace):
            output = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True)
        length = output.sequences.shape[1]
        assert length == batch["input_ids"].shape[1] + 5
        cache = output.past_key_values
        real = torch.cat([step.real for step in trace.steps], dim=1)
        run = torch.cat([step.run for step in trace.steps], dim=2)
        assert real.shape == (len(rows), length - 1)  # the last token is never fed back
        total = of_images = 0
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, ImageCacheLayer):  # holds images, whatever the tokens do
                states = batch["cross_attention_mask"][0, 0].numel() * model.model.vision_model.num_patches
                assert layer.keys.shape == layer.values.shape == (len(rows), 2, states, 8)
                of_images += 2 * layer.keys.numel() * 4
                continue
            assert layer.get_seq_length() == length - 1
            slots = layer.slots(len(rows), real.device)
            for row in range(len(rows)):
                exist = real[row] & (run[index, row] if kv == "evict" else True)
                held = slots[row][slots[row] >= 0]
                held = held[
                    real[row, held]
                ]  # a layer that runs as a whole stores pads too, which no mask lets anyone see
                assert held.tolist() == exist.nonzero()[:, 0].tolist()
            if layer.is_initialized:
                heads, dim = 2, 8
                assert layer.keys.shape == layer.values.shape == (len(rows), heads, slots.shape[1], dim)
                total += 2 * layer.keys.numel() * 4
            else:
                assert slots.numel() == 0
        assert cache.num_bytes() == total + of_images
        if pattern == "all":
            assert (total == 0) == (kv == "evict")

    @EVERY_POLICY
    def test_static_cache(self, kv: str) -> None:
        model, policy = gated("llava", "units", kv)
        with running(policy=policy), pytest.raises(UnsupportedModelError, match="got StaticCache, a gated model takes"):
            model.generate(**inputs("llava", ROWS), **NEW_TOKENS, cache_implementation="static")

    @EVERY_POLICY
    def test_no_cache(self, kv: str) -> None:
        model, policy = gated("llava", "tokens", kv)
        batch = inputs("llava", ROWS)
        with running(policy=policy):
            cached = model.generate(**batch, **NEW_TOKENS)
            assert torch.equal(model.generate(**batch, **NEW_TOKENS, use_cache=False), cached)

    @EVERY_POLICY
    def test_attention_weights(self, kv: str) -> None:
        model, policy = gated("llava", "units", kv, "eager")
        batch = inputs("llava", ROWS)
        with running(policy=policy, mode="masked"), torch.no_grad():
            weights = model(**batch, output_attentions=True).attentions
        tokens = batch["input_ids"].shape[1]
        assert [w.shape for w in weights] == [(3, 4, tokens, tokens)] * LAYERS


class TestSpreadModels:
    """A model that accelerate spreads over devices has a forward of its own on every layer; ours must be below it."""

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_hooks_of_accelerate(self, family: str, kv: str) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        model, policy = gated(family, "tokens", kv)
        batch = inputs(family, ROWS)
        expected = logits(model, batch, policy=policy)
        model = build(family)
        dense = logits(model, batch)
        for layer in model.get_decoder().layers:
            for module in (layer, attention_of(layer).q_proj):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        trace = Trace()
        assert torch.equal(logits(model, batch, policy=policy, trace=trace), expected)
        assert running_tokens(trace).sum() < LAYERS * batch["attention_mask"].sum()
        detach(model)
        assert torch.equal(logits(model, batch), dense)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model, batch), dense)


class TestCallsDoNotMeet:
    """Nothing outlives a call: two generations at once, or one after the other, do not know of each other."""

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_alternating_steps(self, family: str, kv: str) -> None:
        model, policy = gated(family, "tokens", kv)
        other = PATTERNS["units"](model)
        first, second = inputs(family, ROWS, seed=1), inputs(family, ROWS[::-1], seed=2)
        expected = [list(_decode(model, *case)) for case in ((first, policy), (second, other))]
        left, right = _decode(model, first, policy), _decode(model, second, other)
        got = list(zip(left, right, strict=True))
        for step, (a, b) in enumerate(got):
            assert torch.equal(a, expected[0][step])
            assert torch.equal(b, expected[1][step])

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_threads(self, family: str, kv: str) -> None:
        model, policy = gated(family, "tokens", kv)
        cases = [
            (inputs(family, ROWS, seed=1), {"policy": policy}),
            (inputs(family, ROWS[::-1], seed=2), {"policy": PATTERNS["units"](model), "mode": "masked"}),
        ]

        def generate(batch: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            with running(**options):
                return model.generate(**batch, max_new_tokens=8, do_sample=False)

        expected = [generate(*case) for case in cases]
        got: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i, case=case: got.update({i: generate(*case)}))  # type: ignore[misc]
            for i, case in enumerate(cases)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(got[i], expected[i]) for i in range(2))

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    def test_two_passes_are_identical(self, family: str, kv: str, pattern: str) -> None:
        model, policy = gated(family, pattern, kv)
        batch = inputs(family, ROWS)
        assert torch.equal(logits(model, batch, policy=policy), logits(model, batch, policy=policy))


class TestSkippedTokensAreNotComputed:
    """In gathered execution, tokens that skip a layer never enter its MLP or its attention."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PATTERN
    @pytest.mark.parametrize("route", get_args(Route))
    def test_counts(self, family: str, kv: str, pattern: str, route: str) -> None:
        model, policy = gated(family, pattern, kv)
        batch = inputs(family, ROWS)
        trace = Trace()
        with _counting(model) as counted, running(policy=policy, trace=trace, route=route):
            model.generate(**batch, **NEW_TOKENS)
        own = torch.tensor([not layer.skipit_attends_to_images for layer in gated_layers(model)])
        parts = torch.tensor([layer.skipit_parts is not None for layer in gated_layers(model)])
        expected = {name: torch.zeros(LAYERS, dtype=torch.long) for name in counted}
        owed, begun = torch.zeros(LAYERS, dtype=torch.long), torch.zeros(LAYERS, dtype=torch.bool)
        for step in trace.steps:
            ran = step.run.sum((1, 2))
            everyone, nobody = ran == step.real.sum(), ran == 0
            # A layer that all real tokens run takes the pads along.
            ran = torch.where(everyone, step.real.numel(), ran)
            some = ~everyone & ~nobody
            whole = some & own & parts & (kv == "retain" and route == "whole")
            expected["mlp"] += ran
            expected["core"] += torch.where(whole, step.real.numel(), ran)
            expected["attention"] += torch.where(whole, step.real.numel(), ran)
            if kv == "retain":
                # Keys and values of those that skip come from it, too; where nobody runs, as soon as somebody does.
                expected["attention"] += torch.where(some & own & ~whole, step.real.sum(), 0)
                # transformers' Mllama asks every layer that has keys for them, before it runs.
                due, begun = own & (~nobody | (begun & (family == "mllama"))), begun | ~nobody
                expected["attention"] += torch.where(due, owed, 0)
                owed = torch.where(due, 0, owed) + torch.where(nobody, step.real.numel(), 0)
        for name, tokens in counted.items():
            assert tokens.tolist() == expected[name].tolist(), name

    def test_masked_execution_computes_everything(self) -> None:
        model, policy = gated("llava", "units")
        batch = inputs("llava", ROWS)
        with _counting(model) as counted:
            logits(model, batch, policy=policy, mode="masked")
        assert all((tokens == batch["input_ids"].numel()).all() for tokens in counted.values())


class TestTraining:
    """Masked execution trains the gates, whatever they decide."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @pytest.mark.parametrize("bias", [-1.0, 1.0], ids=["all skip", "all run"])
    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_every_gate_learns(self, family: str, kv: str, bias: float, padding: str) -> None:
        model, batch = build(family).train(), inputs(family, ROWS, padding)
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        set_gates(model, torch.randn(LAYERS, 2, WIDTH) * 0.01, torch.full((LAYERS, 2), bias))
        loss = _loss(model, batch)
        loss.backward()
        assert torch.isfinite(loss)
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
        for layer in gated_layers(model)[:-1]:
            assert (layer.layer_gate.bias.grad != 0).all()
            assert (layer.layer_gate.weight.grad != 0).all()
        # Vision tokens leave the last layer for the language head, whose loss is on text.
        assert gated_layers(model)[-1].layer_gate.bias.grad[0] != 0

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_straight_through(self, family: str, kv: str) -> None:
        """The gradient of a gate's bias is <dL/doutput, F(x)> p (1 - p), summed over tokens, run or not."""
        model, batch = build(family), inputs(family, ROWS, "right")
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        policy = PATTERNS["gates"](model)
        seen: dict[str, Any] = {}
        last = gated_layers(model)[-1]
        last.self_attn.register_forward_hook(lambda *_: seen.update(whole=True))
        last.register_forward_hook(lambda m, a, k, out: seen.update(hidden=a[0], out=_kept(out)), with_kwargs=True)
        last.mlp.register_forward_hook(lambda m, a, out: seen.update(tokens=out.shape[:2]))
        trace = Trace()
        with running(policy=policy, mode="masked", trace=trace):
            loss = _loss(model, batch)
        loss.backward()
        step = trace.steps[0]
        assert seen["tokens"] == step.real.shape
        # For tokens that run, the update is what the layer added.
        probability = step.probability[-1].detach()
        update = (seen["out"] - seen["hidden"]).detach()
        slope = (seen["out"].grad * update).sum(-1) * probability * (1 - probability)
        ran = (slope * step.run[-1])[step.modality == 0].sum()
        skipped = last.layer_gate.bias.grad[0] - ran
        assert skipped.abs() > 1e-6  # tokens that skip teach the gate too
        assert (~step.run[-1] & step.real & (step.modality == 0)).any()

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_gradient_checkpointing(self, family: str, kv: str) -> None:
        model, batch = build(family).train(), inputs(family, ROWS, "right")
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        PATTERNS["gates"](model)
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            trace = Trace()
            with running(trace=trace):
                loss = _loss(model, batch)
            loss.backward()
            assert len(trace.steps) == 1
            assert sorted(trace.steps[0].decisions) == list(range(LAYERS))
            results.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
        assert len(results[0]) == len(results[1])
        assert all(map(torch.equal, *results))

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_lora(self, family: str, kv: str, tmp_path: Path) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        from skipit.train.run import lora_targets

        model, policy = gated(family, "gates", kv)
        batch = inputs(family, ROWS, "right")
        before = logits(model, batch, policy=policy)
        targets = lora_targets(model)
        gates = gate_state(model)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["layer_gate"]))
        real = batch["attention_mask"].bool()
        assert same(logits(tuned, batch)[real], before[real])  # a new LoRA adds nothing
        trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert sum("layer_gate" in name for name in trainable) == 2 * LAYERS
        assert sum("lora_" in name for name in trainable) == 2 * FAMILIES[family].linear_maps * LAYERS
        tuned.train()
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            _loss(tuned, batch).backward()
            optimizer.step()
        tuned.eval()
        assert not torch.equal(gate_state(tuned)["weight"], gates["weight"])
        expected = logits(tuned, batch)
        masked = logits(tuned, batch, mode="masked")
        assert same(expected[real], masked[real])

        tuned.save_pretrained(tmp_path)
        fresh, _ = gated(family, "gates", kv)
        assert same(logits(PeftModel.from_pretrained(fresh, tmp_path).eval(), batch)[real], expected[real])

        trained = gate_state(tuned)
        merged = tuned.merge_and_unload()
        assert all(torch.equal(gate_state(merged)[name], value) for name, value in trained.items())
        assert (logits(merged, batch) - expected)[real].abs().max() <= 1e-4 * expected.abs().max()
        detach(merged)
        fresh_base = build(family)
        assert _anatomy(merged)["types"] == _anatomy(fresh_base)["types"]

    @EVERY_FAMILY
    def test_deepcopy(self, family: str) -> None:
        model, _ = gated(family, "gates")
        batch = inputs(family, ROWS)
        expected = logits(model, batch)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, batch), expected)
        _skip_all_by_gates(twin)
        assert not torch.equal(logits(twin, batch), expected)
        assert torch.equal(logits(model, batch), expected)
        detach(twin)
        assert torch.equal(logits(model, batch), expected)
        assert find_router(model)[0] is model
        detach(model)
        assert _anatomy(twin)["types"] == _anatomy(model)["types"]
        assert torch.equal(logits(twin, batch), logits(model, batch))


def _no_gates(model: nn.Module) -> None:
    """Gates that would skip everything, and cannot be asked."""
    _skip_all_by_gates(model)
    for layer in gated_layers(model):
        layer.layer_gate.register_forward_pre_hook(lambda *_: pytest.fail("a gate was asked"))


def _skip_all_by_gates(model: Any) -> None:
    set_gates(model, torch.zeros(LAYERS, 2, WIDTH), torch.full((LAYERS, 2), -1.0))


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: Tensor = model(**batch, labels=labels, use_cache=False).loss
    return loss


def _kept(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    states.retain_grad()
    return states


def _decode(model: Any, batch: dict[str, Tensor], policy: Policy) -> Iterator[Tensor]:
    """Logits of a prefill, then of its last three tokens one by one; each step may be taken at any time."""
    batch = placed(model, batch)
    length = batch["input_ids"].shape[1]
    cache = None
    for start, stop in ((0, length - 3), *((i, i + 1) for i in range(length - 3, length))):
        with running(policy=policy), torch.no_grad():
            output = model(**part(batch, start, stop), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits


@contextmanager
def _counting(model: Any) -> Iterator[dict[str, Tensor]]:
    """Tokens that entered each layer's attention module, MLP and attention function, by the shapes executed."""
    counted = {name: torch.zeros(LAYERS, dtype=torch.long) for name in ("attention", "mlp", "core")}
    handles = []

    def counter(name: str, layer: int) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            counted[name][layer] += states.shape[0] * states.shape[1]

        return count

    for index, layer in enumerate(model.get_decoder().layers):
        for name, module in (("attention", attention_of(layer)), ("mlp", layer.mlp)):
            handles.append(module.register_forward_pre_hook(counter(name, index), with_kwargs=True))
    function = ALL_ATTENTION_FUNCTIONS["skipit_sdpa"]

    def core(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["core"][module.layer_idx] += query.shape[0] * query.shape[2]
        return function(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("skipit_sdpa", core)
    try:
        yield counted
    finally:
        ALL_ATTENTION_FUNCTIONS.register("skipit_sdpa", function)
        for handle in handles:
            handle.remove()


def _first_layer(model: Any) -> str:
    first = model.get_decoder().layers[0]
    return next(name for name, module in model.named_modules() if module is first)


def _anatomy(model: Any) -> dict[str, Any]:
    """Everything about a model that attaching could change, but for the values of its weights."""
    modules = dict(model.named_modules())
    configs = {id(m.config): m.config for m in modules.values() if hasattr(m, "config")}
    return {
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [{k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}]
            for name, module in modules.items()
        },
        "keys": list(model.state_dict()),
        "config": model.config.to_dict(),
        "attention": [config._attn_implementation for config in configs.values()],
        "generation": model.generation_config.to_dict(),
    }
