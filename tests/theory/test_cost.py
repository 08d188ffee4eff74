"""The cost model counts what torch's own counter counts, and what a loop over tokens counts."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, LAYERS, PATTERNS, ROWS, build, inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from skipit.router import RouterConfig, Step, Trace, UnsupportedModelError, attach, running
from skipit.theory.cost import Compute, CostModel, LayerCost, _by_modality, trace_compute

COSTS = CostModel(tuple(LayerCost(100.0 + i, 30.0 + i, 7.0 + i, 60.0 + i, 3.0, 16) for i in range(3)))


def step_compute(costs: CostModel, run: Tensor, modality: Tensor, real: Tensor, *more: Any, **options: Any) -> Compute:
    """What one call spends by unit; options as of `CostModel.spend`."""
    executed, dense = costs.spend(run, real, *more, **options)
    return Compute(_by_modality(executed, modality), _by_modality(dense, modality))


def counted(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[list[int], Trace]:
    """FLOPs inside each decoder layer by torch's counter, and what ran; gates decide before a layer is entered."""
    counter, trace = FlopCounterMode(display=False), Trace()
    with counter, running(trace=trace, **options), torch.no_grad():
        model(**batch, use_cache=False)
    counts = counter.get_flop_counts()
    prefix = f"{type(model).__name__}.model.language_model.layers."
    return [sum(counts[f"{prefix}{index}"].values()) for index in range(LAYERS)], trace


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_layer(family: str) -> None:
    model, batch = build(family, attention="eager"), inputs(family, ROWS)
    costs = CostModel.of(model)
    tokens = batch["input_ids"].shape[1]
    flops, _ = counted(model, batch)
    for cost, got in zip(costs.layers, flops, strict=True):
        # The counter sees attention computed over the whole rectangle of queries and keys, pads and future included.
        assert got == 3 * (tokens * cost.linear + tokens**2 * cost.attention)


def test_experts() -> None:
    model, batch = build("qwen3-vl-moe", attention="eager"), inputs("qwen3-vl-moe", ROWS)
    model.set_experts_implementation("eager")  # torch's counter does not see grouped products
    tokens = batch["input_ids"].shape[1]
    flops, _ = counted(model, batch)
    for cost, got in zip(CostModel.of(model).layers, flops, strict=True):
        assert got == 3 * (tokens * cost.linear + tokens**2 * cost.attention)
        assert cost.mlp == 2 * (2 * 3 * 12 * 32 + 4 * 32)  # two of four experts with three maps each, and their scores
    config = model.config.text_config
    config.num_experts_per_tok = 0
    with pytest.raises(UnsupportedModelError, match=r"has experts, but none of num_experts_per_tok, moe_topk, .* says"):
        CostModel.of(model)


def test_heads_of_keys_without_a_name() -> None:
    model = build("llava")
    costs = CostModel.of(model).layers[0]
    config = model.config.text_config
    config.num_attention_heads, config.num_key_value_heads = 2, None
    assert CostModel.of(model).layers[0].kv_bytes == costs.kv_bytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[2:]], ids=["batch", "one row"])
def test_gathered_execution(family: str, kv: str, rows: list[list[int | str]]) -> None:
    model, batch = build(family, attention="eager"), inputs(family, rows)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    PATTERNS["gates"](model)
    costs = CostModel.of(model)
    flops, trace = counted(model, batch, route="packed")  # the other spends more, to save time
    step = trace.steps[0]
    assert (step.run.sum((1, 2)) < step.real.sum()).all()  # no layer runs as a whole, pads and all
    without_pairs = CostModel(tuple(replace(cost, attention=0.0) for cost in costs.layers))
    linear = step_compute(without_pairs, step.run.float(), step.modality, step.real, kv)  # type: ignore[arg-type]
    real = int(step.real.sum())
    for index, (cost, got) in enumerate(zip(costs.layers, flops, strict=True)):
        run = step.run[index].sum(1)
        # Attention is computed over a rectangle: as many queries as the fullest row has.
        queries, keys = int(run.max()), int(run.max()) if kv == "evict" else step.real.shape[1]
        rectangle = len(rows) * queries * keys * cost.attention if queries else 0
        assert got == float(linear.executed[index].sum()) - real * cost.gate + rectangle
        # What the model counts instead, the pairs a token can see, is never more.
        pairs = step_compute(costs, step.run.float(), step.modality, step.real, kv)  # type: ignore[arg-type]
        assert pairs.executed[index].sum() - linear.executed[index].sum() <= rectangle


@pytest.mark.parametrize("decide_at", [None, (0,)])
def test_gates_cost_the_same_wherever_they_decide(decide_at: tuple[int, ...] | None) -> None:
    model, batch = build("llava", attention="eager"), inputs("llava", ROWS)
    attach(model, RouterConfig(decide_at=decide_at))
    totals = []
    for mode in ("dense", "masked"):
        counter = FlopCounterMode(display=False)
        with counter, running(mode=mode), torch.no_grad():  # type: ignore[arg-type]
            model(**batch, use_cache=False)
        totals.append(counter.get_total_flops())
    gates = sum(layer.gate for layer in CostModel.of(model).layers)
    assert totals[1] - totals[0] == batch["input_ids"].numel() * gates  # pads decide too


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_layers_that_attend_to_images(kv: str) -> None:
    """Linear maps and attention by token, the keys and values of images once, and nothing without images."""
    model, batch = build("mllama", attention="eager"), inputs("mllama", ROWS)
    costs = CostModel.of(model)
    states = batch["cross_attention_mask"][0, 0].numel() * model.model.vision_model.num_patches
    tokens = batch["input_ids"].shape[1]
    flops, _ = counted(model, batch)
    cost = costs.layers[1]
    assert [layer.image > 0 for layer in costs.layers] == [False, True, False, False]
    assert (cost.keys_values, cost.kv_bytes) == (0, 0)
    assert cost.linear + cost.image == costs.layers[0].linear
    assert flops[1] == 3 * (tokens * (cost.linear + states * cost.attention) + states * cost.image)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    PATTERNS["gates"](model)
    flops, trace = counted(model, batch)
    compute = trace_compute(costs, trace.steps)
    run, real = trace.steps[0].run[1].sum(1), int(trace.steps[0].real.sum())
    assert 0 < run.sum() < real
    rectangle = (3 * run.max() - run.sum()) * states * cost.attention  # as many queries as the fullest row has
    assert flops[1] == pytest.approx(float(compute.executed[1].sum() - real * cost.gate + rectangle))
    expected = real * (cost.linear + states * cost.attention) + 3 * states * cost.image
    assert float(compute.dense[1].sum()) == pytest.approx(expected)
    text = Trace()
    with running(trace=text), torch.no_grad():
        model(**inputs("mllama", ROWS[1:2]))
    nothing = trace_compute(costs, text.steps)
    assert nothing.executed[1].sum() == nothing.dense[1].sum() == 0


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_images_cost_once_in_a_generation(kv: str) -> None:
    model, batch = build("mllama"), inputs("mllama", ROWS)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    costs, trace = CostModel.of(model), Trace()
    with running(trace=trace, policy=PATTERNS["tokens"](model)):
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    states = trace.steps[0].images.held
    assert [step.images for step in trace.steps] == [(states, states), *[(states, 0)] * 3]
    cost, run = costs.layers[1], sum(int(step.run[1].sum()) for step in trace.steps)
    real = sum(int(step.real.sum()) for step in trace.steps)
    executed = run * (cost.linear + states * cost.attention) + real * cost.gate + 3 * states * cost.image
    torch.testing.assert_close(trace_compute(costs, trace.steps).executed[1].sum().item(), executed)


def test_what_a_profile_counts_is_what_a_trace_counts() -> None:
    model, batch = build("mllama"), inputs("mllama", [["image", 5, 6, 7], ["image", 8, 9, 10]])
    costs, trace = CostModel.of(model), Trace()
    attach(model)
    with running(trace=trace), torch.no_grad():
        model(**batch)
    (step,) = trace.steps
    length = step.real.shape[1]
    tokens = torch.tensor([[length - 1.0, 1.0]]).expand(LAYERS, -1)  # one token stands for the image
    keys = torch.tensor([[sum(range(2, length + 1)) / (length - 1), 1.0]]).repeat(LAYERS, 1)
    keys[1] = step.images.held
    torch.testing.assert_close(2 * costs.dense(tokens, keys), trace_compute(costs, trace.steps).dense.sum().item())


def brute_force(
    costs: CostModel, run: Tensor, modality: Tensor, real: Tensor, kv: str, held: Tensor, seen: Tensor
) -> Compute:
    """One token after the other."""
    executed, dense = torch.zeros(len(costs.layers), 2).double(), torch.zeros(len(costs.layers), 2).double()
    for layer, cost in enumerate(costs.layers):
        for row in range(len(real)):
            keys, everything = float(held[layer, row]), float(seen[row])
            for token in range(real.shape[1]):
                if not real[row, token]:
                    continue
                m, runs = int(modality[row, token]), bool(run[layer, row, token])
                everything += 1
                keys += runs or kv == "retain"
                dense[layer, m] += cost.linear + cost.attention * everything
                executed[layer, m] += cost.gate
                if runs:
                    executed[layer, m] += cost.linear + cost.attention * keys
                elif kv == "retain":
                    executed[layer, m] += cost.keys_values
    return Compute(executed, dense)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["retain", "evict"]))
@settings(max_examples=40, deadline=None)
def test_step_compute(seed: int, kv: str) -> None:
    generator = torch.Generator().manual_seed(seed)

    def coin(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    run, modality, real = coin(3, 2, 5), coin(2, 5).long(), coin(2, 5)
    seen = torch.tensor([4.0, 0.0]).double()
    # Under `retain` a layer holds all that was seen.
    held = seen.expand(3, -1) if kv == "retain" else torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 0.0]]).double()
    got = step_compute(COSTS, run.double(), modality, real, kv, held, seen)  # type: ignore[arg-type]
    expected = brute_force(COSTS, run & real, modality, real, kv, held, seen)
    torch.testing.assert_close(got.executed, expected.executed)
    torch.testing.assert_close(got.dense, expected.dense)
    first = step_compute(COSTS, run.double(), modality, real, kv)  # type: ignore[arg-type]
    nothing = torch.zeros(3, 2)
    torch.testing.assert_close(
        first.executed, brute_force(COSTS, run & real, modality, real, kv, nothing, nothing[0]).executed
    )


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_soft_decisions_cost_what_is_expected(kv: str) -> None:
    """With independent decisions the formula is the expectation, so its gradient is the price of deciding otherwise."""
    probability = torch.rand(3, 1, 4).double().requires_grad_()
    modality, real = torch.tensor([[1, 0, 1, 0]]), torch.tensor([[True, True, True, False]])

    def executed(run: Tensor) -> Tensor:
        return step_compute(COSTS, run, modality, real, kv).executed.sum()  # type: ignore[arg-type]

    expected = torch.zeros(()).double()
    for decisions in itertools.product([0.0, 1.0], repeat=4):
        run = torch.tensor(decisions).double().expand(3, 1, 4)
        for layer in range(3):
            chance = torch.where(run[layer] > 0, probability[layer], 1 - probability[layer]).prod()
            one = CostModel(COSTS.layers[layer : layer + 1])
            cost = step_compute(one, run[layer : layer + 1], modality, real, kv).executed.sum()  # type: ignore[arg-type]
            expected = expected + chance * cost
    total = executed(probability)
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total, probability)
    for place in itertools.product(range(3), range(4)):
        layer, token = place
        with torch.no_grad():
            on, off = probability.detach().clone(), probability.detach().clone()
            on[layer, 0, token], off[layer, 0, token] = 1.0, 0.0
            torch.testing.assert_close(gradient[layer, 0, token], executed(on) - executed(off))
    assert (gradient[:, 0, :3] > 0).all()
    assert not gradient[:, 0, 3].any()  # padding


@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_generation(kv: str, pattern: str) -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    policy, trace = PATTERNS[pattern](model), Trace()
    costs = CostModel.of(model)
    with running(policy=policy, trace=trace):
        for _ in range(2):
            model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert len(trace.steps) == 8
    one = trace_compute(costs, trace.steps[:4])
    twice = trace_compute(costs, trace.steps)
    torch.testing.assert_close(twice.executed, 2 * one.executed)
    whole = {
        name: torch.cat([getattr(step, name) for step in trace.steps[:4]], dim=-1)
        for name in ("run", "modality", "real")
    }
    nothing = torch.zeros(LAYERS, 3)
    expected = brute_force(costs, **whole, kv=kv, held=nothing, seen=nothing[0])
    torch.testing.assert_close(one.executed, expected.executed)
    torch.testing.assert_close(one.dense, expected.dense)
    assert 0 < one.share < 1


def test_share() -> None:
    modality, real = torch.tensor([[0, 1, 1]]), torch.ones(1, 3, dtype=torch.bool)
    everything, nothing = torch.ones(3, 1, 3), torch.zeros(3, 1, 3)
    free = CostModel(tuple(replace(cost, gate=0.0) for cost in COSTS.layers))
    for kv in ("retain", "evict"):
        assert step_compute(free, everything, modality, real, kv).share == 1  # type: ignore[arg-type]
    assert step_compute(free, nothing, modality, real, "evict").share == 0
    kept = sum(cost.keys_values for cost in COSTS.layers) * 3
    assert step_compute(free, nothing, modality, real, "retain").executed.sum() == kept


def test_saving_is_the_difference_a_token_makes() -> None:
    modality, real = torch.tensor([[0, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)
    run = torch.ones(3, 1, 3).double()
    less = run.clone()
    less[:, 0, 2] = 0  # the last token, which sees three keys and is seen by nobody
    for kv in ("retain", "evict"):
        before, after = (step_compute(COSTS, r, modality, real, kv).executed[:, 0] for r in (run, less))  # type: ignore[arg-type]
        saving = COSTS.saving(torch.full((3, 2), 3.0).double(), kv)  # type: ignore[arg-type]
        torch.testing.assert_close(before - after, saving[:, 0])


def test_gates_and_lora_do_not_count() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("qwen2.5-vl")
    costs = CostModel.of(model)
    attach(model)
    assert CostModel.of(model) == costs
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert CostModel.of(tuned, "base_model.model.model.language_model.layers") == costs
    with torch.device("meta"):
        assert CostModel.of(build("qwen2.5-vl")) == costs
    assert CostModel.from_json(costs.to_json()) == costs


def test_bytes() -> None:
    model = build("llava")
    assert [cost.kv_bytes for cost in CostModel.of(model).layers] == [2 * 16 * 4] * LAYERS
    assert CostModel.of(model.to(torch.bfloat16)).layers[0].kv_bytes == 2 * 16 * 2


def test_errors() -> None:
    model = build("llava")
    model.model.language_model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(UnsupportedModelError, match="`Sequential`: no attention with `head_dim` and `config` found"):
        CostModel.of(model)
    steps: list[Step] = []
    with pytest.raises(ValueError, match=r"`steps`: got none; run the model inside `with running\(trace=trace\)`"):
        trace_compute(COSTS, steps)
