"""The 2x2 experiment: what skipping vision in layers of high or low redundancy and much or little cross-attention does.

If the theory is right, the redundant and unattended layers cost the least accuracy, and either condition alone less
than none. All sets save equally many FLOPs and are measured on the same rows, so that differences are paired.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from skipit.eval.measure.controlled import RowEffects, row_effects
from skipit.eval.statistics import USUAL, Figures, Floats, Interval, Resampling, row_interval, side, spearman
from skipit.router import VISION
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel

from .prediction import plan_without
from .quadrants import QUADRANTS, equal_sets, split_quadrants

Verdict = Literal["found", "not found", "undecided"]
FIGURES = ("accuracy", "kl")
BETTER = {"accuracy": 1, "kl": -1}  # the sign of an improvement


@dataclass(frozen=True)
class Quadrant(Figures):
    """What skipping sets of one quadrant does, averaged over its sets.

    Attributes:
        layers: all that the quadrant holds.
        sets: those skipped, one after another; empty where the quadrant is.
        compute: executed over dense FLOPs on the measured rows, gates counted.
        accuracy: share of rows answered right.
        kl: KL(full || skipping) per answer token, in nats.
    """

    layers: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    compute: float
    accuracy: Interval
    kl: Interval


@dataclass(frozen=True)
class Quadrants(Figures):
    """The experiment for one notion of redundancy.

    Effects are differences of accuracy and of KL (by those names), with paired bootstrap intervals over rows. They do
    not say how other layers or models would do: units are few. NaN where a quadrant they need is empty.

    Attributes:
        notion: of redundancy, such as "geometric".
        kv: K/V policy of skipped tokens; under "retain" text still sees the keys of vision tokens that skip, so that
            cross-attention bounds nothing (statement 9 of docs/theory.md).
        rows: measured.
        dense: accuracy with every unit run.
        correlation: Spearman of redundancy and cross-attention over layers; where it is strong two quadrants are small.
        cells: by name of the quadrant.
        redundancy_effect: redundant minus not, mean over attention; accuracy above 0 where redundancy protects.
        attention_effect: unattended minus attended, mean over redundancy; accuracy above 0 where little attention does.
        interaction: what little attention is worth among redundant layers beyond what it is worth among the others.
        margin: redundant and unattended minus the best other quadrant (most accuracy, least KL).
        verdict: is the paper's quadrant the best? "found" where the margin's interval lies on its side of 0, "not
            found" where it lies on the other, "undecided" between; by figure.
        note: what limits the experiment; empty if nothing does.
        resampling: how the uncertainty was estimated.
    """

    derived = ("conditions",)

    notion: str
    kv: KVPolicy
    rows: int
    dense: Interval
    correlation: float
    cells: Mapping[str, Quadrant]
    redundancy_effect: Mapping[str, Interval]
    attention_effect: Mapping[str, Interval]
    interaction: Mapping[str, Interval]
    margin: Mapping[str, Interval]
    verdict: Mapping[str, Verdict]
    note: str
    resampling: Resampling

    @property
    def conditions(self) -> dict[str, dict[str, Verdict]]:
        """Is each condition alone worth something? By "redundancy" and "attention", and by figure; as `verdict`."""
        effects = {"redundancy": self.redundancy_effect, "attention": self.attention_effect}
        return {
            name: {figure: _verdict(effect[figure], better, self.rows) for figure, better in BETTER.items()}
            for name, effect in effects.items()
        }


def measure_quadrants(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    redundancy: Mapping[str, Float[Tensor, " layers"]],
    attention: Float[Tensor, " layers"],
    cost: Float[Tensor, " layers"],
    kv: KVPolicy,
    *,
    costs: CostModel,
    draws: int = 4,
    seed: int = 0,
    resampling: Resampling = USUAL,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Quadrants]:
    """Run the experiment for several notions of redundancy; `vision_tables` of a profile are its arguments.

    Args:
        model: with gates, which are not asked.
        batches: with labels and images.
        redundancy: of vision tokens in every layer, small where redundant, by notion.
        attention: VAR of every layer.
        cost: FLOPs that vision tokens save by skipping a layer.
        kv: K/V policy of skipped tokens.
        costs: of the model's layers.
        draws: most sets of a quadrant; their outcomes are averaged row by row.
        seed: of the sets.
        resampling: of rows, for the intervals.
        progress: called with 1 after each different set of each batch: at most 4 `draws` per notion, and 1.

    Raises:
        InputError: fewer than four layers have both values, `draws` is below 1, or no row.
    """
    quadrants = {notion: split_quadrants(table, attention) for notion, table in redundancy.items()}
    sets = {notion: equal_sets(cells, cost, draws, seed) for notion, cells in quadrants.items()}
    chosen = dict.fromkeys(s for cells in sets.values() for several in cells.values() for s in several)
    plans = [plan_without([2 * layer + VISION for layer in layers], len(attention)) for layers in [(), *chosen]]
    everything, *measured = row_effects(model, batches, plans, kv, costs=costs, progress=progress)
    effects = dict(zip(chosen, measured, strict=True))
    return {
        notion: _result(
            notion,
            kv,
            quadrants[notion],
            {name: [effects[s] for s in several] for name, several in sets[notion].items()},
            sets[notion],
            everything,
            spearman(redundancy[notion], attention),
            resampling,
        )
        for notion in redundancy
    }


def _result(
    notion: str,
    kv: KVPolicy,
    layers: Mapping[str, tuple[int, ...]],
    effects: Mapping[str, Sequence[RowEffects]],
    sets: Mapping[str, tuple[tuple[int, ...], ...]],
    everything: RowEffects,
    correlation: float,
    resampling: Resampling,
) -> Quadrants:
    # One table of rows for all figures: right answers by quadrant, divergences by quadrant, and the answer's tokens.
    right = [_mean([e.right for e in effects[name]], everything) for name in QUADRANTS]
    kl = [_mean([e.kl for e in effects[name]], everything) for name in QUADRANTS]
    table = torch.stack([*right, *kl, everything.tokens], -1).numpy()

    def figure(name: str, combine: Callable[[Floats], Floats]) -> Interval:
        start = len(QUADRANTS) * FIGURES.index(name)

        def statistic(means: Floats) -> Floats:
            per = means[..., -1:] if name == "kl" else 1.0
            return combine(means[..., start : start + len(QUADRANTS)] / per)

        return row_interval(table, statistic, resampling)

    def both(combine: Callable[[Floats], Floats]) -> dict[str, Interval]:
        return {name: figure(name, combine) for name in FIGURES}

    cells = {
        name: Quadrant(
            layers[name],
            sets[name],
            float(np.mean([e.compute for e in effects[name]])) if effects[name] else math.nan,
            *(figure(which, itemgetter((..., at))) for which in FIGURES),
        )
        for at, name in enumerate(QUADRANTS)
    }
    losses = {name: row_interval(everything.right - right[at], None, resampling) for at, name in enumerate(QUADRANTS)}
    unhurt = [name for name in QUADRANTS if sets[name] and not losses[name].low > 0]
    margin = {
        "accuracy": figure("accuracy", lambda q: q[..., 0] - np.fmax.reduce(q[..., 1:], axis=-1)),
        "kl": figure("kl", lambda q: q[..., 0] - np.fmin.reduce(q[..., 1:], axis=-1)),
    }
    return Quadrants(
        notion,
        kv,
        len(everything.right),
        row_interval(everything.right, None, resampling),
        correlation,
        cells,
        both(lambda q: (q[..., 0] + q[..., 1] - q[..., 2] - q[..., 3]) / 2),
        both(lambda q: (q[..., 0] + q[..., 2] - q[..., 1] - q[..., 3]) / 2),
        both(lambda q: q[..., 0] - q[..., 1] - q[..., 2] + q[..., 3]),
        margin,
        {name: _verdict(margin[name], better, len(everything.right)) for name, better in BETTER.items()},
        _note(layers, sets, unhurt),
        resampling,
    )


def _mean(rows: Sequence[Tensor], like: RowEffects) -> Tensor:
    return torch.stack(list(rows)).mean(0) if rows else torch.full_like(like.right, torch.nan)


def _verdict(margin: Interval, better: int, rows: int) -> Verdict:
    verdicts: tuple[Verdict, Verdict, Verdict] = ("undecided", "found", "not found")
    return verdicts[better * side(margin, rows)]


def _note(
    layers: Mapping[str, tuple[int, ...]], sets: Mapping[str, tuple[tuple[int, ...], ...]], unhurt: Sequence[str]
) -> str:
    empty = [name for name in QUADRANTS if not sets[name]]
    number = sum(len(of) for of in layers.values())
    notes = []
    if empty:
        of_them = f"none of {number} layers, or only such as cost more than the smallest quadrant"
        notes.append(f"Without a set: {'; '.join(empty)} ({of_them}): effects that need it have no value.")
    sizes = {name: max(len(s) for s in sets[name]) for name in QUADRANTS if sets[name]}
    smallest = min(sizes, key=lambda name: len(layers[name]), default="")
    if smallest and sizes[smallest] < 2:
        notes.append(
            f"The smallest quadrant ({smallest}) limits every set to its FLOPs, those of {sizes[smallest]} layer of "
            f"{number}: single layers decide."
        )
    if len(unhurt) > 1:
        notes.append(f"On these rows no loss of accuracy is shown for {'; '.join(unhurt)}: it cannot rank them.")
    return " ".join(notes)
