"""Visual tokens that skip the attention, the FFN or both of some layers, by how little the answer notices.

Attend, Transform, or Silence (arXiv 2606.31903), re-implemented from its abstract: "late visual-token updates can
remain large while having little effect on answer-token representations"; layers are decomposed into attention and FFN,
and visual tokens bypass either or both while the whole sequence stays. The abstract is all of it that was at hand, so
the measure below and the order are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import FixedUnits, Step, find_router, gated_layers, running, token_modality
from skipit.router.call import KWARG, NO_IMAGES, Call, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.theory.answers import teacher_forced
from skipit.theory.cost import CostModel, share_of
from skipit.theory.measures import cosine_distance

from .policies import UnitRates, unwatched

Operator = tuple[int, Unit]  # a layer, and its "attention" or "mlp"
OPERATORS: tuple[Unit, Unit] = ("attention", "mlp")


@dataclass(frozen=True)
class OperatorRates(UnitRates):
    """Rates of vision tokens whose layers differ in what a token skips there: `units` [layers].

    The model must have `units_by_layer`.
    """

    units: tuple[Unit, ...] = ()


def units_by_layer(model: nn.Module) -> list[Any]:
    """Let every layer skip what an `OperatorRates` says of it; any other policy changes nothing.

    Returns:
        Handles whose `remove()` ends it.
    """
    return [layer.register_forward_pre_hook(_own_unit, with_kwargs=True) for layer in gated_layers(model)]


def _own_unit(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    call = kwargs.get(KWARG)
    policy = unwatched(call.policy) if isinstance(call, Call) else None
    if not isinstance(call, Call) or not isinstance(policy, OperatorRates):
        return None
    return args, {**kwargs, KWARG: replace(call, unit=policy.units[module.skipit_index])}


@dataclass(frozen=True)
class OperatorCosts:
    """What tokens spend where each layer has a unit of its own."""

    costs: CostModel
    units: tuple[Unit, ...]

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self.costs.depth

    def spend(
        self,
        run: Float[Tensor, "layers batch seq"],
        real: Bool[Tensor, "batch seq"],
        kv: KVPolicy,
        held: Float[Tensor, "layers batch"] | None = None,
        seen: Float[Tensor, " batch"] | None = None,
        unit: Unit = "block",
        images: ImageStates = NO_IMAGES,
    ) -> tuple[Float[Tensor, "layers batch seq"], Float[Tensor, "layers batch seq"]]:
        """See `CostModel.spend`; the one unit of the call counts for nothing."""
        every = {own: self.costs.spend(run, real, kv, held, seen, own, images) for own in set(self.units)}
        executed = [every[own][0][layer] for layer, own in enumerate(self.units)]
        return torch.stack(executed), every[self.units[0]][1]


@dataclass(frozen=True)
class OperatorSkips:
    """Operators that visual tokens skip one after another; keys and values are kept.

    Attributes:
        order: of all operators, the first to be skipped first.
        costs: of the layers.
        seed: of the draws for an operator that runs for a share of its tokens.
    """

    order: Sequence[Operator]
    costs: CostModel
    seed: int = 0

    def at(self, x: float) -> tuple[OperatorRates, OperatorCosts]:
        """Who runs, and what it costs, when the share x of the order is skipped.

        The next operator is skipped by a share of the tokens. Where it is the second of its layer, which has no one
        unit then, a share of them skips the whole layer instead and the others nothing there: as many FLOPs.
        """
        layers = self.costs.depth
        whole = min(int(x * len(self.order) + 1e-9), len(self.order))
        part = x * len(self.order) - whole
        units: list[Unit] = ["block"] * layers
        rate = torch.ones(layers, 2)
        skipped: dict[int, list[Unit]] = {}
        for layer, unit in self.order[:whole]:
            skipped.setdefault(layer, []).append(unit)
        for layer, parts in skipped.items():
            rate[layer, 1], units[layer] = 0.0, parts[0] if len(parts) == 1 else "block"
        if part > 1e-9:
            layer, unit = self.order[whole]
            if layer not in skipped:
                rate[layer, 1], units[layer] = 1 - part, unit
            else:
                first, second = (operator_flops(self.costs, (layer, each)) for each in (*skipped[layer], unit))
                rate[layer, 1], units[layer] = 1 - (first + part * second) / (first + second), "block"
        return OperatorRates(rate, self.seed, tuple(units)), OperatorCosts(self.costs, tuple(units))

    def share(self, x: float, steps: Iterable[Step]) -> float:
        """The share of FLOPs that gathered execution spends then on the tokens of some steps."""
        policy, costs = self.at(x)
        return share_of([policy.planned(step, kv="retain") for step in steps], costs)


def operator_flops(costs: CostModel, operator: Operator) -> float:
    """FLOPs per token that skipping an operator saves under `retain`, pairs with keys apart."""
    layer, unit = operator
    cost = costs.layers[layer]
    return cost.mlp if unit == "mlp" else cost.linear - cost.mlp - cost.keys_values


@torch.no_grad()
def noticed(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[Operator, float]:
    """How much the answer notices of what each operator does to visual tokens: E [1 - cos(h, h')].

    h is the last state at a position that predicts a token of the answer, h' the same without the operator's update of
    the visual tokens, whose keys and values are kept. One forward pass per operator.

    Args:
        model: with gates, which are not asked.
        batches: with labels.
    """
    layers = find_router(model)[1].num_layers
    total: dict[Operator, float] = {(layer, unit): 0.0 for layer in range(layers) for unit in OPERATORS}
    count = 0
    for batch in teacher_forced(model, batches):
        vision = token_modality(model.config, batch.inputs["input_ids"], batch.inputs.get("mm_token_type_ids"))
        answer = batch.answer & vision.bool().any(-1, keepdim=True)
        count += int(answer.sum())
        with running(mode="dense"):
            full = _last_states(model, batch.inputs)[:, :-1][answer]
        for layer, unit in total:
            plan = torch.ones(layers, 2, dtype=torch.bool)
            plan[layer, 1] = False
            with running(policy=FixedUnits(plan), kv="retain", unit=unit, mode="gathered"):
                without = _last_states(model, batch.inputs)[:, :-1][answer]
            total[layer, unit] += float(cosine_distance(full, without).double().sum())
    return {operator: value / count for operator, value in total.items()}


def _last_states(model: nn.Module, inputs: dict[str, Tensor]) -> Float[Tensor, "batch seq dim"]:
    states: Tensor = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return states.float()


def quietest(found: dict[Operator, float], costs: CostModel) -> list[Operator]:
    """Operators by how little is noticed per FLOP saved."""
    return sorted(found, key=lambda operator: found[operator] / operator_flops(costs, operator))


def shuffled(layers: int, seed: int) -> list[Operator]:
    """All operators in random order: the control."""
    every = [(layer, unit) for layer in range(layers) for unit in OPERATORS]
    return [every[i] for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()]
