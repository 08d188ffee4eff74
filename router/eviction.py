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
AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


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
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        there = _there(weight, queries)
        # Attention matrices of some heads and some queries at a time: all the memory that training needs beyond plain
        # attention's, and on a CPU what its caches hold.
        at_once = AT_ONCE.get(query.device.type, AT_ONCE["cuda"])
        rows = min(queries, max(1, at_once // (batch * keys)))
        together = max(1, at_once // (batch * rows * keys))
        of_query, of_key, of_value = (torch.zeros_like(each, dtype=torch.float32) for each in (query, key, value))
        of_weight = weight.new_zeros(weight.shape, dtype=torch.float32)
        for asking in range(0, queries, rows):
            q = slice(asking, asking + rows)
            seen = slice(0, keys if rows == queries else _last_seen(mask[..., q, :]))
            visible, present = mask[..., q, seen], there[..., q, seen]
            for some in range(0, heads, together):
                h = slice(some, some + together)
                found = _derivatives(
                    query[:, h, q],
                    output[:, h, q],
                    gradients[0][:, h, q],
                    key[:, h, seen],
                    value[:, h, seen],
                    visible,
                    present,
                    asking + keys - queries,
                    ctx.scaling,
                )
                of_query[:, h, q] = found[0]
                of_key[:, h, seen] += found[1]
                of_value[:, h, seen] += found[2]
                of_weight[:, seen] += found[3]
        of_states = (each.to(query.dtype) for each in (of_query, of_key, of_value))
        return *of_states, of_weight.to(weight.dtype), None, None


def _derivatives(
    query: Float[Tensor, "batch some asking head_dim"],
    output: Float[Tensor, "batch some asking value_dim"],
    gradient: Float[Tensor, "batch some asking value_dim"],
    key: Float[Tensor, "batch some seen head_dim"],
    value: Float[Tensor, "batch some seen value_dim"],
    mask: Shaped[Tensor, "#batch 1 asking seen"],
    there: Bool[Tensor, "batch 1 asking seen"],
    own: int,
    scaling: float,
) -> tuple[
    Float[Tensor, "batch some asking head_dim"],
    Float[Tensor, "batch some seen head_dim"],
    Float[Tensor, "batch some seen value_dim"],
    Float[Tensor, "batch seen"],
]:
    """Of query, key, value and weights, for some heads and queries; `own` is the key of the first query's own token.

    As flash attention's: sums and exponentials in fp32, products of matrices in the dtype that the output came in,
    which is the lower one where autocast lowered it. What is as large as the scores is changed in place.
    """
    dtype = output.dtype
    query, key, value, gradient = (tensor.to(dtype) for tensor in (query, key, value, gradient))
    scores = (query @ key.transpose(-1, -2)).float().mul_(scaling)
    scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    top = torch.where(there, scores, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    # Of each key, over the sum of those that are there: for them attention itself, for the others e_j / A.
    e = scores.sub_(top).clamp_(max=30).exp_()
    attention = e * there.float()
    total = attention.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    share = e.div_((e - attention).add_(total))  # e_j / (A + e_j) of those that are not there
    attention.div_(total)
    at_output = (gradient.float() * output.float()).sum(-1, keepdim=True)
    worth = (gradient @ value.transpose(-1, -2)).float().sub_(at_output)
    of_keys = share.mul_(worth)
    # A token always sees itself.
    d_weight = of_keys.sum((1, 2))
    d_weight[:, own : own + query.shape[2]] -= of_keys.diagonal(own, -2, -1).sum(1)
    d_scores = worth.mul_(attention).mul_(scaling).to(dtype)
    attention = attention.to(dtype)
    return d_scores @ key, d_scores.transpose(-1, -2) @ query, attention.transpose(-1, -2) @ gradient, d_weight


def _last_seen(mask: Shaped[Tensor, "#batch 1 asking keys"]) -> int:
    """How many keys there are up to the last that any of some queries may see."""
    if mask.dtype != torch.bool:
        return mask.shape[-1]
    seen = mask.any(dim=(0, 1, 2)).nonzero()
    return int(seen[-1]) + 1 if len(seen) else 1


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
