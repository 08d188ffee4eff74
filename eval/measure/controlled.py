"""Controlled skipping: leave out units and see what happens, over all rows or row by row. The truth of predictions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.eval.statistics import USUAL, Interval, Resampling, row_interval
from skipit.router import FixedUnits, Trace, find_router, running
from skipit.router.config import KVPolicy
from skipit.theory.answers import TeacherForced, teacher_forced
from skipit.theory.cost import CostModel, trace_flops


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


@dataclass(frozen=True)
class RowEffects:
    """What leaving out some units does to every row, teacher-forced: sums over its answer tokens, fp64 [rows].

    Attributes:
        kl: KL(full || skipping), in nats.
        loss: cross-entropy of skipping minus that of the full model, in nats.
        same: answer tokens whose arg max stays the same.
        tokens: answer tokens.
        right: 1 where every answer token is predicted right (greedy exact match), else 0.
        executed: FLOPs of the decoder, gates counted; NaN if no costs were given.
        dense: FLOPs of the dense decoder; NaN if no costs were given.
    """

    kl: Float[Tensor, " rows"]
    loss: Float[Tensor, " rows"]
    same: Float[Tensor, " rows"]
    tokens: Float[Tensor, " rows"]
    right: Float[Tensor, " rows"]
    executed: Float[Tensor, " rows"]
    dense: Float[Tensor, " rows"]

    def mean(self) -> Effect:
        """The figures over all rows."""
        tokens = self.tokens.sum()
        parts = (self.kl.sum() / tokens, self.loss.sum() / tokens, self.same.sum() / tokens, self.right.mean())
        return Effect(*(float(part) for part in parts))

    @property
    def compute(self) -> float:
        """Executed over dense FLOPs; NaN if no costs were given."""
        return float(self.executed.sum() / self.dense.sum())


def effects(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    plans: Sequence[Bool[Tensor, "layers modality"]],
    kv: KVPolicy,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Effect]:
    """Measure fixed plans (True runs) against the full model, all on the same rows; see `row_effects`."""
    return [effect.mean() for effect in row_effects(model, batches, plans, kv, progress=progress)]


@torch.no_grad()
def row_effects(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    plans: Sequence[Bool[Tensor, "layers modality"]],
    kv: KVPolicy,
    *,
    costs: CostModel | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[RowEffects]:
    """Measure what fixed plans (True runs) do to every row, against the full model.

    Args:
        model: with gates, which are not asked.
        batches: with labels.
        plans: which units run.
        kv: K/V policy of skipped tokens.
        costs: of the model's layers, to count what gathered execution spends.
        progress: called with 1 after each plan of each batch.

    Returns:
        For every plan, the rows of all batches in order.

    Raises:
        InputError: there is no row.
    """
    rows: list[list[Tensor]] = [[] for _ in plans]
    for batch in teacher_forced(model, batches):
        with running(mode="dense"):
            full = batch.logits(model).log_softmax(-1)
        for index, plan in enumerate(plans):
            trace = Trace()
            with running(policy=FixedUnits(plan), kv=kv, mode="gathered", trace=trace):
                skipping = batch.logits(model).log_softmax(-1)
            measured = _of_rows(full, skipping, batch)
            flops = torch.full((2, len(batch.answer)), torch.nan, dtype=torch.float64)
            if costs is not None:
                flops = torch.stack([values[0].sum((0, 2)).cpu() for values in trace_flops(costs, trace.steps)])
            rows[index].append(torch.cat([measured, flops]))
            progress(1)
    return [RowEffects(*torch.cat(parts, dim=1)) for parts in rows]


def kl_interval(effect: RowEffects, resampling: Resampling = USUAL) -> Interval:
    """KL per answer token of a plan, over all rows."""
    return row_interval(
        torch.stack([effect.kl, effect.tokens], -1), lambda means: means[..., 0] / means[..., 1], resampling
    )


def _of_rows(full: Tensor, skipping: Tensor, batch: TeacherForced) -> Float[Tensor, "figures rows"]:
    """`kl`, `loss`, `same`, `tokens` and `right` of every row, from log-probabilities of the answers' tokens."""
    predicted = skipping.argmax(-1)
    figures = torch.stack(
        [
            F.kl_div(skipping, full, reduction="none", log_target=True).sum(-1),
            (full - skipping).gather(-1, batch.wanted[:, None])[:, 0],
            (predicted == full.argmax(-1)).float(),
            torch.ones_like(full[:, 0]),
            (predicted == batch.wanted).float(),
        ]
    )
    sums = batch.row_sums(figures.double())
    sums[4] = (sums[4] == sums[3]).double()
    return sums.cpu()


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
