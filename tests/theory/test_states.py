"""The one recorder of layer states: what it tells, and that it leaves nothing behind."""

from itertools import pairwise

import pytest
import torch
from tiny_models import LAYERS, build, inputs
from torch import nn

from skipit.theory.measuring import evaluating, frozen, routed
from skipit.theory.states import LayerRun, recorded, watching


class Doubling(nn.Module):
    """States given by name, and an output beside others, as some layers have them."""

    def forward(self, hidden_states: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor, None]:
        return hidden_states * scale, None


def test_watching_tells_of_each_layer_however_it_is_called_and_then_stops() -> None:
    layers, seen, x = nn.ModuleList([Doubling(), Doubling()]), list[LayerRun](), torch.ones(1, 2, 3)
    with watching(layers, seen.append):
        layers[1](layers[0](x)[0], scale=3.0)
        layers[0](hidden_states=x)
    layers[0](x)
    assert [(run.index, int(run.entered.sum()), int(run.left.sum())) for run in seen] == [
        (0, 6, 12),
        (1, 12, 36),
        (0, 6, 12),
    ]
    assert seen[1].kwargs == {"scale": 3.0}
    assert not layers[0]._forward_hooks


def test_recorded_layers_hold_the_graph_between_layers_and_nothing_of_a_cache() -> None:
    model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7]])
    layers = model.get_decoder().layers
    with recorded(layers) as runs:
        model(**batch)
    assert [run.index for run in runs] == list(range(LAYERS))
    assert all(torch.equal(run.left, after.entered) for run, after in pairwise(runs))
    assert torch.autograd.grad(runs[-1].left.sum(), runs[0].entered)[0].any()
    assert not any("past_key_values" in run.kwargs for run in runs)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_model_is_as_it_was_after_an_error() -> None:
    model = build("llava").train()
    still = model.lm_head.weight.requires_grad_(False)
    classes = [type(module) for module in model.modules()]

    def fail() -> None:
        with routed(model), evaluating(model), frozen(model):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.training
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p is not still] == []
