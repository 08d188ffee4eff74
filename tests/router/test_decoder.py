"""The decoder layers of a model are found, or the error lists what could be named."""

import re

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, build
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from skipit.router import DecoderNotFoundError, RouterConfig, UnsupportedModelError, attach, detach, gated_layers
from skipit.router.decoder import find_decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_found(family: str) -> None:
    model = build(family)
    path, decoder, layers = find_decoder(model)
    assert path == "model.language_model.layers"
    assert decoder is model.get_decoder()
    assert layers is decoder.layers
    assert len(layers) == LAYERS
    assert find_decoder(model, path)[2] is layers


def test_a_text_model() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    attach(model)
    assert len(gated_layers(model)) == 2
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 8)


def test_named_layers() -> None:
    model = build("llava")
    attach(model, RouterConfig(layers="model.language_model.layers"))
    assert gated_layers(model) == list(model.get_decoder().layers)
    detach(model)


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (
            nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])}),
            None,
            "no decoder layers in `ModuleDict`. Module lists found: blocks (2 x Linear). "
            'Name one: RouterConfig(layers="blocks").',
        ),
        (
            nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])}),
            "block",
            "no decoder layers at `layers='block'` in `ModuleDict`. Module lists found: blocks (1 x Linear). "
            'Name one: RouterConfig(layers="blocks").',
        ),
        (
            nn.ModuleDict({"blocks": nn.ModuleList()}),
            "blocks",
            "no decoder layers at `layers='blocks'` in `ModuleDict`. Module lists found: none. "
            'Name one: RouterConfig(layers="model.layers").',
        ),
        (
            nn.Sequential(nn.Linear(1, 1)),
            "0",
            "no decoder layers at `layers='0'` in `Sequential`. Module lists found: none. "
            'Name one: RouterConfig(layers="model.layers").',
        ),
    ],
)
def test_not_found(model: nn.Module, layers: str | None, message: str) -> None:
    with pytest.raises(DecoderNotFoundError, match=f"^{re.escape(message)}$"):
        attach(model, RouterConfig(layers=layers))


def test_a_model_without_a_decoder() -> None:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4
    )
    with pytest.raises(DecoderNotFoundError, match=r"no decoder layers in `CLIPVisionModel`.*\(1 x CLIPEncoderLayer\)"):
        find_decoder(CLIPVisionModel(config))


def test_layers_that_are_no_transformers_decoder() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])})
    with pytest.raises(UnsupportedModelError, match="`ModuleDict` has no `config`: gates need a transformers decoder"):
        attach(model, RouterConfig(layers="blocks"))
