"""What decoder layers cost in floating-point operations, read off their modules.

A multiply-accumulate counts as 2 FLOPs. Counted are all linear maps of a layer, attention scores and their
weighted sum over the keys a query can see, and the gates themselves; norms, activations and softmax are not
(below 1 % of a layer).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .modality import MODALITIES

# The names under which transformers' configurations keep the number of experts per token.
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k")


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one decoder layer.

    Attributes:
        linear: per token, all linear maps that are applied to tokens; of experts, those that a token goes to.
        keys_values: per token, the key and value projections among them: what `retain` still pays for a skip.
        attention: per pair of a query token and a key it can see.
        mlp: per token, the linear maps outside attention: what skipping the MLP alone saves.
        gate: per token, scoring it.
        kv_bytes: bytes of cache per token.
        image: per image state, its key and value, in a cross-attention layer; 0 in any other.
    """

    linear: float
    keys_values: float
    attention: float
    mlp: float
    gate: float
    kv_bytes: int
    image: float = 0.0


def layer_costs(layers: Iterable[nn.Module], width: int, of_images: frozenset[int]) -> tuple[LayerCost, ...]:
    """The cost of every decoder layer, in order.

    Args:
        layers: of the decoder, with or without gates; the meta device is enough.
        width: of its states.
        of_images: the layers whose keys and values come from images.

    Raises:
        UnsupportedModelError: a layer has no attention whose heads can be read off.
    """
    return tuple(_layer_cost(layer, width, index in of_images) for index, layer in enumerate(layers))


def _layer_cost(layer: nn.Module, width: int, of_images: bool) -> LayerCost:
    attention = next((m for m in layer.modules() if hasattr(m, "head_dim") and hasattr(m, "config")), None)
    if attention is None:
        raise UnsupportedModelError(f"`{type(layer).__name__}`: no attention with `head_dim` and `config` found.")
    config: Any = attention.config
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    heads = int(config.num_attention_heads)
    # Decoders without grouped queries, such as OPT's, have no name for it.
    kv_width = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
    linear, keys_values = _linear(layer) + _experts(layer, width, config), 2 * 2 * width * kv_width
    size = next(layer.parameters()).element_size()
    return LayerCost(
        linear=float(linear - keys_values if of_images else linear),
        keys_values=0.0 if of_images else float(keys_values),
        attention=float(4 * heads * head_dim),
        mlp=float(linear - _linear(attention)),
        gate=float(2 * width * len(MODALITIES)),
        kv_bytes=0 if of_images else 2 * kv_width * size,
        image=float(keys_values if of_images else 0),
    )


def _linear(module: nn.Module) -> int:
    # LoRA's factors are left out: exported, they are merged into the maps they adapt.
    return sum(
        2 * part.in_features * part.out_features
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and "lora_" not in name
    )


def _experts(layer: nn.Module, width: int, config: Any) -> int:
    """FLOPs of one token in a mixture of experts, whose maps transformers keeps as one tensor [experts, ., .] each.

    Raises:
        UnsupportedModelError: nothing says how many experts a token goes to.
    """
    parts = [part for part in layer.modules() if not isinstance(part, nn.Linear)]
    stacks = [p for part in parts for p in part.parameters(recurse=False) if p.ndim == 3]
    if not stacks:
        return 0
    chosen = next((getattr(config, name) for name in _CHOSEN_EXPERTS if getattr(config, name, None)), None)
    if chosen is None:
        raise UnsupportedModelError(
            f"`{type(layer).__name__}` has experts, but none of {', '.join(_CHOSEN_EXPERTS)} in its configuration says "
            "how many of them a token goes to."
        )
    count = len(stacks[0])
    scores = sum(p.numel() for part in parts for p in part.parameters(recurse=False) if p.shape == (count, width))
    return int(2 * scores + sum(2 * int(chosen) * stack.numel() // count for stack in stacks))
