"""Keys and values of skipped tokens cost their projections and nothing else."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ROWS, build, inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skipit.router import FixedUnits, attach, detach, running
from skipit.router.projections import KeyValueProjection, QueryProjection, only, unwrap_projections, wrap_projections
from skipit.router.subclass import mix_in, take_out

NOTHING = FixedUnits(torch.zeros(4, 2, dtype=torch.bool))


def projections(layer: nn.Module) -> int:
    """FLOPs per token of the key and value projections."""
    attention = layer.self_attn
    return sum(2 * getattr(attention, name).weight.numel() for name in ("k_proj", "v_proj"))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_query_is_projected_for_tokens_that_skip(family: str) -> None:
    model, batch = build(family), inputs(family, ROWS)
    attach(model)
    executed: list[int] = []
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: executed.append(int(out.count_nonzero())))
    counter = FlopCounterMode(display=False)
    with counter, running(policy=NOTHING, kv="retain"), torch.no_grad():
        model(**batch)
    retain = counter.get_total_flops()
    with counter, running(policy=NOTHING, kv="evict"), torch.no_grad():
        model(**batch)
    evict = counter.get_total_flops()
    tokens = int(batch["attention_mask"].sum())
    assert retain - evict == tokens * sum(projections(layer) for layer in model.get_decoder().layers)
    assert executed == [0] * 4


def test_only_within_the_block() -> None:
    layer = nn.ModuleDict({"q_proj": nn.Linear(3, 5), "k_proj": nn.Linear(3, 5)})
    x = torch.randn(2, 3)
    expected = layer["q_proj"](x)
    wrap_projections(layer)
    assert isinstance(layer["q_proj"], QueryProjection)
    assert isinstance(layer["k_proj"], KeyValueProjection)
    assert torch.equal(layer["q_proj"](x), expected)
    keys = layer["k_proj"](x)
    with only("queries"):
        assert torch.equal(layer["q_proj"](x), expected)
        assert not layer["k_proj"](x).any()
        with only("everything"):
            assert torch.equal(layer["k_proj"](x), keys)
    with only("keys and values"):
        assert torch.equal(layer["q_proj"](x), torch.zeros(2, 5))
        with only("keys and values"):
            pass
        assert not layer["q_proj"](x).any()
    with pytest.raises(KeyError), only("keys and values"):
        raise KeyError
    assert torch.equal(layer["q_proj"](x), expected)
    unwrap_projections(layer)
    assert type(layer["q_proj"]) is nn.Linear
    assert torch.equal(layer["q_proj"](x), expected)


def test_other_layouts_are_left_alone() -> None:
    layer = nn.ModuleDict({"qkv": nn.Linear(2, 2), "q_proj": nn.Identity()})
    types = [type(module) for module in layer.modules()]
    wrap_projections(layer)
    assert [type(module) for module in layer.modules()] == types


def test_subclasses_of_linear_keep_their_class() -> None:
    class Quantized(nn.Linear):
        pass

    layer = nn.ModuleDict({"q_proj": Quantized(2, 2)})
    wrap_projections(layer)
    assert isinstance(layer["q_proj"], Quantized)
    assert type(layer["q_proj"]).__name__ == "Quantized"
    unwrap_projections(layer)
    assert type(layer["q_proj"]) is Quantized


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(duplicate: Any) -> None:
    module = nn.Linear(3, 2)
    mix_in(module, QueryProjection)
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert torch.equal(twin.weight, module.weight)
    assert twin.weight is not module.weight
    take_out(twin)
    assert type(twin) is nn.Linear
    assert isinstance(module, QueryProjection)


def test_layers_of_a_gated_model_can_be_pickled() -> None:
    model, batch = build("qwen2.5-vl"), inputs("qwen2.5-vl", ROWS)
    attach(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.model.language_model = pickle.loads(pickle.dumps(model.model.language_model))
        assert torch.equal(model(**batch).logits, expected)
    detach(model)
    assert not any(isinstance(module, QueryProjection) for module in model.modules())


def test_lora_around_the_query_projection() -> None:
    from peft import LoraConfig, get_peft_model

    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    policy = FixedUnits(torch.tensor([[True, False], [False, True], [False, False], [True, True]]))
    real = batch["attention_mask"].bool()
    outputs = []
    for mode in ("masked", "gathered"):
        with running(policy=policy, mode=mode, kv="retain"), torch.no_grad():
            outputs.append(tuned(**batch).logits[real])
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()
    detach(tuned)
    base = model.get_decoder().layers[0].self_attn.q_proj.base_layer
    assert type(base) is nn.Linear
