"""Peers' static choices of what to skip, made to meet a measured budget.

Every choice is one function of how much is skipped, x in [0, 1], that gives a run rate per unit: whole units in the
peer's order, and of the next one a share of its tokens. So peers can be compared at equal measured FLOPs, not at the
nearest number of layers. x is found by bisection on the FLOPs that gathered execution really spends.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router import SkipItError, Step
from skipit.router.config import KVPolicy, Unit
from skipit.theory.cost import CostModel, share_of

from .policies import UnitRates
from .similarities import Similarities

Rates = Float[Tensor, "layers modality"]
Order = Sequence[Sequence[tuple[int, int]]]
TOLERANCE = 0.002


class OutOfReachError(SkipItError):
    """A method cannot spend as little as the budget."""

    def __init__(self, floor: float, budget: float) -> None:
        super().__init__(f"budget {budget:g}: this method spends {floor:.3f} at least. Choose a larger budget for it.")
        self.floor = floor


@dataclass(frozen=True)
class Static:
    """What a peer skips, the same for every input.

    Attributes:
        rates: from the share x of what may be skipped to the run rate of each unit.
        kv: what becomes of skipped keys and values. Where all tokens skip a layer nobody reads them: `evict`.
        unit: what a token skips.
        seed: of the draws for a unit that runs for a share of its tokens.
    """

    rates: Callable[[float], Rates]
    kv: KVPolicy
    unit: Unit = "block"
    seed: int = 0

    def at(self, x: float) -> dict[str, Any]:
        """The options of `running` that skip the share x of what may be skipped."""
        return {"policy": UnitRates(self.rates(x), self.seed), "kv": self.kv, "unit": self.unit}

    def share(self, x: float, steps: Iterable[Step], costs: CostModel) -> float:
        """The share of FLOPs that gathered execution spends then on the tokens of some steps."""
        policy = UnitRates(self.rates(x), self.seed)
        return share_of([policy.planned(step, kv=self.kv, unit=self.unit) for step in steps], costs)


def in_order(order: Order, layers: int) -> Callable[[float], Rates]:
    """Rates that skip groups of units one after another.

    Example:
        >>> in_order([[(1, 0), (1, 1)], [(0, 1)]], layers=2)(0.75).tolist()
        [[1.0, 0.5], [0.0, 0.0]]
    """

    def rates(x: float) -> Rates:
        table = torch.ones(layers, 2)
        for place, group in enumerate(order):
            for unit in group:
                table[unit] = min(1.0, max(0.0, 1 - (x * len(order) - place)))
        return table

    return rates


def best_block(angles: Float[Tensor, "boundaries boundaries"]) -> Callable[[float], Rates]:
    """Rates that skip one block of consecutive layers: of this length, the one over which the last token turns least.

    Args:
        angles: of `Similarities`.
    """
    layers = len(angles) - 1

    def rates(x: float) -> Rates:
        table = torch.ones(layers, 2)
        length = min(layers, int(-(-x * layers // 1)))
        if length:
            start = int(angles.diagonal(length).argmin())
            table[start : start + length] = 0.0
            table[start + length - 1] = length - x * layers  # a part of the last one runs
        return table

    return rates


def static_choices(
    found: Similarities, contribution: Float[Tensor, "layers modality"], seed: int, draws: int = 5
) -> dict[str, list[Static]]:
    """The peers' static choices by name; random ones, the controls, are drawn several times.

    `random`: layers 1 to L - 2 in random order; `random-vision`, `random-attention`, `random-mlp`: vision, or a part of
    them, alone. `bi`: whole layers by least block influence (ShortGPT), `bi-vision`: their vision tokens only.
    `angular`: one block of layers (Gromov et al.). `drop-attention`, `drop-mlp`: by largest similarity (LLM-Drop).
    `shortv`: vision updates by least layer contribution. `vtw`: vision leaves from a layer on.

    Args:
        found: states compared on calibration rows.
        contribution: ShortV's, of `layer_contribution`.
        seed: of random layers.
        draws: how many sets of random layers.
    """
    layers = len(found.influence)

    def whole(scores: Tensor) -> Callable[[float], Rates]:
        return in_order([[(layer, 0), (layer, 1)] for layer in scores.argsort(stable=True).tolist()], layers)

    def vision(scores: Tensor) -> Callable[[float], Rates]:
        return in_order([[(layer, 1)] for layer in scores.argsort(stable=True).tolist()], layers)

    def random(units: tuple[int, ...], kv: KVPolicy, unit: Unit = "block") -> list[Static]:
        found = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            middle = 1 + torch.randperm(layers - 2, generator=generator)
            order = [[(layer, modality) for modality in units] for layer in middle.tolist()]
            found.append(Static(in_order(order, layers), kv, unit))
        return found

    return {
        "random": random((0, 1), "evict"),
        "random-vision": random((1,), "retain"),
        "random-attention": random((0, 1), "evict", "attention"),
        "random-mlp": random((0, 1), "evict", "mlp"),
        "bi": [Static(whole(found.influence), "evict")],
        "bi-vision": [Static(vision(found.vision_influence), "retain")],
        "angular": [Static(best_block(found.angles), "evict")],
        "drop-attention": [Static(whole(-found.attention), "evict", "attention")],
        "drop-mlp": [Static(whole(-found.mlp), "evict", "mlp")],
        "shortv": [Static(vision(contribution[:, 1]), "retain")],
        "vtw": [Static(in_order([[(layer, 1)] for layer in reversed(range(layers))], layers), "evict")],
    }


def pmod_keep(layers: int, shift: float) -> Float[Tensor, " layers"]:
    """p-MoD's share of vision tokens per layer: r = max(.5 + .5 cos(pi l / (L - 1)) + shift, .15), 1 where above .85.

    Example:
        >>> [round(share, 2) for share in pmod_keep(5, 0.0).tolist()]
        [1.0, 1.0, 0.5, 0.15, 0.15]
    """
    ratio = 0.5 + 0.5 * torch.cos(torch.pi * torch.arange(layers) / (layers - 1)) + shift
    return torch.where(ratio > 0.85, 1.0, ratio.clamp(min=0.15))


def at_budget(
    share: Callable[[float], float], budget: float, *, low: float = 0.0, high: float = 1.0, steps: int = 12
) -> float:
    """The point at which a share of FLOPs that falls with it meets a budget: the nearest one met in a bisection.

    Args:
        share: measures at a point.
        budget: share of dense FLOPs.
        low: where most is spent.
        high: where least is spent.
        steps: of the bisection.

    Raises:
        OutOfReachError: `high` spends more than the budget.
    """
    least = share(high)
    if least > budget + TOLERANCE:
        raise OutOfReachError(least, budget)
    best, nearest = high, abs(least - budget)
    for _ in range(steps):
        if nearest <= TOLERANCE:
            break
        middle = (low + high) / 2
        spent = share(middle)
        if abs(spent - budget) < nearest:
            best, nearest = middle, abs(spent - budget)
        low, high = (middle, high) if spent > budget else (low, middle)
    return best


def with_gate_cost(costs: CostModel, gate: float, skipped: float = 0.0) -> CostModel:
    """The costs of layers whose gate costs `gate` FLOPs per token, and what replaces a skipped layer `skipped`."""
    layers = (replace(layer, gate=gate, keys_values=layer.keys_values + skipped) for layer in costs.layers)
    return CostModel(tuple(layers))


def executed(steps: Sequence[Step]) -> Float[Tensor, " layers"]:
    """Share of real tokens that ran each layer: the learned rates that a random control keeps."""
    ran = torch.stack([step.run.double().sum((1, 2)) for step in steps]).sum(0)
    return (ran / sum(float(step.real.sum()) for step in steps)).cpu()
