"""One budget over dropping tokens and skipping layers: a pruner where the decoder begins, then gates for what stays.

A token that skips every layer under `evict` is a dropped token, so one planner spans both. How much of the budget is
spent on which is a parameter, the share of vision tokens that stays: 1 is gates alone, and where gates let everything
run it is the pruner alone. It is chosen on calibration rows, so neither alone is better there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router import Decision, Gated
from skipit.router.call import Call
from skipit.router.gates import TokenGate, logits_of
from skipit.theory.calibrate import LIMIT, spending
from studies.answers import always, answers, right

from .attended import BY_PROMPT
from .choices import TOLERANCE, OutOfReachError, at_budget, with_gate_cost
from .lab import Lab, System
from .pruners import Choose, Pruned, pruned_share

SHARES = (1.0, 0.85, 0.7, 0.5, 0.35, 0.25, 0.15)  # of vision tokens that stay


@dataclass(frozen=True)
class _Asked:
    """Lets nothing run, and writes down what gates say of those who would stay: what a pass would cost."""

    pruned: Pruned
    said: list[Tensor] = field(default_factory=list)
    decide_at: ClassVar = (0,)

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Nobody runs; the logits of those who would not stay are below every threshold."""
        logits = logits_of(gates, hidden, call.modality)
        self.said.append(logits.masked_fill(~self.pruned.stays(hidden, call), -torch.inf))
        return Decision(torch.zeros_like(logits, dtype=torch.bool))


def pruned_alone(lab: Lab, budget: float, choose: Choose) -> System:
    """A pruner by itself, at the share of vision tokens that spends the budget.

    Raises:
        OutOfReachError: the text alone spends more.
    """
    costs = with_gate_cost(lab.costs, 0.0)
    keep = 1 - at_budget(lambda x: pruned_share(1 - x, lab.steps_of_all, costs), budget)
    options = {"policy": Pruned(choose, keep), "kv": "evict", **BY_PROMPT}
    return System(lab.gated, always(options), costs, chosen={"keep": keep})


def combined(lab: Lab, model: Any, budget: float, choose: Choose) -> System:
    """A pruner and a model's gates at the split of the budget that answers most calibration rows right.

    Of equal splits the one that drops least. `chosen` has all that were tried, for a figure of split against accuracy.
    """
    tried: list[dict[str, float]] = []
    systems: list[System] = []
    for keep in SHARES:
        if pruned_share(keep, lab.steps_of_all, lab.costs) < budget - TOLERANCE:
            break  # what is left of the budget would not be spent
        systems.append(_split(lab, model, budget, Pruned(choose, keep)))
    try:
        alone = pruned_alone(lab, budget, choose)
        systems.append(replace(alone, chosen={**alone.chosen, "threshold": -LIMIT}))
    except OutOfReachError:
        pass
    for system in systems:
        found = answers(system.model, lab.held_out, system.options)
        accuracy = found.same(right(lab.held_out))
        tried.append({**system.chosen, "accuracy": accuracy, "compute": found.share(system.costs)})
    best = max(range(len(systems)), key=lambda index: tried[index]["accuracy"])
    return replace(systems[best], chosen={**systems[best].chosen, "splits": tried})


def _split(lab: Lab, model: Any, budget: float, pruned: Pruned) -> System:
    """Gates with the threshold at which what stays spends the budget, found without running any layer."""
    asked = _Asked(pruned)
    steps = answers(model, lab.held_out, always({"policy": asked, "kv": "evict", **BY_PROMPT})).steps
    spent = spending(steps, asked.said, lab.costs)
    threshold = at_budget(spent, budget, low=-LIMIT, high=LIMIT, steps=24)
    options = {"policy": replace(pruned, rest=Gated(threshold)), "kv": "evict", **BY_PROMPT}
    return System(model, always(options), lab.costs, chosen={"keep": pruned.keep, "threshold": threshold})
