"""Attention over packed tokens: every row's tokens side by side in one sequence, attention row by row.

Norms, projections and MLPs work token by token, so the tokens that run a layer are packed into one sequence
[1, tokens, dim] and the layer's own `forward` is called on it: nothing is padded and nothing is wasted.
Only attention needs the rows back. transformers lets an attention function be registered by name; ours
unpacks the queries into rows, calls the model's usual function and packs the result again.
"""

import sys
from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UnsupportedModelError
from .eviction import KEY_WEIGHT_KWARG, KeyWeights, weighted_attention
from .layout import Layout

LAYOUT_KWARG = "skipit_layout"
OBSERVER_KWARG = "skipit_attention_observer"
# The copy of this code inside a checkpoint, perhaps of another version, registers functions of its own.
PREFIX = "skipit_" if __name__.startswith("skipit.") else f"skipit_{crc32(__name__.encode()):08x}_"
SUPPORTED = ("sdpa", "eager")
SPAN = 128  # tokens; shorter spans look at fewer keys in vain, and keep the kernels less busy


def visible_keys(
    full: Shaped[Tensor, "..."] | None,
    query: Int[Tensor, "batch queries"],
    key: Int[Tensor, "batch keys"],
    past: int,
    alive: Bool[Tensor, "batch keys"] | None = None,
) -> Shaped[Tensor, "batch 1 queries keys"]:
    """The attention mask of some queries over some keys, from the mask over the whole sequence.

    Args:
        full: [batch or 1, 1, seq, past + seq], boolean (True attends) or additive; None is plain causal.
        query: sequence index of each query (-1: none, its row is arbitrary).
        key: sequence index of each key (-1: none, never attended to).
        past: sequence index of the call's first token.
        alive: False for keys that only their own token may see.

    Returns:
        Boolean or additive like `full`.

    Raises:
        UnsupportedModelError: `full` is another kind of mask.
    """
    if full is not None and full.dim() != 4:
        raise UnsupportedModelError(
            f"attention mask: got {full.dim()} dimensions, expected 4. Load the model with attn_implementation='sdpa'."
        )
    allowed = key[:, None, :] >= 0
    if alive is not None:
        allowed = allowed & (alive[:, None, :] | (key[:, None, :] == query[:, :, None]))
    if full is None:
        return (allowed & (key[:, None, :] <= query[:, :, None]))[:, None]
    batch, keys = key.shape
    mask = full[:, 0].expand(batch, -1, -1)
    mask = mask.gather(1, (query - past).clamp(min=0)[:, :, None].expand(-1, -1, mask.shape[-1]))
    mask = mask.gather(2, key.clamp(min=0)[:, None, :].expand(-1, mask.shape[1], keys))
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~allowed, blocked)[:, None]


def _wrap(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Float[Tensor, "rows heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
        mask: Shaped[Tensor, "..."] | None,
        **kwargs: Any,
    ) -> Any:
        layout: Layout | None = kwargs.pop(LAYOUT_KWARG, None)
        observer = kwargs.pop(OBSERVER_KWARG, None)
        learning: KeyWeights | None = kwargs.pop(KEY_WEIGHT_KWARG, None)
        if learning is not None and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            return weighted_attention(query, key, value, *learning, kwargs.get("scaling")), None
        function: Any
        if base == "eager":  # no entry of the interface: every modeling file has its own, with the family's extras
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        if observer is not None:
            mask = observer(module, query, key, value, mask, kwargs.get("scaling"))
        if layout is None:
            return function(module, query, key, value, mask, **kwargs)
        if layout.spans and mask is not None:
            parts = [
                function(module, query[:, :, a:b], key[:, :, :n], value[:, :, :n], mask[:, :, a:b, :n], **kwargs)[0]
                for a, b, n in layout.spans
            ]
            return torch.cat(parts, dim=1), None
        output, weights = function(module, layout.to_rows(query), key, value, mask, **kwargs)
        return layout.from_rows(output), weights

    return attention


def packed_implementation(base: str) -> str:
    """The name of the packed version of an attention implementation.

    Raises:
        UnsupportedModelError: packed attention does not wrap this implementation.
    """
    if base not in SUPPORTED:
        raise UnsupportedModelError(
            f"attention implementation: got {base!r}, gated execution supports {', '.join(SUPPORTED)}. "
            "Load the model with attn_implementation='sdpa'."
        )
    return PREFIX + base


def use_packed(config: Any) -> None:
    """Have the packed version of the attention that a configuration names, also after it has been named anew.

    Raises:
        UnsupportedModelError: packed attention does not wrap this implementation.
    """
    name = config._attn_implementation_internal
    if name is not None and not name.startswith(PREFIX):
        config._attn_implementation_internal = packed_implementation(name)


# At import: a model that was unpickled in another process looks for these names, too.
for _base in SUPPORTED:
    AttentionInterface.register(PREFIX + _base, _wrap(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
