"""Peers that learn who runs what: from a study and a budget to a trained model, and its random control."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from skipit.router import Gated
from skipit.router.config import Unit
from studies.answers import always, answers

from .attended import BY_PROMPT
from .choices import TOLERANCE, OutOfReachError, pmod_keep, with_gate_cost
from .controls import OVER_ROWS, WITHIN, Control, controlled
from .gates import DLLMGate, FlexiGate, linear_flops, scale_by_router, scale_vision, zero_gates
from .lab import Lab, System, Systems
from .policies import SequenceRouter, TopVision
from .training import depth_penalty, gate_penalty, rate_penalty, sequence_penalty

FLEXIDEPTH_WEIGHT = 1e-3


def _with_control(name: str, learned: System, control: Control, lab: Lab) -> Systems:
    return {name: [learned], f"{name}: {control.name}": [controlled(learned, control, lab.seed)]}


def router_tuning(unit: Unit, lab: Lab, budget: float) -> Systems:
    """Router-Tuning: one decision per row and layer, in the last half but the final one; on attention, or on blocks."""
    layers = len(lab.costs.layers)
    first, end = layers // 2, layers - 1
    options: dict[str, Any] = {"policy": SequenceRouter(first, end), "kv": "evict", "unit": unit, **BY_PROMPT}

    def at(threshold: float) -> Mapping[str, Any]:
        return {**options, "policy": SequenceRouter(first, end, threshold)}

    # What closed gates leave tells which share of the routed part may run.
    floor = answers(lab.gated, lab.held_out, always(at(40.0))).share(lab.costs)
    if floor > budget + TOLERANCE:
        raise OutOfReachError(floor, budget)
    capacity = max(0.0, (budget - floor) / (1 - floor))
    model = lab.fit(budget, options, penalty=sequence_penalty(capacity, first, end))
    met = lab.meet(model, lab.costs, budget, at, low=-40.0, high=40.0)
    name = "router-tuning" if unit == "attention" else "router-tuning-block"
    return _with_control(name, System(model, always(met), lab.costs), OVER_ROWS, lab)


def layer_route(lab: Lab, budget: float) -> Systems:
    """LayerRoute (arXiv 2606.01838): every block has a router Linear(d, 1), one hard decision per input and block.

    Straight-through, with LoRA, in one training with a term on the gates. The authors train on text; their abstract is
    what was at hand, so these are ours: the router reads the mean over the prompt, LoRA adapts what it does for all
    methods here, and the term is the mean gate as far as it is above what the budget lets run.
    """
    layers = len(lab.costs.layers)
    options: dict[str, Any] = {"policy": SequenceRouter(0, layers), "kv": "evict", **BY_PROMPT}

    def at(threshold: float) -> Mapping[str, Any]:
        return {**options, "policy": SequenceRouter(0, layers, threshold)}

    gates = sum(cost.gate for cost in lab.costs.layers) / sum(cost.linear for cost in lab.costs.layers)
    model = lab.fit(budget, options, penalty=gate_penalty(max(0.0, budget - gates)))
    met = lab.meet(model, lab.costs, budget, at, low=-40.0, high=40.0)
    return _with_control("layer-route", System(model, always(met), lab.costs), OVER_ROWS, lab)


def dllm(lab: Lab, budget: float) -> Systems:
    """D-LLM: a gate MLP per layer and token, Gumbel straight-through, a loss on each token's rate, keys evicted."""
    width = lab.dense[0].config.get_text_config().hidden_size
    costs = with_gate_cost(lab.costs, linear_flops(DLLMGate(width)))
    options: dict[str, Any] = {"policy": Gated(), "kv": "evict"}
    gates = sum(layer.gate for layer in costs.layers) / sum(layer.linear for layer in costs.layers)
    model = lab.fit(budget, options, gate=lambda: DLLMGate(width), penalty=rate_penalty(max(0.0, budget - gates)))
    met = lab.meet(model, costs, budget, lambda x: {**options, "policy": Gated(x)}, low=-30.0, high=30.0)
    return _with_control("d-llm", System(model, always(met), costs), WITHIN, lab)


def pmod(lab: Lab, budget: float) -> Systems:
    """p-MoD: per layer the top vision tokens by a weight that also scales what the layer adds; fewer with depth."""
    layers = len(lab.costs.layers)

    def at(x: float) -> Mapping[str, Any]:
        return {"policy": TopVision(pmod_keep(layers, 1 - 2 * x)), "kv": "evict"}

    # How many run depends on no gate, so the schedule that meets the budget is known before training.
    options = lab.meet(lab.gated, lab.costs, budget, at)

    def change(model: Any) -> None:
        zero_gates(model)
        scale_vision(model)

    model = lab.fit(budget, options, change=change)
    random = {**options, "policy": replace(options["policy"], seed=lab.seed)}
    return {
        "p-mod": [System(model, always(options), lab.costs)],
        "p-mod: random tokens": [System(model, always(random), lab.costs)],
    }


def flexidepth(lab: Lab, budget: float) -> Systems:
    """FlexiDepth: a bottleneck router that scales the MLP, an adapter where a token skips, a loss on the squared depth.

    In all layers, where the authors convert the last half.
    """
    text = lab.dense[0].config.get_text_config()

    def gate() -> FlexiGate:
        return FlexiGate(text.hidden_size, text.intermediate_size)

    costs = with_gate_cost(lab.costs, gate().router_flops, gate().adapter_flops)
    options: dict[str, Any] = {"policy": Gated(), "kv": "retain"}
    floor, total = (sum(getattr(c, name) for c in costs.layers) for name in ("keys_values", "linear"))
    gates = sum(c.gate for c in costs.layers)
    penalty = depth_penalty(FLEXIDEPTH_WEIGHT, max(0.0, (budget * total - floor - gates) / (total - floor)))
    model = lab.fit(budget, options, gate=gate, change=scale_by_router, penalty=penalty, soft=True)
    met = lab.meet(model, costs, budget, lambda x: {**options, "policy": Gated(x)}, low=-30.0, high=30.0)
    return _with_control("flexidepth", System(model, always(met), costs), WITHIN, lab)
