"""Peers' learned gates: their formulas, and that masked and gathered execution agree with what they scale."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from skipit.router import Gated, Trace, attach, gated_layers, running, set_gates
from studies.peers.gates import (
    DLLMGate,
    FlexiGate,
    linear_flops,
    pmod_weight,
    scale_by_router,
    scale_vision,
    zero_gates,
)
from studies.peers.policies import TopVision, UnitRates, Watched

L, WIDTH = tiny_models.LAYERS, tiny_models.WIDTH
KEEP = torch.tensor([1.0, 0.75, 0.5, 0.25])


def pmod(seed: int = 3) -> Any:
    model = tiny_models.build("llava")
    attach(model)
    generator = torch.Generator().manual_seed(seed)
    set_gates(model, torch.randn(L, 2, WIDTH, generator=generator), torch.zeros(L, 2))
    scale_vision(model)
    return model


def flexi() -> Any:
    model = tiny_models.build("llava")
    attach(model)
    torch.manual_seed(3)
    for layer in gated_layers(model):
        gate = FlexiGate(WIDTH, model.config.text_config.intermediate_size)
        nn.init.normal_(gate.out.weight)
        nn.init.normal_(gate.head.weight)
        nn.init.zeros_(gate.head.bias)
        layer.layer_gate = gate
    scale_by_router(model)
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tiny_models.inputs("llava", tiny_models.ROWS)


SYSTEMS = {"p-mod": (pmod, TopVision(KEEP), "evict"), "flexidepth": (flexi, Gated(), "retain")}


@pytest.mark.parametrize("name", SYSTEMS)
def test_masked_is_gathered_and_padding_changes_nothing(name: str, batch: dict[str, Tensor]) -> None:
    build, policy, kv = SYSTEMS[name]
    model, trace = build(), Trace()
    with running(trace=trace):
        gathered = tiny_models.logits(model, batch, policy=policy, kv=kv, mode="gathered")
    real = batch["attention_mask"].bool()
    share = trace.steps[0].run.sum() / (L * real.sum())
    assert 0.2 < share < 0.95
    masked = tiny_models.logits(model, batch, policy=policy, kv=kv, mode="masked")
    assert tiny_models.same(gathered[real], masked[real])
    for index, row in enumerate(tiny_models.ROWS):
        alone = tiny_models.logits(model, tiny_models.inputs("llava", [row]), policy=policy, kv=kv, mode="gathered")
        assert tiny_models.same(alone[0], gathered[index][real[index]])


@pytest.mark.parametrize("name", SYSTEMS)
def test_watched_training_sees_the_same_and_gates_learn(name: str, batch: dict[str, Tensor]) -> None:
    build, policy, kv = SYSTEMS[name]
    model = build()
    want = tiny_models.logits(model, batch, policy=policy, kv=kv, mode="masked")
    watched = Watched(policy, [], soft=True)
    with running(policy=watched, kv=kv, mode="masked"):
        got = model(**batch, use_cache=False).logits
    assert tiny_models.same(got.detach(), want)
    assert len(watched.seen) == L
    got[batch["attention_mask"].bool()].square().sum().backward()
    for layer in list(gated_layers(model))[1:]:
        grads = [p.grad for p in layer.layer_gate.parameters() if p.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads)
        assert sum(float(grad.abs().sum()) for grad in grads) > 0


def test_new_pmod_gates_change_nothing_but_who_runs(batch: dict[str, Tensor]) -> None:
    model = pmod()
    zero_gates(model)
    assert torch.equal(pmod_weight(torch.zeros(3)), torch.ones(3))
    plain = tiny_models.build("llava")
    attach(plain)
    zero_gates(plain)
    policy = TopVision(KEEP)
    got = tiny_models.logits(model, batch, policy=policy, kv="evict")
    assert tiny_models.same(got, tiny_models.logits(plain, batch, policy=policy, kv="evict"))


def test_scaling_is_left_out_for_other_policies(batch: dict[str, Tensor]) -> None:
    model = pmod()
    dense = tiny_models.logits(model, batch, mode="dense")
    assert tiny_models.same(tiny_models.logits(model, batch, policy=UnitRates(torch.ones(L, 2))), dense)


def test_flexidepth_open_is_the_model_with_weighted_mlps() -> None:
    model, batch = flexi(), tiny_models.inputs("llava", tiny_models.ROWS[:1])
    for layer in gated_layers(model):
        nn.init.zeros_(layer.layer_gate.head.weight)
        nn.init.constant_(layer.layer_gate.head.bias, 40.0)  # w = 1
    dense = tiny_models.logits(model, batch, mode="dense")
    assert tiny_models.same(tiny_models.logits(model, batch, policy=Gated()), dense)
    for layer in gated_layers(model):
        nn.init.constant_(layer.layer_gate.head.bias, 0.0)  # w = 0.5
    half = tiny_models.logits(model, batch, policy=Gated(-1.0))
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.weight.data.mul_(0.5)
    assert tiny_models.same(half, tiny_models.logits(model, batch, mode="dense"))


def test_dllm_gates_start_open_and_are_random_only_while_training() -> None:
    gate = DLLMGate(WIDTH)
    hidden, modality = torch.randn(2, 300, WIDTH), torch.zeros(2, 300, dtype=torch.long)
    assert torch.equal(gate.eval()(hidden, modality), gate(hidden, modality))
    gate.train()
    first, second = gate(hidden, modality), gate(hidden, modality)
    assert not torch.equal(first, second)
    with torch.no_grad():
        for parameter in gate.net[-1].parameters():
            parameter.zero_()
    # The difference of two Gumbel draws: logistic, of variance pi^2 / 3.
    assert float(gate(hidden, modality).detach().var()) == pytest.approx(torch.pi**2 / 3, rel=0.2)
    gate.net[-1].bias.data.copy_(torch.tensor([0.1, 2.0]))
    assert gate.eval()(hidden, modality)[0, 0].item() == pytest.approx(1.9, abs=1e-5)


def test_flops_of_gates_are_those_of_their_maps() -> None:
    gate = FlexiGate(64, 160)
    assert gate.router_flops == 2 * (64 * 4 + 4 * 64 + 64)
    assert gate.adapter_flops == 2 * 3 * 64 * 10
    assert linear_flops(DLLMGate(64)) == 2 * (64 * 8 + 8 * 2)
