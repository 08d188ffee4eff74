"""The router of a checkpoint that vLLM serves, and what must be known of the model around it; read once per process."""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from skipit.router import RouterConfig, UnsupportedModelError, attach
from skipit.router.attach import gated_layers
from skipit.router.checkpoint import ROUTER_FILE, load_router, local_folder
from skipit.router.costs import LayerCost, layer_costs
from skipit.router.decoder import find_decoder

from .requests import check_servable


@dataclass(frozen=True)
class Served:
    """A gated checkpoint.

    Attributes:
        config: of its router.
        gates: parameters of all gates, `weight` [layers, modalities, dim] and `bias` [layers, modalities].
        costs: of all layers.
        layers: where its decoder layers are, by the path inside the model without its head.
        parts: the names of a layer's attention and of its MLP.
        architectures: of the untouched model.
    """

    config: RouterConfig
    gates: dict[str, Tensor]
    costs: tuple[LayerCost, ...]
    layers: str
    parts: tuple[str, str]
    architectures: list[str]


def is_gated(model: str, revision: str | None = None) -> bool:
    """Whether a folder, or what a Hub id stands for, has a router."""
    if Path(model).exists():
        return (Path(model) / ROUTER_FILE).is_file()
    from transformers.utils.hub import cached_file

    try:
        return (
            cached_file(model, ROUTER_FILE, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
        )
    except OSError:  # not on the Hub, or no network: vLLM says what it makes of that
        return False


@cache
def served(model: str, revision: str | None = None) -> Served:
    """Read a gated checkpoint; its weights are not looked at.

    Args:
        model: folder or Hub id.
        revision: on the Hub.

    Raises:
        CheckpointError: damaged.
        RouterConfigError: settings that cannot be served.
        UnsupportedModelError: a model that cannot.
    """
    folder = local_folder(model, revision=revision)
    config, gates = load_router(folder)
    check_servable(config)
    untouched = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(copy.deepcopy(untouched), trust_remote_code=False)
    router = attach(empty, config)
    if router.image_layers:
        raise UnsupportedModelError(
            f"`{type(empty).__name__}` attends to images that are not among its tokens, in layers "
            f"{sorted(router.image_layers)}; vLLM's transformers backend does not serve these. Use `skipit.load`."
        )
    if any(parameter.dim() == 3 for layer in gated_layers(empty) for parameter in layer.parameters()):
        raise UnsupportedModelError(
            f"`{type(empty).__name__}` has experts, with which gates were not tried under vLLM. Use `skipit.load`, or "
            "serve it without gates: SKIPIT_VLLM=0."
        )
    parts = {layer.skipit_parts for layer in gated_layers(empty)}
    if len(parts) != 1 or None in parts:
        raise UnsupportedModelError(
            f"the layers of `{type(empty).__name__}` are not all one attention and one MLP, which is what gates need "
            "under vLLM. Use `skipit.load`, or serve it without gates: SKIPIT_VLLM=0."
        )
    _, decoder, layers = find_decoder(empty, config.layers)
    costs = layer_costs(layers, int(decoder.config.hidden_size), frozenset())  # type: ignore[union-attr, arg-type]
    inside = next(name for name, module in empty.base_model.named_modules() if module is layers)
    return Served(config, gates, costs, inside, parts.pop(), list(untouched.architectures or []))  # type: ignore[arg-type]
