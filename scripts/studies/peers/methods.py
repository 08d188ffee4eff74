"""Every method of the comparison with peers: from a study and a budget to models ready to be measured."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipit.router import MODALITIES, Gated, Step, attach
from skipit.router.config import KVPolicy, Unit
from skipit.theory.calibrate import calibrate
from skipit.theory.cost import CostModel
from skipit.theory.plan import make_plan
from skipit.train.data.sources import load_model
from skipit.train.gating import attach_plan
from studies.answers import Options, always, answers
from studies.contribution import layer_contribution
from studies.study import Study

from .choices import (
    TOLERANCE,
    OutOfReachError,
    Static,
    at_budget,
    executed,
    pmod_keep,
    static_choices,
    with_gate_cost,
)
from .gates import DLLMGate, FlexiGate, linear_flops, scale_by_router, scale_vision, zero_gates
from .policies import FastV, FixedMask, SequenceRouter, TopVision, UnitRates, over_layers, over_tokens, watch_attention
from .similarities import similarities
from .training import depth_penalty, fit, rate_penalty, sequence_penalty

LC_ROWS = 40  # as many as ShortV uses
FLEXIDEPTH_WEIGHT = 1e-3
FASTV_LAYER = 1  # the second layer's attention, as the authors' K = 2


@dataclass(frozen=True)
class System:
    """A model and how to run it.

    Attributes:
        model: in eval mode.
        options: of `running`, for a batch.
        costs: of its layers, with those of the method's own gates.
        timed: False where the options need the whole input, so that nothing can be generated.
    """

    model: Any
    options: Options
    costs: CostModel
    timed: bool = True


Systems = Mapping[str, list[System]]


class Lab(Study):
    """A study whose methods are the peers' and ours: what was measured on the dense model for all of them."""

    @cached_property
    def steps_of_all(self) -> list[Step]:
        """The held-out rows' tokens."""
        return answers(self.gated, self.held_out, always({})).steps

    @cached_property
    def static(self) -> dict[str, list[Static]]:
        """The peers' static choices."""
        contribution = layer_contribution(self.gated, self.read("calibration", LC_ROWS))
        return static_choices(similarities(self.gated, self.held_out), contribution, self.seed)

    def meet(
        self,
        model: Any,
        costs: CostModel,
        budget: float,
        make: Callable[[float], Mapping[str, Any]],
        *,
        low: float = 0.0,
        high: float = 1.0,
    ) -> Mapping[str, Any]:
        """The options of `running` that spend the budget on the held-out rows: `make` between `low` and `high`."""

        def share(x: float) -> float:
            return answers(model, self.held_out, always(make(x))).share(costs)

        return make(at_budget(share, budget, low=low, high=high))

    def fit(self, budget: float, options: Mapping[str, Any], **more: Any) -> Any:
        """Train as `training.fit` does, with gates biased to run: the peers' practice."""
        config = self.config(budget, options.get("kv", "retain"), unit=options.get("unit", "block"))
        model, processor = load_model("reference")
        plan = make_plan(self.profile, budget, config.kv, "run")
        rows = self.rows("train", config.steps * config.batch_size)
        return fit(model, processor, rows, plan, config, options, **more)


def untrained(name: str, lab: Lab, budget: float) -> Systems:
    """A static choice of a peer, as it is."""
    costs = with_gate_cost(lab.costs, 0.0)
    met = [_met(lab, choice, costs, budget) for choice in lab.static[name]]
    return {name: [System(lab.gated, always(options), costs) for options in met]}


def tuned(name: str, lab: Lab, budget: float) -> Systems:
    """A static choice of a peer, fixed while LoRA is trained around it; of random ones the first."""
    costs = with_gate_cost(lab.costs, 0.0)
    options = _met(lab, lab.static[name][0], costs, budget)
    return {f"{name}+lora": [System(lab.fit(budget, options), always(options), costs)]}


def _met(lab: Lab, choice: Static, costs: CostModel, budget: float) -> Mapping[str, Any]:
    """What a static choice runs at the budget; who runs depends on no state, so nothing need be executed to find it."""
    return choice.at(at_budget(lambda x: choice.share(x, lab.steps_of_all, costs), budget))


def lora(lab: Lab, budget: float) -> Systems:
    """LoRA alone, every layer runs: what fine-tuning gives without skipping."""
    options = {"policy": UnitRates(torch.ones(len(lab.costs.layers), 2))}
    return {"lora": [System(lab.fit(1.0, options), always(options), with_gate_cost(lab.costs, 0.0))]}


def fastv(lab: Lab, budget: float) -> Systems:
    """FastV: after the second layer only the vision tokens that the last prompt token attends to most."""
    model, _ = load_model("reference")
    attach(model)
    watch_attention(model, FASTV_LAYER)
    costs = with_gate_cost(lab.costs, 0.0)
    options = lab.meet(model, costs, budget, lambda x: {"policy": FastV(FASTV_LAYER, 1 - x), "kv": "evict"})
    return {"fastv": [System(model, always(options), costs)]}


def theory(kv: KVPolicy, lab: Lab, budget: float) -> Systems:
    """Our plan without training."""
    model, _ = load_model("reference")
    attach_plan(model, make_plan(lab.profile, budget, kv))
    return {f"theory-{kv}": [_calibrated(lab, model, budget, kv)]}


def ours(kv: KVPolicy, lab: Lab, budget: float) -> Systems:
    """Our plan, trained; and random controls on the same trained model, which keep how much is skipped, not what."""
    with tempfile.TemporaryDirectory() as folder:
        merged, _ = lab.trained(lab.config(budget, kv), Path(folder) / "run", calibrated=False)
    learned = _calibrated(lab, merged, budget, kv)
    rates = executed(answers(merged, lab.held_out, learned.options).steps)

    def shuffled(shuffle: Callable[[Step], Tensor]) -> System:
        def options(batch: dict[str, Tensor]) -> Mapping[str, Any]:
            step = answers(merged, [batch], learned.options).steps[0]
            return {"policy": FixedMask(shuffle(step)), "kv": kv}

        return System(merged, options, learned.costs, timed=False)

    bernoulli = {"policy": UnitRates(rates[:, None].expand(-1, 2), lab.seed), "kv": kv}
    name = f"ours-{kv}"
    return {
        name: [learned],
        f"{name}: Bernoulli at its layers' rates": [System(merged, always(bernoulli), with_gate_cost(lab.costs, 0.0))],
        f"{name}: permuted over tokens": [shuffled(lambda step: over_tokens(step.run, step.real, lab.seed))],
        f"{name}: permuted over tokens of a modality": [shuffled(lambda step: _within(step, lab.seed))],
        f"{name}: permuted over layers": [shuffled(lambda step: over_layers(step.run, lab.seed))],
    }


def _within(step: Step, seed: int) -> Tensor:
    """A step's decisions, shuffled over the tokens of each modality."""
    places = [step.real & (step.modality == modality) for modality in range(len(MODALITIES))]
    parts = [over_tokens(step.run & here, here, seed) for here in places]
    return torch.stack(parts).any(0)


def _calibrated(lab: Lab, model: Any, budget: float, kv: KVPolicy) -> System:
    threshold, _ = calibrate(model, lab.held_out, lab.costs, budget, kv)
    return System(model, always({"policy": Gated(threshold), "kv": kv}), lab.costs)


def router_tuning(unit: Unit, lab: Lab, budget: float) -> Systems:
    """Router-Tuning: one decision per row and layer, in the last half but the final one; on attention, or on blocks."""
    layers = len(lab.costs.layers)
    first, end = layers // 2, layers - 1
    options: dict[str, Any] = {"policy": SequenceRouter(layers), "kv": "evict", "unit": unit}

    def at(threshold: float) -> Mapping[str, Any]:
        return {**options, "policy": SequenceRouter(layers, threshold)}

    # What closed gates leave tells which share of the routed part may run.
    floor = answers(lab.gated, lab.held_out, always(at(40.0))).share(lab.costs)
    if floor > budget + TOLERANCE:
        raise OutOfReachError(floor, budget)
    capacity = max(0.0, (budget - floor) / (1 - floor))
    model = lab.fit(budget, options, penalty=sequence_penalty(capacity, first, end))
    met = lab.meet(model, lab.costs, budget, at, low=-40.0, high=40.0)
    name = "router-tuning" if unit == "attention" else "router-tuning-block"
    return {name: [System(model, always(met), lab.costs)]}


def dllm(lab: Lab, budget: float) -> Systems:
    """D-LLM: a gate MLP per layer and token, Gumbel straight-through, a loss on each token's rate, keys evicted."""
    width = lab.dense[0].config.get_text_config().hidden_size
    costs = with_gate_cost(lab.costs, linear_flops(DLLMGate(width)))
    options: dict[str, Any] = {"policy": Gated(), "kv": "evict"}
    gates = sum(layer.gate for layer in costs.layers) / sum(layer.linear for layer in costs.layers)
    model = lab.fit(budget, options, gate=lambda: DLLMGate(width), penalty=rate_penalty(max(0.0, budget - gates)))
    met = lab.meet(model, costs, budget, lambda x: {**options, "policy": Gated(x)}, low=-30.0, high=30.0)
    return {"d-llm": [System(model, always(met), costs)]}


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

    return {"p-mod": [System(lab.fit(budget, options, change=change), always(options), lab.costs)]}


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
    return {"flexidepth": [System(model, always(met), costs)]}


STATIC = ("random", "bi", "bi-vision", "angular", "drop-attention", "drop-mlp", "shortv", "vtw")
Method = Callable[[Lab, float], Systems]
UNTRAINED: dict[str, Method] = {
    **{name: partial(untrained, name) for name in STATIC},
    "fastv": fastv,
    "theory-retain": partial(theory, "retain"),
    "theory-evict": partial(theory, "evict"),
}
TRAINED: dict[str, Method] = {
    "lora": lora,
    **{f"{name}+lora": partial(tuned, name) for name in ("random", "bi", "bi-vision", "shortv", "vtw")},
    "router-tuning": partial(router_tuning, "attention"),
    "router-tuning-block": partial(router_tuning, "block"),
    "d-llm": dllm,
    "p-mod": pmod,
    "flexidepth": flexidepth,
    "ours-retain": partial(ours, "retain"),
    "ours-evict": partial(ours, "evict"),
}
METHODS: dict[str, Method] = {**UNTRAINED, **TRAINED}
