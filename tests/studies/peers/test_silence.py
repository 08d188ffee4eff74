"""Operators that visual tokens skip: what answers notice, the order, and that a layer skips what it is told to."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router import FixedUnits, Trace, attach, running
from skipit.router.config import Unit
from skipit.theory.cost import CostModel
from studies.answers import always, answers
from studies.peers.choices import with_gate_cost
from studies.peers.policies import Watched
from studies.peers.silence import (
    OperatorRates,
    OperatorSkips,
    noticed,
    operator_flops,
    quietest,
    shuffled,
    units_by_layer,
)

L = tiny_models.LAYERS


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = tiny_models.build("llava")
    attach(model)
    units_by_layer(model)
    return model


@pytest.fixture(scope="module")
def costs(model: Any) -> CostModel:
    return with_gate_cost(CostModel.of(model), 0.0)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tiny_models.labelled("llava")


def test_operators_are_skipped_in_order(costs: CostModel) -> None:
    skips = OperatorSkips([(2, "mlp"), (1, "attention"), (2, "attention"), (0, "mlp")], costs)
    policy, _ = skips.at(0.25)
    assert policy.rate.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    assert policy.units[2] == "mlp"
    policy, _ = skips.at(0.5)
    assert (policy.rate[1:3, 1].tolist(), policy.units[1:3]) == ([0, 0], ("attention", "mlp"))
    policy, _ = skips.at(0.75)
    assert (policy.rate[:, 1].tolist(), policy.units[1:3]) == ([1, 0, 0, 1], ("attention", "block"))
    policy, _ = skips.at(0.375)
    assert policy.rate[1].tolist() == [1, 0.5]
    policy, _ = skips.at(0.625)  # half of the second operator of layer 2
    first, second = operator_flops(costs, (2, "mlp")), operator_flops(costs, (2, "attention"))
    assert policy.units[2] == "block"
    assert float(policy.rate[2, 1]) == pytest.approx(1 - (first + second / 2) / (first + second))


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("unit", ["attention", "mlp", "block"])
def test_a_layer_skips_what_it_is_told_to(model: Any, unit: Unit, mode: str, batch: dict[str, Tensor]) -> None:
    table = torch.ones(L, 2)
    table[1, 1] = 0
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    units: tuple[Unit, ...] = ("mlp", unit, "attention", "block")
    got = tiny_models.logits(model, inputs, policy=OperatorRates(table, 0, units), kv="retain", mode=mode)
    want = tiny_models.logits(model, inputs, policy=FixedUnits(table.bool()), kv="retain", unit=unit, mode=mode)
    real = batch["attention_mask"].bool()
    assert tiny_models.same(got[real], want[real])
    assert not tiny_models.same(got[real], tiny_models.logits(model, inputs, mode="dense")[real])


def test_masked_is_gathered_where_layers_differ_and_training_sees_the_same(
    model: Any, costs: CostModel, batch: dict[str, Tensor]
) -> None:
    policy, _ = OperatorSkips([(0, "mlp"), (2, "attention"), (1, "mlp"), (1, "attention"), (3, "mlp")], costs).at(0.7)
    inputs, real = {k: v for k, v in batch.items() if k != "labels"}, batch["attention_mask"].bool()
    assert policy.units == ("mlp", "block", "attention", "block")
    assert 0 < policy.rate[1, 1] < 1
    gathered = tiny_models.logits(model, inputs, policy=policy, kv="retain", mode="gathered")[real]
    for same in (policy, Watched(policy, [])):
        assert tiny_models.same(
            tiny_models.logits(model, inputs, policy=same, kv="retain", mode="masked")[real], gathered
        )


def test_skipped_operators_are_not_computed(model: Any) -> None:
    batch = tiny_models.inputs("llava", tiny_models.ROWS[:1])
    table = torch.ones(L, 2)
    table[:3, 1] = 0
    seen: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output.shape[:-1].numel()})

    layers = model.model.language_model.layers
    handles = [layers[i].mlp.down_proj.register_forward_hook(count(f"mlp {i}")) for i in range(L)]
    handles += [layers[i].self_attn.q_proj.register_forward_hook(count(f"attention {i}")) for i in range(L)]
    policy = OperatorRates(table, 0, ("attention", "mlp", "block", "block"))
    with running(trace=Trace(), route="packed"):
        tiny_models.logits(model, batch, policy=policy, kv="retain", mode="gathered")
    for handle in handles:
        handle.remove()
    every, text = batch["input_ids"].numel(), int((batch["input_ids"] != tiny_models.IMAGE).sum())
    assert seen == {
        **{"attention 0": text, "mlp 0": every, "attention 1": every, "mlp 1": text},
        **{"attention 2": text, "mlp 2": text, "attention 3": every, "mlp 3": every},
    }


def test_what_is_planned_is_what_is_spent_and_falls_to_a_floor(
    model: Any, costs: CostModel, batch: dict[str, Tensor]
) -> None:
    skips = OperatorSkips(shuffled(L, 1), costs, seed=2)
    steps = answers(model, [batch], always({})).steps
    shares = []
    for x in (0.0, 0.2, 0.45, 0.7, 0.9, 1.0):
        policy, own = skips.at(x)
        spent = answers(model, [batch], always({"policy": policy, "kv": "retain"})).share(own)
        assert skips.share(x, steps) == pytest.approx(spent, rel=1e-12)
        shares.append(spent)
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    everything = OperatorRates(torch.tensor([[1.0, 0.0]] * L))  # its units are those of a block
    floor = answers(model, [batch], always({"policy": FixedUnits(everything.rate.bool()), "kv": "retain"})).share(costs)
    assert shares[-1] == pytest.approx(floor, rel=1e-12)


def test_answers_notice_what_changes_them(model: Any, costs: CostModel, batch: dict[str, Tensor]) -> None:
    layer = model.model.language_model.layers[1]
    kept = layer.mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        found = noticed(model, [batch])
        layer.mlp.down_proj.weight.copy_(kept)
    assert found[1, "mlp"] == pytest.approx(0, abs=1e-9)
    assert found[L - 1, "attention"] == pytest.approx(0, abs=1e-9)  # no answer reads the last layer's vision states
    assert found[0, "mlp"] > 1e-6
    again = noticed(model, [batch])
    assert again[1, "mlp"] > 1e-9
    order = quietest(found, costs)
    assert len(set(order)) == 2 * L
    assert set(order[:3]) == {(1, "mlp"), (L - 1, "attention"), (L - 1, "mlp")}


def test_per_flop_and_not_by_effect_alone(costs: CostModel) -> None:
    mlp, attention = operator_flops(costs, (0, "mlp")), operator_flops(costs, (0, "attention"))
    assert quietest({(0, "mlp"): 0.9 * mlp, (0, "attention"): attention}, costs)[0] == (0, "mlp")


def test_random_orders_are_of_all_operators_and_differ() -> None:
    orders = [shuffled(L, seed) for seed in range(3)]
    assert all(len(set(order)) == 2 * L for order in orders)
    assert len({str(order) for order in orders}) == 3
