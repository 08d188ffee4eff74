"""What a gate must know of eviction to learn: a token that skips is missed by the tokens after it.

Masked execution under `evict` hides the keys of skipped tokens. A mask has no gradient, so a gate would learn only what
its own token loses. Here every key carries a weight: 1 where its token runs, 0 where it skips, with the gate's gradient
straight through. Attention with these weights has exactly the values that the mask gives, and as the derivative with
respect to one weight the change of the output when that key alone comes or goes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

KEY_WEIGHT_KWARG = "skipit_key_weight"


class KeyWeights(NamedTuple):
    """What masked execution hands down to attention while gates learn.

    Attributes:
        mask: over all keys, skipped ones too; None is plain causal.
        weight: [batch, keys], 0 or 1, with the gradient of the gates.
    """

    mask: Tensor | None
    weight: Tensor


def weighted_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Tensor | None,
    weight: Float[Tensor, "batch keys"],
    scaling: float | None,
) -> Float[Tensor, "batch queries heads head_dim"]:
    """Attention in which every key counts by a weight, but for its own token, which always sees itself.

    With a the attention over all keys, w the weights, A = sum_j a_j w_j and o the output: o = sum_j a_j w_j v_j / A.
    The derivative at a key that is there is a_j (v_j - o) / A. At one that is not, adding it for real changes the
    output by a_j (v_j - o) / (A + a_j); this, not the slope a_j (v_j - o) / A, is the derivative given to it (ours):
    the slope has no bound when what was evicted held most of the attention.

    Args:
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        mask: [batch or 1, 1, queries, keys], boolean (True attends) or additive; None is plain causal.
        weight: 0 or 1, with the gradient of the gates.
        scaling: of the scores; None is 1 / sqrt(head_dim).

    Returns:
        What attention functions of transformers return.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    tokens = query.shape[2]
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    own = torch.eye(tokens, dtype=torch.bool, device=query.device)
    weight = torch.where(own, 1.0, weight.float()[:, None, None, :])
    with torch.no_grad():
        # Softmax over the keys that are there, by the largest score among them; those that are not may be larger.
        there = weight > 0.5
        top = scores.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
    share = torch.exp((scores - top).clamp(max=30))
    with torch.no_grad():
        total = (share * there).sum(-1, keepdim=True)
        damp = torch.where(there, 1.0, total / (total + share).clamp(min=1e-30))
    share = share * damp * weight
    output = (share @ value.float()) / share.sum(-1, keepdim=True).clamp(min=1e-30)
    return output.to(query.dtype).transpose(1, 2)
