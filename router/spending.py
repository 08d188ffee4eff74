"""Budgets per input: from a row's own logits, the threshold at which its prompt spends a share of the dense FLOPs.

All logits of a prompt are known at once where one decision point decides for all layers, and what each token-layer
costs follows from the order in which they are let run: so the share is met before anything has run, to one token-layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import KVPolicy, Unit
from .costs import LayerCost


def least_share(costs: Sequence[LayerCost], tokens: int, kv: KVPolicy, unit: Unit) -> float:
    """The share of a row's dense FLOPs that is spent when every token skips every layer."""
    pairs = tokens * (tokens + 1) / 2
    dense = sum(cost.linear * tokens + cost.attention * pairs for cost in costs)
    saved = sum(_per_token(cost, kv, unit) * tokens for cost in costs)
    if unit != "mlp":
        saved += sum(cost.attention * pairs for cost in costs)
    return (dense - saved + sum(cost.gate * tokens for cost in costs)) / dense


def row_thresholds(
    logits: Float[Tensor, "layers batch seq"],
    prompt: Bool[Tensor, "batch seq"],
    seen: Int[Tensor, "batch seq"],
    costs: Sequence[LayerCost],
    kv: KVPolicy,
    unit: Unit,
    share: float,
) -> Float[Tensor, " batch"]:
    """The threshold of every row above which its prompt spends at most a share of the dense decoder's FLOPs.

    It lies below the last logit that fits and not below the first that does not: of equal ones all run or none. A token
    that comes later and is like one of the prompt's is then decided like it, whatever rounding does. Gates and what is
    always made count.

    Args:
        logits: of the gates of all layers.
        prompt: the tokens that spend.
        seen: tokens that each sees, itself included.
        costs: of all layers.
        kv: what becomes of the keys and values of skipped tokens.
        unit: what a token skips.
        share: of the FLOPs.
    """
    layers, batch, length = logits.shape

    def column(values: list[float]) -> Float[Tensor, "layers 1 1"]:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None, None]

    pair = column([cost.attention for cost in costs])
    dense = ((column([cost.linear for cost in costs]) + pair * seen) * prompt).sum((0, 2))
    gates = sum(cost.gate for cost in costs) * prompt.sum(-1)
    wanted = logits.masked_fill(~prompt, -torch.inf)
    keys = seen.expand_as(logits)
    if kv == "evict":  # whoever joins a layer adds a pair with each that runs it already, wherever they stand
        wanted, keys = wanted.sort(-1, descending=True).values, torch.arange(1, length + 1, device=logits.device)
    one_more = column([_per_token(cost, kv, unit) for cost in costs]) + (0 if unit == "mlp" else pair * keys)
    one_more = (one_more * (wanted > -torch.inf)).expand(layers, batch, length)
    by_row, order = wanted.transpose(0, 1).flatten(1).sort(-1, descending=True)
    spent = one_more.transpose(0, 1).flatten(1).gather(1, order).cumsum(-1)
    everything = spent[:, -1]
    fit = (spent <= (everything + share * dense - dense - gates)[:, None]).sum(-1, keepdim=True)
    around = F.pad(F.pad(by_row, (1, 0), value=torch.inf), (0, 1), value=-torch.inf)
    last, refused = around.gather(1, fit).squeeze(-1), around.gather(1, fit + 1).squeeze(-1)
    between = (last + refused) / 2
    return torch.where(between < last, between, refused)


def _per_token(cost: LayerCost, kv: KVPolicy, unit: Unit) -> float:
    """FLOPs that one more token costs in a layer, pairs with keys apart."""
    if unit == "mlp":
        return cost.mlp
    kept = cost.keys_values if kv == "retain" else 0.0
    return cost.linear - kept - (cost.mlp if unit == "attention" else 0.0)
