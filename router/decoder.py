"""Finding the decoder layers of a model, whatever its family, and what kind each of them is."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import DecoderNotFoundError


def find_decoder(model: nn.Module, layers: str | None = None) -> tuple[str, nn.Module, nn.ModuleList]:
    """Find the decoder of a model: the module whose layers turn embeddings into next-token states.

    Args:
        model: any model; vision-language models of transformers are found by `get_decoder()`.
        layers: dotted path of the layer list, for models that are not found by themselves.

    Returns:
        The path of the layer list, the module that holds it, and the list.

    Raises:
        DecoderNotFoundError: no layer list at the path, or none found; the message lists the module lists there are.
    """
    if layers is None and isinstance(model, PreTrainedModel):
        stack = getattr(model.get_decoder(), "layers", None)
        layers = next((name for name, module in model.named_modules() if module is stack), None)
    if layers is not None:
        try:
            stack = model.get_submodule(layers)
        except AttributeError:
            stack = None
        if isinstance(stack, nn.ModuleList) and len(stack) > 0:
            parent, _, _ = layers.rpartition(".")
            return layers, model.get_submodule(parent), stack
    raise DecoderNotFoundError(_describe(model, layers))


# Kinds of attention in which a token may be left out: what others see is a matter of masks alone, or not of tokens.
GATED_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "cross_attention")


def layer_kinds(config: Any) -> list[str]:
    """The kind of every decoder layer, in transformers' names, from a decoder's configuration.

    `full_attention`, `sliding_attention` and `chunked_attention` attend to the sequence itself, `cross_attention` to
    images, which are not in the sequence; others, such as `linear_attention`, keep a state.
    """
    count = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    if len(kinds) != count:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * count
    for index in getattr(config, "cross_attention_layers", None) or []:
        kinds[index] = "cross_attention"
    return ["full_attention" if kind == "attention" else kind for kind in kinds]


def image_layers(config: Any) -> frozenset[int]:
    """The layers whose keys and values come from images and not from tokens: those of kind `cross_attention`."""
    return frozenset(index for index, kind in enumerate(layer_kinds(config)) if kind == "cross_attention")


def unsupported_reason(config: Any) -> str | None:
    """Why layers with this decoder configuration cannot have gates; None if they can."""
    for kind in layer_kinds(config):
        if kind not in GATED_KINDS:
            kinds = ", ".join(known.removesuffix("_attention") for known in GATED_KINDS)
            return f"{kind.replace('_', '-')} layers; a token can be left out of attention that is {kinds}, no other."
    return None


def _describe(model: nn.Module, layers: str | None) -> str:
    wanted = f"no decoder layers at `layers={layers!r}`" if layers else "no decoder layers"
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    example = lists[-1].split(" ")[0] if lists else "model.layers"
    return (
        f"{wanted} in `{type(model).__name__}`. Module lists found: {', '.join(lists) or 'none'}. "
        f'Name one: RouterConfig(layers="{example}").'
    )
