"""Every method of the comparison with peers: from a study and a budget to models ready to be measured."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from skipit.router import attach
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel, share_of
from studies.answers import always, answers

from .attended import BY_PROMPT, Attended, fastv, pyramid_drop, watch_attention
from .choices import Static, at_budget, executed, with_gate_cost
from .controls import OVER_LAYERS, OVER_TOKENS, WITHIN, controlled
from .lab import Lab, System, Systems
from .one_budget import combined, pruned_alone
from .policies import UnitRates
from .pruners import PRUNERS, random_pruners
from .routed import dllm, flexidepth, layer_route, pmod, router_tuning
from .silence import OperatorSkips, shuffled, units_by_layer

DRAWS = 5  # of random choices


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


def silent(name: str, lab: Lab, budget: float, lora: bool = False) -> Systems:
    """Attend, Transform, or Silence: visual tokens skip the operators that answers notice least; or random ones."""
    layers = len(lab.costs.layers)
    if name == "silent":
        choices = [OperatorSkips(lab.quiet, with_gate_cost(lab.costs, 0.0), lab.seed)]
    else:
        seeds = range(1000 * lab.seed, 1000 * lab.seed + DRAWS)
        choices = [OperatorSkips(shuffled(layers, seed), with_gate_cost(lab.costs, 0.0), seed) for seed in seeds]
    model = lab.load()
    attach(model)
    units_by_layer(model)
    systems = []
    for choice in choices:
        policy, costs = choice.at(at_budget(partial(choice.share, steps=lab.steps_of_all), budget))
        options = {"policy": policy, "kv": "retain"}
        runs = lab.fit(budget, options, change=units_by_layer) if lora else model
        systems.append(System(runs, always(options), costs, chosen={"order": choice.order}))
    return {f"{name}+lora" if lora else name: systems}


def attended(name: str, lab: Lab, budget: float) -> Systems:
    """FastV or PyramidDrop: vision tokens to which the last prompt token attends least leave; or random ones."""
    layers = len(lab.costs.layers)
    make = fastv if name == "fastv" else partial(pyramid_drop, layers=layers)
    costs = with_gate_cost(lab.costs, 0.0)

    def share(x: float) -> float:
        return share_of(map(make(1 - x).planned, lab.steps_of_all), costs)

    keep = 1 - at_budget(share, budget)
    model = lab.load()
    attach(model)
    watch_attention(model, [layer for layer, _ in make(keep).stages])

    def system(runs: Any, policy: Attended) -> System:
        options = {"policy": policy, "kv": "evict", **BY_PROMPT}
        return System(runs, always(options), costs, chosen={"stages": policy.stages})

    seeds = range(1000 * lab.seed, 1000 * lab.seed + DRAWS)
    return {
        name: [system(model, make(keep))],
        f"{name}: random tokens": [system(lab.gated, make(keep, seed=seed)) for seed in seeds],
    }


def pruned(name: str, lab: Lab, budget: float) -> Systems:
    """A pruner where the decoder begins, by itself; or random tokens."""
    chosen = random_pruners(lab.seed, DRAWS) if name == "random" else [PRUNERS[name]]
    return {_label(name): [pruned_alone(lab, budget, choose) for choose in chosen]}


def pruned_tuned(name: str, lab: Lab, budget: float) -> Systems:
    """A pruner with LoRA trained around it."""
    alone = pruned_alone(lab, budget, PRUNERS[name])
    options = alone.options({})
    return {f"{name}+lora": [System(lab.fit(budget, options), alone.options, alone.costs, chosen=alone.chosen)]}


def both(name: str, trained: bool, lab: Lab, budget: float) -> Systems:
    """One budget over dropping tokens and skipping layers: a pruner, or random tokens, and our gates."""
    model = lab.learned(budget, "evict") if trained else lab.planned(budget, "evict")
    choose = random_pruners(lab.seed, 1)[0] if name == "random" else PRUNERS[name]
    return {f"{'ours' if trained else 'theory'}-evict+{_label(name)}": [combined(lab, model, budget, choose)]}


def _label(name: str) -> str:
    return "random-tokens" if name == "random" else name


def theory(kv: KVPolicy, lab: Lab, budget: float) -> Systems:
    """Our plan without training."""
    return {f"theory-{kv}": [lab.calibrated(lab.planned(budget, kv), budget, kv)]}


def ours(kv: KVPolicy, lab: Lab, budget: float) -> Systems:
    """Our plan, trained; and random controls on the same trained model, which keep how much is skipped, not what."""
    merged, name = lab.learned(budget, kv), f"ours-{kv}"
    learned = lab.calibrated(merged, budget, kv)
    rates = executed(answers(merged, lab.held_out, learned.options).steps)
    bernoulli = {"policy": UnitRates(rates[:, None].expand(-1, 2), lab.seed), "kv": kv}
    return {
        name: [learned],
        f"{name}: Bernoulli at its layers' rates": [System(merged, always(bernoulli), with_gate_cost(lab.costs, 0.0))],
        **{f"{name}: {c.name}": [controlled(learned, c, lab.seed)] for c in (OVER_TOKENS, WITHIN, OVER_LAYERS)},
    }


STATIC: tuple[str, ...] = (
    "random",
    "random-vision",
    "random-attention",
    "random-mlp",
    "bi",
    "bi-vision",
    "angular",
    "drop-attention",
)
STATIC += ("drop-mlp", "shortv", "vtw")
Method = Callable[[Lab, float], Systems]
UNTRAINED: dict[str, Method] = {
    **{name: partial(untrained, name) for name in STATIC},
    "silent": partial(silent, "silent"),
    "random-operators": partial(silent, "random-operators"),
    "fastv": partial(attended, "fastv"),
    "pyramid-drop": partial(attended, "pyramid-drop"),
    **{_label(name): partial(pruned, name) for name in (*PRUNERS, "random")},
    "theory-retain": partial(theory, "retain"),
    "theory-evict": partial(theory, "evict"),
    **{f"theory-evict+{_label(name)}": partial(both, name, False) for name in (*PRUNERS, "random")},
}
TRAINED: dict[str, Method] = {
    "lora": lora,
    **{
        f"{name}+lora": partial(tuned, name) for name in ("random", "random-vision", "bi", "bi-vision", "shortv", "vtw")
    },
    "silent+lora": partial(silent, "silent", lora=True),
    **{f"{name}+lora": partial(pruned_tuned, name) for name in PRUNERS},
    "router-tuning": partial(router_tuning, "attention"),
    "router-tuning-block": partial(router_tuning, "block"),
    "layer-route": layer_route,
    "d-llm": dllm,
    "p-mod": pmod,
    "flexidepth": flexidepth,
    "ours-retain": partial(ours, "retain"),
    "ours-evict": partial(ours, "evict"),
    **{f"ours-evict+{_label(name)}": partial(both, name, True) for name in (*PRUNERS, "random")},
}
METHODS: dict[str, Method] = {**UNTRAINED, **TRAINED}
