"""Gates are set and read as two tensors, by whoever holds the model."""

import pytest
import torch
from tiny_models import LAYERS, WIDTH, build, inputs
from torch import nn

from skipit.router import (
    Router,
    RouterConfig,
    SkipItError,
    UnsupportedModelError,
    attach,
    detach,
    find_router,
    gate_state,
    gated_layers,
    set_gates,
)
from skipit.router.gates import TokenGate


def test_gates_are_set_and_read() -> None:
    model = build("llava")
    router = attach(model, RouterConfig(kv="evict"))
    assert isinstance(router, Router)
    assert find_router(model) == (model, router)
    assert router.config.kv == "evict"
    state = gate_state(model)
    assert state["weight"].shape == (LAYERS, 2, WIDTH)
    assert not state["weight"].any()
    assert (state["bias"] == TokenGate.OPEN).all()
    weight, bias = torch.randn(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2)
    set_gates(model, weight, bias)
    assert torch.equal(gate_state(model)["weight"], weight)
    assert torch.equal(gate_state(model)["bias"], bias)
    assert [layer.layer_gate.layer for layer in gated_layers(model)] == list(range(LAYERS))
    assert torch.equal(gated_layers(model)[2].layer_gate.weight, weight[2])


@pytest.mark.parametrize(
    ("weight", "bias"), [((LAYERS, 2, 31), (LAYERS, 2)), ((LAYERS, 2, WIDTH), (3, 2)), ((LAYERS, WIDTH), (LAYERS,))]
)
def test_gates_of_another_model(weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    model = build("llava")
    attach(model)
    with pytest.raises(SkipItError, match=r"gates: got shapes .* and .*, this model needs \(4, 2, 32\) and \(4, 2\)"):
        set_gates(model, torch.zeros(weight), torch.zeros(bias))
    assert (gate_state(model)["bias"] == TokenGate.OPEN).all()


def test_within_other_modules() -> None:
    model, batch = build("llava"), inputs("llava", [[5, "image", 6]])
    expected = model(**batch).logits
    router = attach(model)
    wrapper = nn.ModuleDict({"inner": model})
    assert find_router(wrapper) == (model, router)
    assert len(gated_layers(wrapper)) == LAYERS
    detach(wrapper)
    assert torch.equal(model(**batch).logits, expected)


def test_gates_go_where_the_layers_are() -> None:
    model = build("llava").to("meta")
    attach(model)
    assert all(p.is_meta for layer in gated_layers(model) for p in layer.layer_gate.parameters())


def test_other_hooks_stay() -> None:
    model, batch = build("llava"), inputs("llava", [[5, 6]])
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    attach(model)
    model.register_forward_pre_hook(lambda *_: calls.append("after"))
    model(**batch)
    detach(model)
    model(**batch)
    assert calls == ["before", "after"] * 2
    assert len(model._forward_pre_hooks) == 2
    assert not model._forward_pre_hooks_with_kwargs


def test_a_layer_that_stores_its_keys_otherwise() -> None:
    """Such a layer would compute skipped tokens, so it is refused when it is met."""
    from skipit.router import FixedUnits, running

    model, batch = build("llava"), inputs("llava", [[5, 6, 7]])
    attach(model)
    layer = gated_layers(model)[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    policy = FixedUnits(torch.tensor([[True] * 2, [False] * 2, [True] * 2, [True] * 2]))
    message = "`LlamaDecoderLayer` does not store its keys and values through `past_key_values.update`"
    with running(policy=policy, kv="retain"), pytest.raises(UnsupportedModelError, match=message):
        model(**batch)
