"""Keys and values of skipped tokens cost their projections and nothing else, and that only when somebody reads."""

import pickle

import pytest
import torch
from tiny_models import FAMILIES, ROWS, build, inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skipit.router import FixedUnits, attach, detach, running
from skipit.router.views import without

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
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: executed.append(len(out)))
    counter = FlopCounterMode(display=False)
    with counter, running(policy=NOTHING, kv="retain"), torch.no_grad():
        cache = model(**batch).past_key_values
        unread = counter.get_total_flops()
        assert all(layer.keys.shape[-2] == batch["input_ids"].shape[1] for layer in cache.layers)  # now they are made
    retain = counter.get_total_flops()
    with counter, running(policy=NOTHING, kv="evict"), torch.no_grad():
        model(**batch)
    evict = counter.get_total_flops()
    assert unread == evict
    tokens = batch["input_ids"].numel()
    assert retain - evict == tokens * sum(projections(layer) for layer in model.get_decoder().layers)
    assert not executed


def test_a_view_has_other_parts_and_changes_nothing() -> None:
    class Quantized(nn.Linear):
        pass

    attention = nn.ModuleDict({"q_proj": Quantized(3, 5), "k_proj": nn.Linear(3, 5), "v_proj": nn.Identity()})
    layer = nn.ModuleDict({"self_attn": attention, "mlp": nn.Linear(3, 5)})
    before, x = dict(layer.named_modules()), torch.randn(2, 3)
    for module in (layer, attention):
        view = without(module, "q_proj", "v_proj")
        inside = view["self_attn"] if module is layer else view
        assert type(view) is type(module)
        assert torch.equal(inside["q_proj"](x), torch.zeros(2, 5))
        assert inside["q_proj"].weight is attention["q_proj"].weight  # everything else is the module's
        assert torch.equal(inside["k_proj"](x), attention["k_proj"](x))
        assert inside["v_proj"] is attention["v_proj"]  # a layout of its own is left alone
    assert dict(layer.named_modules()) == before
    assert attention["q_proj"](x).any()
    assert without(layer["mlp"], "q_proj") is layer["mlp"]


def test_layers_of_a_gated_model_can_be_pickled() -> None:
    model, batch = build("qwen2.5-vl"), inputs("qwen2.5-vl", ROWS)
    attach(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.model.language_model = pickle.loads(pickle.dumps(model.model.language_model))
        assert torch.equal(model(**batch).logits, expected)
    detach(model)


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
