"""What a gate must know of eviction to learn: a token that skips is missed by the tokens after it.

Masked execution under `evict` hides the keys of skipped tokens. A mask has no gradient, so a gate would learn only what
its own token loses. Here every key carries a weight: 1 where its token runs, 0 where it skips, with the gate's gradient
straight through. Attention with these weights has exactly the values that the mask gives, and as the derivative with
respect to one weight the change of the output when that key alone comes or goes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

KEY_WEIGHT_KWARG = "skipit_key_weight"
# Numbers in an attention matrix that the backward pass makes at once: where launches take the time, more.
AT_ONCE = {"cpu": 2**21, "cuda": 2**25}


class KeyWeights(NamedTuple):
    """What masked execution hands down to attention while gates learn.

    Attributes:
        mask: over all keys, skipped ones too; None is plain causal.
        weight: 0 or 1, with the gradient of the gates.
    """

    mask: Shaped[Tensor, "#batch 1 queries keys"] | None
    weight: Float[Tensor, "batch keys"]


def weighted_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Shaped[Tensor, "#batch 1 queries keys"] | None,
    weight: Float[Tensor, "batch keys"],
    scaling: float | None,
) -> Float[Tensor, "batch queries heads value_dim"]:
    """Attention in which every key counts by a weight, but for its own token, which always sees itself.

    With a the attention over all keys, w the weights, A = sum_j a_j w_j and o the output: o = sum_j a_j w_j v_j / A.
    The derivative at a key that is there is a_j (v_j - o) / A. At one that is not, adding it for real changes the
    output by a_j (v_j - o) / (A + a_j); this, not the slope a_j (v_j - o) / A, is the derivative given to it (ours):
    the slope has no bound when what was evicted held most of the attention.

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        mask: boolean (True attends) or additive; None is plain causal.
        weight: 0 or 1, with the gradient of the gates.
        scaling: of the scores; None is 1 / sqrt(head_dim).

    Returns:
        What attention functions of transformers return.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    tokens = query.shape[2]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _WeightedAttention.apply(query, key, value, weight, mask, scaling)
    return output.transpose(1, 2)


class _WeightedAttention(torch.autograd.Function):
    """The values are an ordinary attention's, by its kernel; scores are computed again for the derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys value_dim"],
        weight: Float[Tensor, "batch keys"],
        mask: Shaped[Tensor, "#batch 1 queries keys"],
        scaling: float,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        there = _there(weight, query.shape[2])
        output = F.scaled_dot_product_attention(query, key, value, _over(mask, there), scale=scaling)
        ctx.save_for_backward(query, key, value, weight, mask, output)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "batch heads queries value_dim"]) -> Any:
        query, key, value, weight, mask, output = ctx.saved_tensors
        heads = query.shape[1]
        # A few heads at a time: their attention matrices are all that training needs beyond plain attention's memory.
        at_once = AT_ONCE.get(query.device.type, AT_ONCE["cuda"])
        together = max(1, at_once // (query.shape[0] * query.shape[2] * key.shape[2]))
        parts = []
        for first in range(0, heads, together):
            some = slice(first, first + together)
            of_heads = [tensor[:, some] for tensor in (query, key, value, output, gradients[0])]
            parts.append(_derivatives(of_heads, weight, mask, ctx.scaling))
        d_query, d_key, d_value, d_weight = zip(*parts, strict=True)
        of_states = (torch.cat(part, dim=1).to(query.dtype) for part in (d_query, d_key, d_value))
        return *of_states, torch.stack(d_weight).sum(0).to(weight.dtype), None, None


def _derivatives(
    of_heads: list[Float[Tensor, "batch some _ _"]],
    weight: Float[Tensor, "batch keys"],
    mask: Shaped[Tensor, "#batch 1 queries keys"],
    scaling: float,
) -> tuple[
    Float[Tensor, "batch some queries head_dim"],
    Float[Tensor, "batch some keys head_dim"],
    Float[Tensor, "batch some keys value_dim"],
    Float[Tensor, "batch keys"],
]:
    """Of query, key, value and weights; given are some heads' query, key, value, output and the output's gradient.

    As flash attention's: sums and exponentials in fp32, products of matrices in the dtype that the output came in,
    which is the lower one where autocast lowered it.
    """
    dtype = of_heads[3].dtype
    query, key, value, output, gradient = (tensor.to(dtype) for tensor in of_heads)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    there = _there(weight, query.shape[2])
    # Of each key, over the sum of those that are there: for them attention itself, for the others e_j / A.
    total = scores.masked_fill(~there, -torch.inf).logsumexp(-1, keepdim=True)
    share = torch.exp((scores - total.masked_fill(total == -torch.inf, 0)).clamp(max=30))
    at_output = (gradient.float() * output.float()).sum(-1, keepdim=True)
    worth = (gradient @ value.transpose(-1, -2)).float() - at_output
    attention = share * there
    d_scores = (attention * worth * scaling).to(dtype)
    others = ~_own(scores.shape[-2], scores.shape[-1], scores.device)
    d_weight = (torch.where(there, share, share / (1 + share)) * worth * others).sum((1, 2))
    d_query, d_key = d_scores @ key, d_scores.transpose(-1, -2) @ query
    return d_query, d_key, attention.to(dtype).transpose(-1, -2) @ gradient, d_weight


def _own(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which key is a query's own: the queries are the last ones of the tokens whose keys there are."""
    return torch.arange(keys, device=device) == torch.arange(keys - queries, keys, device=device)[:, None]


def _there(weight: Float[Tensor, "batch keys"], queries: int) -> Bool[Tensor, "batch 1 queries keys"]:
    """Which keys a query may see as far as weights go: its own always."""
    return (weight > 0.5)[:, None, None, :] | _own(queries, weight.shape[-1], weight.device)


def _over(
    mask: Shaped[Tensor, "#batch 1 queries keys"], there: Bool[Tensor, "batch 1 queries keys"]
) -> Shaped[Tensor, "batch 1 queries keys"]:
    return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)
