"""Attention over packed tokens: every row's tokens side by side in one sequence, attention row by row.

Norms, projections and MLPs work token by token, so the tokens that run a layer are packed into one sequence
[1, tokens, dim] and the layer's own `forward` is called on it: nothing is padded and nothing is wasted.
Only attention needs the rows back. transformers lets an attention function be registered by name; ours
unpacks the queries into rows, calls the model's usual function and packs the result again.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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

LAYOUT_KWARG = "skipit_layout"
OBSERVER_KWARG = "skipit_attention_observer"
# The copy of this code inside a checkpoint, perhaps of another version, registers functions of its own.
PREFIX = "skipit_" if __name__.startswith("skipit.") else f"skipit_{crc32(__name__.encode()):08x}_"
SUPPORTED = ("sdpa", "eager")
SPAN = 128  # tokens; shorter spans look at fewer keys in vain, and keep the kernels less busy


@dataclass(frozen=True)
class Layout:
    """Where packed tokens belong.

    Attributes:
        batch: rows.
        seq: tokens of a row in the call.
        width: packed tokens of the fullest row.
        places: of each packed token, among the tokens of all rows, one row after the other.
        ranks: its place among the packed tokens of its row; None in a single row, where it is their order.
        spans: (first, end, keys) of runs of packed tokens that together see only the first `keys` keys; empty where
            that is not known.
    """

    batch: int
    seq: int
    width: int
    places: Int[Tensor, " tokens"]
    ranks: Int[Tensor, " tokens"] | None = None
    spans: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, chosen: Bool[Tensor, "batch seq"]) -> "Layout":
        """The layout of the tokens where `chosen` is True."""
        (batch, seq), (places,) = chosen.shape, chosen.flatten().nonzero(as_tuple=True)
        if batch == 1:
            return cls(1, seq, len(places), places)
        ranks = (chosen.cumsum(1) - 1).flatten()[places]
        return cls(batch, seq, int(ranks.max()) + 1 if len(ranks) else 0, places, ranks)

    @cached_property
    def columns(self) -> Int[Tensor, " tokens"]:
        """The place of each packed token among the tokens of its row."""
        return self.places if self.batch == 1 else self.places % self.seq

    @cached_property
    def slots(self) -> Int[Tensor, " tokens"]:
        """Where each packed token is when the rows have a place for `width` tokens each, one row after the other."""
        assert self.ranks is not None
        return self.places // self.seq * self.width + self.ranks

    def pack(self, tokens: Shaped[Tensor, "*any batch_or_1 seq dim"]) -> Shaped[Tensor, "*any 1 tokens dim"]:
        """The packed tokens' states, or whatever else there is per token."""
        if tokens.shape[-3] == 1:
            return tokens.index_select(-2, self.columns)
        return tokens.flatten(-3, -2).index_select(-2, self.places).unsqueeze(-3)

    def to_rows(self, heads: Shaped[Tensor, "1 heads tokens head_dim"]) -> Shaped[Tensor, "batch heads width head_dim"]:
        """Each packed token in its row, zeros where a row has no token."""
        return heads if self.batch == 1 else self._spread(heads, self.slots, self.width)

    def to_columns(self, heads: Float[Tensor, "1 heads tokens head_dim"]) -> Float[Tensor, "batch heads seq head_dim"]:
        """Each packed token at its place among those of the call, zeros where none was packed."""
        return self._spread(heads, self.places, self.seq)

    def _spread(
        self, heads: Shaped[Tensor, "1 heads tokens head_dim"], places: Int[Tensor, " tokens"], width: int
    ) -> Shaped[Tensor, "batch heads {width} head_dim"]:
        out = heads.new_zeros(self.batch * width, heads.shape[1], heads.shape[3])
        return out.index_copy_(0, places, heads[0].transpose(0, 1)).unflatten(0, (self.batch, width)).transpose(1, 2)

    def unpack(
        self, tokens: Float[Tensor, "1 tokens dim"], others: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        """Each packed token at its place in the call, `others` where none was packed."""
        return others.flatten(0, 1).index_copy(0, self.places, tokens[0]).view_as(others)

    def from_rows(self, rows: Float[Tensor, "batch width heads head_dim"]) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Undo `to_rows`, for what attention makes of the queries."""
        return rows if self.batch == 1 else rows.flatten(0, 1).index_select(0, self.slots)[None]

    def index(self, offset: int) -> Int[Tensor, "batch width"]:
        """The sequence index of each slot, -1 where a row has no token."""
        if self.batch == 1:
            return (self.places + offset if offset else self.places)[None]
        out = torch.full((self.batch * self.width,), -1, device=self.places.device)
        return out.index_copy_(0, self.slots, self.columns + offset).view(self.batch, self.width)


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
