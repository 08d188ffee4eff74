"""Controlled skipping: leave out one unit after another and see what happens. The ground truth of every prediction."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import FixedUnits, find_router, running
from skipit.router.config import KVPolicy
from skipit.theory.labels import IGNORE


class Effect(NamedTuple):
    """What leaving out some units does, per answer token, teacher-forced.

    Attributes:
        kl: KL(full || skipping), in nats.
        loss: cross-entropy of skipping minus that of the full model, in nats.
        agreement: share of answer tokens whose arg max stays the same.
        exact: share of rows whose every answer token is predicted right; equals greedy exact match.
    """

    kl: float
    loss: float
    agreement: float
    exact: float


@torch.no_grad()
def effects(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    plans: Sequence[Bool[Tensor, "layers modality"]],
    kv: KVPolicy,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Effect]:
    """Measure fixed plans (True runs) against the full model, all on the same rows.

    Args:
        model: with gates, which are not asked.
        batches: with labels.
        plans: which units run.
        kv: K/V policy of skipped tokens.
        progress: called with 1 after each plan of each batch.
    """
    sums = torch.zeros(len(plans), 4, dtype=torch.float64)
    tokens = rows = 0
    device = next(model.parameters()).device
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        labels = batch["labels"][:, 1:].to(device)
        chosen = labels != IGNORE
        tokens, rows = tokens + int(chosen.sum()), rows + len(labels)
        with running(mode="dense"):
            full = _answers(model, inputs, chosen)
        full_loss = F.nll_loss(full, labels[chosen], reduction="sum")
        for index, plan in enumerate(plans):
            with running(policy=FixedUnits(plan), kv=kv, mode="gathered"):
                skipping = _answers(model, inputs, chosen)
            right = torch.ones_like(chosen)
            right[chosen] = skipping.argmax(-1) == labels[chosen]
            sums[index] += torch.stack(
                [
                    F.kl_div(skipping, full, reduction="sum", log_target=True).double(),
                    (F.nll_loss(skipping, labels[chosen], reduction="sum") - full_loss).double(),
                    (skipping.argmax(-1) == full.argmax(-1)).sum().double(),
                    right.all(-1).sum().double(),
                ]
            ).cpu()
            progress(1)
    return [Effect(kl / tokens, loss / tokens, same / tokens, exact / rows) for kl, loss, same, exact in sums.tolist()]


def _answers(model: nn.Module, inputs: dict[str, Tensor], chosen: Tensor) -> Float[Tensor, "answers vocabulary"]:
    logits = model(**inputs, use_cache=False).logits
    return torch.log_softmax(logits[:, :-1][chosen].float(), dim=-1)


def one_unit_skipped(model: nn.Module) -> list[Bool[Tensor, "layers modality"]]:
    """A plan for every unit that skips just this one, layer by layer, text before vision."""
    layers = find_router(model)[1].num_layers
    plans = []
    for layer in range(layers):
        for modality in range(2):
            plan = torch.ones(layers, 2, dtype=torch.bool)
            plan[layer, modality] = False
            plans.append(plan)
    return plans


def skipping_table(values: Sequence[float]) -> Float[Tensor, "layers modality"]:
    """Figures of `one_unit_skipped` plans as a table [layers, modalities]."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 2)
