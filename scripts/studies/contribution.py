"""ShortV's measure of a layer, which the study of predictions and the comparison with peers share."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from skipit.router import FixedUnits, find_router, running, token_modality
from skipit.theory.answers import teacher_forced


@torch.no_grad()
def layer_contribution(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Float[Tensor, "layers modality"]:
    """ShortV's layer contribution: E KL(frozen || full) at the last prompt token, vision updates of a layer frozen.

    Keys and values are retained. Re-implemented from the formula. It is a controlled experiment itself, one forward
    pass per layer, and says nothing about text.

    Args:
        model: with gates, which are not asked.
        batches: with labels, which tell where the prompt ends.
    """
    layers = find_router(model)[1].num_layers
    total, rows = torch.zeros(layers, dtype=torch.float64), 0
    for batch in teacher_forced(model, batches):
        inputs, last = batch.inputs, batch.answer.float().argmax(-1)
        index = torch.arange(len(last), device=last.device)
        vision = token_modality(model.config, inputs["input_ids"], inputs.get("mm_token_type_ids")).bool().any(-1)
        rows += int(vision.sum())
        with running(mode="dense"):
            full = model(**inputs, use_cache=False).logits[index, last].float().log_softmax(-1)
        for layer in range(layers):
            plan = torch.ones(layers, 2, dtype=torch.bool)
            plan[layer, 1] = False
            with running(policy=FixedUnits(plan), kv="retain", mode="gathered"):
                frozen = model(**inputs, use_cache=False).logits[index, last].float().log_softmax(-1)
            total[layer] += (frozen.exp() * (frozen - full)).sum(-1)[vision].double().sum().cpu()
    contribution = total / rows if rows else torch.full_like(total, torch.nan)
    return torch.stack([torch.full_like(contribution, torch.nan), contribution], dim=-1)
