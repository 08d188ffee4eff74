"""Each unit skipped alone, beside what the theory predicted of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from skipit.eval.measure.controlled import one_unit_skipped, row_effects
from skipit.eval.statistics import Figures
from skipit.router.config import KVPolicy

from .prediction import RankCorrelation, by_scope


@dataclass(frozen=True)
class UnitEffects(Figures):
    """What skipping each unit alone does, beside what the theory predicted.

    Attributes:
        kv: K/V policy of skipped tokens.
        rows: measured.
        dense_accuracy: with every unit run.
        predicted: damage in nats per answer token, [layers, 2]; NaN where a unit has no tokens.
        measured: KL(full || skipping) per answer token, in nats, [layers, 2].
        accuracy: share of rows answered right, [layers, 2].
        correlation: Spearman of predicted and measured over "text", "vision" and "all" units.
    """

    kv: KVPolicy
    rows: int
    dense_accuracy: float
    predicted: Float[Tensor, "layers modality"]
    measured: Float[Tensor, "layers modality"]
    accuracy: Float[Tensor, "layers modality"]
    correlation: Mapping[str, RankCorrelation]


def measure_units(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    damage: Float[Tensor, "layers modality"],
    kv: KVPolicy,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> UnitEffects:
    """Skip each unit alone, and compare with its predicted damage; what `draw_scatter` draws.

    Args:
        model: with gates, which are not asked.
        batches: with labels.
        damage: predicted, such as `Profile.damage[kv].unit`.
        kv: K/V policy of skipped tokens.
        progress: called with 1 after each plan of each batch: one per unit, and one with every unit run.

    Raises:
        InputError: there is no row.
    """
    alone = one_unit_skipped(model)
    everything, *skipping = row_effects(model, batches, [torch.ones_like(alone[0]), *alone], kv, progress=progress)
    effects = [effect.mean() for effect in skipping]
    absent = damage.isnan()  # to skip a unit without tokens changes nothing, and says nothing

    def table(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(-1, 2).masked_fill(absent, torch.nan)

    # A KL of nothing may round to less than zero.
    measured = table([max(0.0, effect.kl) for effect in effects])
    return UnitEffects(
        kv,
        len(everything.right),
        everything.mean().exact,
        damage.double(),
        measured,
        table([effect.exact for effect in effects]),
        by_scope(damage, measured),
    )
