"""A plan's gates on a dense model, before or without training."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from skipit.router import Router, RouterConfig, attach, set_gates
from skipit.theory.artefact import check_same_model
from skipit.theory.calibrate import Met, meet
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan
from skipit.theory.time_model import TimeModel, point_of
from skipit.train.data.collate import Collator, batches


def attach_plan(model: Any, plan: Plan, config: RouterConfig | None = None) -> Router:
    """Attach a plan's gates to a dense model, to decide where the plan says.

    Args:
        model: the one the plan was made for.
        plan: weights and biases of the gates.
        config: settings of the router but for its decision points; None is the plan's K/V policy, and defaults.

    Raises:
        CheckpointError: the plan was made for another model.
        RouterConfigError: a decision point is not one of the model's layers.
    """
    check_same_model(plan, fingerprint(model))
    router = attach(model, replace(config or RouterConfig(kv=plan.kv), decide_at=plan.decide_at))
    set_gates(model, plan.weight, plan.bias)
    return router


def meet_plan(model: Any, held: list[dict[str, Tensor]], plan: Plan) -> Met:
    """The threshold at which a plan's gates spend on held-out batches what it was made for, FLOPs or time."""
    costs = CostModel.of(model)
    if plan.latency is None:
        return meet(model, held, costs, plan.budget, plan.kv)
    return meet(model, held, costs, plan.latency, plan.kv, times=TimeModel.of(model))


def gate_by_plan(model: Any, processor: Any, plan: Plan, calibration: Any, *, batch_size: int = 16) -> float:
    """Attach a plan's gates to a dense model and set the threshold that meets its budget on held-out rows.

    Returns:
        The share of dense FLOPs measured there.

    Raises:
        CheckpointError: the plan was made for another model.
    """
    router = attach_plan(model, plan)
    held_out = list(batches(calibration, Collator(processor), batch_size))
    met = meet_plan(model, held_out, plan)
    name = plan.budget if plan.latency is None else point_of(plan.latency)
    router.config = router.config.with_point(name, met.threshold, default=True)
    return met.flops
