"""How well the theory predicts what skipping does: every measure of a profile against controlled skipping.

A unit is one (layer, modality). Tables are [layers, 2], columns text and vision, NaN where a measure says nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from skipit.eval.statistics import Floats, Interval, Resampling, bootstrap, centred_ranks, correlation, spearman
from skipit.router import FixedUnits, find_router, running, token_modality
from skipit.router.config import KVPolicy
from skipit.theory.accumulate import prox
from skipit.theory.answers import teacher_forced
from skipit.theory.bounds import combine_damages
from skipit.theory.profile import Profile

SCOPES = ("text", "vision", "all")
DISTANCES = (0.001, 0.01, 0.1)
FEWEST = 3
FEW = Resampling(resamples=2000)


@dataclass(frozen=True)
class RankCorrelation(Interval):
    """Spearman's correlation over units with a percentile bootstrap interval; NaN with fewer than three units."""

    units: int


def rank_correlation(predicted: ArrayLike, measured: ArrayLike, resampling: Resampling = FEW) -> RankCorrelation:
    """Compare a prediction with its measurement over the units where both have a value.

    The interval comes from resampling units. Rows are another source of error, which it does not see.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.3]).value
        0.8
    """
    x, y = np.asarray(predicted, dtype=np.float64).ravel(), np.asarray(measured, dtype=np.float64).ravel()
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) < FEWEST:
        return RankCorrelation(np.nan, np.nan, np.nan, len(x))
    rng = np.random.default_rng(resampling.seed)

    def draw(size: int) -> Floats:
        index = rng.integers(len(x), size=(size, len(x)))
        return correlation(centred_ranks(x[index]), centred_ranks(y[index]))

    return RankCorrelation(round(spearman(x, y), 6), *bootstrap(draw, resampling), len(x))


def by_scope(predicted: ArrayLike, measured: ArrayLike) -> dict[str, RankCorrelation]:
    """The rank correlation over text units, vision units and all."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    columns = {"text": x[:, 0], "vision": x[:, 1], "all": x}
    truth = {"text": y[:, 0], "vision": y[:, 1], "all": y}
    return {scope: rank_correlation(columns[scope], truth[scope]) for scope in SCOPES}


def predictors(profile: Profile, kv: KVPolicy) -> dict[str, Float[Tensor, "layers modality"]]:
    """What a profile says about skipping each unit, small where redundant.

    Args:
        profile: of the model.
        kv: policy of the skips to predict; only the damage knows it.

    Returns:
        `damage`, `geometric`, `relative update`, `proximal t` at a few t, `block influence` (ShortGPT: the geometric
        redundancy of all tokens together, hence equal for both modalities) and `VAR` (of vision units).
    """
    attention = profile.var_text.double()
    return {
        "damage": profile.damage[kv].unit.double(),
        "geometric": profile.geometric.double(),
        "relative update": profile.update.double(),
        **{f"proximal {t:g}": prox(profile.histogram, t) for t in DISTANCES},
        "block influence": profile.block_influence[:, None].expand(-1, 2),
        "VAR": torch.stack([torch.full_like(attention, torch.nan), attention], dim=-1),
    }


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


def growing_sets(damage: Float[Tensor, "layers modality"]) -> list[Bool[Tensor, "layers modality"]]:
    """Plans (True runs) that skip the unit of least damage, the two of least damage, and so on up to all."""
    order = damage.flatten().nan_to_num(torch.inf).argsort().tolist()
    return [_skipping(order[: size + 1], damage) for size in range(int(damage.isfinite().sum()))]


def random_sets(
    damage: Float[Tensor, "layers modality"], size: int, number: int, seed: int = 0
) -> list[Bool[Tensor, "layers modality"]]:
    """Plans (True runs) that skip `size` units drawn at random, such as pairs."""
    generator = torch.Generator().manual_seed(seed)
    units = damage.flatten().isfinite().nonzero()[:, 0]
    drawn = [units[torch.randperm(len(units), generator=generator)[:size]].tolist() for _ in range(number)]
    return [_skipping(chosen, damage) for chosen in drawn]


def set_damages(
    damage: Float[Tensor, "layers modality"], plans: Sequence[Bool[Tensor, "layers modality"]]
) -> dict[str, Float[Tensor, " plans"]]:
    """Predicted damage of plans from the damages of their units (statement 10).

    Returns:
        `sum`, right when changes are uncorrelated, and `aligned`, (sum of sqrt D)^2: at most that, to second order.
    """
    skipped = [damage.double()[~plan & damage.isfinite()] for plan in plans]
    aligned = [combine_damages(chosen) for chosen in skipped]
    return {"sum": torch.stack([chosen.sum() for chosen in skipped]), "aligned": torch.stack(aligned)}


def _skipping(units: list[int], like: Tensor) -> Tensor:
    plan = torch.ones(like.numel(), dtype=torch.bool)
    plan[units] = False
    return plan.view(like.shape)
