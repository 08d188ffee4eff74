"""From a profile to gates: which units run at a budget, and closed-form gates that decide token by token.

Units are (layer, modality). Every unit has a damage D (what skipping its tokens does to the answer) and a cost c
(the FLOPs it saves). The maximum-entropy relaxation of the knapsack, min sum D s - T sum H(s) under a budget,
gives logit P(run) = (D - lambda c) / T; T -> 0 is the greedy rule by damage per FLOP. Per token, damages spread
over decades, so the gate predicts log D from the state and runs where it exceeds log(lambda c).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.router.config import KVPolicy, Unit
from skipit.router.errors import InputError, short
from skipit.router.gates import TokenGate

from .damage import EXPONENT
from .layer_times import LayerTimes
from .profile import Profile
from .spending import Flops, Latency

Init = Literal["theory", "theory-bias", "zero", "run"]
SpanMode = Literal["late-entry", "early-exit", "both"]  # constant gates, see modes.py
LOGIT_LIMIT = 8.0  # keeps sigmoid gradients alive
LEFT_OUT = -1000.0  # in a layer that is left out for all tokens: below every threshold, wherever it moves


@dataclass(frozen=True)
class Plan:
    """Gates for a model at a budget.

    Attributes:
        weight: gate weights [layers, modalities, dim].
        bias: gate biases [layers, modalities].
        budget: share of the decoder's FLOPs that may be spent, in (0, 1].
        kv: K/V policy the plan is for.
        init: how the gates were made.
        model: fingerprint of the model profiled.
        run_rate: expected share of tokens that run each unit [layers, modalities].
        about: provenance.
        decide_at: the decision points, at which the gates read the states, as of `RouterConfig`; None is every layer.
    """

    weight: Tensor
    bias: Tensor
    budget: float
    kv: KVPolicy
    init: Init | SpanMode
    model: str
    run_rate: Tensor
    about: dict[str, Any] = field(default_factory=dict)
    decide_at: tuple[int, ...] | None = None

    @property
    def latency(self) -> float | None:
        """The share of the dense layers' time for a prompt that it was made for, if it was not made for FLOPs."""
        return self.about.get("latency")

    @property
    def left_out(self) -> list[int]:
        """The layers that no token runs."""
        return (self.run_rate == 0).all(-1).nonzero().flatten().tolist()


def points_text(decide_at: Sequence[int] | None) -> str:
    """Decision points in words.

    Example:
        >>> points_text((0,)), points_text((0, 1, 2)), points_text(None)
        ('layer 0', 'layers 0, 1, 2', 'each layer')
    """
    if decide_at is None:
        return "each layer"
    return f"layer{'s' if len(decide_at) > 1 else ''} {', '.join(map(str, decide_at))}"


def check_budget(budget: float, name: Literal["budget", "latency"] = "budget") -> float:
    """Return a budget, or a latency.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not isinstance(budget, int | float) or not 0 < budget <= 1:
        what = "dense decoder's FLOPs" if name == "budget" else "dense layers' time"
        raise ValueError(
            f"`{name}`: got {short(budget)}, expected a number in (0, 1]: the share of the {what} to spend."
        )
    return float(budget)


def check_reachable(budgets: Iterable[float], least: float, kv: KVPolicy, unit: Unit) -> None:
    """Refuse a budget that no gates can meet.

    Raises:
        InputError: it is not above the share that is spent when everything is skipped.
    """
    if (lowest := min(budgets)) <= least:
        raise InputError(
            f"`budget`: got {lowest:g}, expected more than {least:.3f}: so much is spent when every token skips every "
            f"layer (unit {unit!r}, kv {kv!r}). A smaller share needs unit 'block' and kv 'evict'."
        )


def allocate(
    damage: Float[Tensor, "layers modality"],
    cost: Float[Tensor, "layers modality"],
    floor: float,
    total: float,
    budget: float,
) -> tuple[Float[Tensor, "layers modality"], float]:
    """Share of each unit that runs so that the compute meets the budget: greedy by damage per FLOP, one unit in part.

    Args:
        damage: D per unit; a unit without tokens (NaN) costs nothing and counts as running.
        cost: FLOPs that skipping the unit saves.
        floor: FLOPs spent even when everything is skipped.
        total: FLOPs of the dense decoder.
        budget: share of `total` to spend, in (0, 1].

    Returns:
        Shares in [0, 1], and lambda, the price of a FLOP in damage.
    """
    check_budget(budget)
    here = damage.isfinite() & (cost > 0)
    d, c = damage.double().nan_to_num(0.0), torch.where(here, cost.double(), 0.0)
    wanted = min(max(budget * total - floor, 0.0), float(c.sum()))
    run, price = _greedy(d, c, wanted)
    return torch.where(here, run, 1.0).float(), price


def _greedy(d: Tensor, c: Tensor, wanted: float) -> tuple[Tensor, float]:
    ratio = torch.where(c > 0, d / c.clamp(min=1e-300), -torch.inf).flatten()
    run, spent, price = torch.zeros_like(ratio), 0.0, float(ratio.max())
    for unit in ratio.argsort(descending=True).tolist():
        cost = float(c.flatten()[unit])
        if cost == 0 or spent >= wanted:
            break
        run[unit] = min(1.0, (wanted - spent) / cost)
        spent, price = spent + cost, float(ratio[unit])
    return run.view_as(d), price


def bisect(excess: Callable[[float], float], low: float, high: float, steps: int = 100) -> float:
    """The point where a decreasing function crosses zero, within [low, high]."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def make_plan(
    profile: Profile,
    budget: float,
    kv: KVPolicy = "retain",
    init: Init = "theory",
    sharpness: float = 1.0,
    times: LayerTimes | None = None,
    answer_tokens: int = 0,
) -> Plan:
    """Gates for a budget, in closed form from a profile.

    `theory`: z = k (w . n(x) + b - log(lambda c)), with w and b the ridge prediction of a token's log damage, on the
    scale of the damages measured for the unit's tokens. `theory-bias`: one decision for all tokens of a unit, from the
    damage of skipping the whole unit. `zero`: w = 0 and b = 0. `run`: the peers' practice, gates biased to run.

    Args:
        profile: of this model.
        budget: share of the dense decoder's FLOPs to spend.
        kv: K/V policy.
        init: which gates to make.
        sharpness: k, logits per unit of log damage.
        times: of layers on this machine. With them `budget` is a share of the dense layers' time for a prompt, and the
            plan's budget the share of FLOPs that it comes to. A unit whose skipping saves no time runs, unless its
            layer is left out for all tokens.
        answer_tokens: under `times`, the time is that of a prompt and of so many tokens decoded after it, which a
            layer that is left out for all saves whole. The plan's latency is then what the prompt comes to.

    Raises:
        ValueError: `budget` is not in (0, 1], an unknown `init`, or `answer_tokens` negative or without `times`.
        InputError: no gates can be as fast as `budget`, on this machine.
    """
    check_budget(budget)
    if init not in get_args(Init):
        raise ValueError(f"`init`: got {short(init)}, expected one of {', '.join(get_args(Init))}.")
    if answer_tokens < 0 or (answer_tokens and times is None):
        raise ValueError(f"`answer_tokens`: got {answer_tokens}, expected 0 or more, and above 0 with `times` only.")
    ridge = profile.damage[kv].ridge
    units, weight = ridge.bias.shape, torch.zeros_like(ridge.weight)
    if init in ("zero", "run"):
        bias = torch.full(units, TokenGate.OPEN if init == "run" else 0.0)
        rate = torch.full(units, 1.0 if init == "run" else 0.5)
        return Plan(weight, bias, float(budget), kv, init, profile.model, rate, dict(profile.about), profile.decide_at)
    flops, time = Flops(profile, kv), None if times is None else Latency(profile, kv, times, answer_tokens)
    if time is not None:
        time.times.check(budget, time.least(), kv)
    spending: Flops | Latency = time or flops
    saving = spending.saving().double()
    mean, std = _log_damage(profile, kv, init)
    here = mean.isfinite() & (saving > 0)
    saving = torch.where(here, saving, 1.0)
    score = mean.double() - saving.log()  # log of the damage per what a typical token saves
    spread = std.double().clamp(min=0.1)  # the smallest stands for what a prediction misses

    def rate_at(log_price: float) -> Tensor:
        # A prediction is about normal over tokens.
        rate = torch.where(here, torch.special.ndtr((score - log_price) / spread), 1.0)
        return rate if time is None else time.without_layers(rate, score, spread, log_price)

    # Where whole layers fall away at a price, what is spent jumps: just above it the budget is kept.
    log_price = bisect(lambda x: spending.share(rate_at(x)) - budget, -200.0, 100.0) + 1e-9
    rate = rate_at(log_price)
    out = (rate == 0).all(-1, keepdim=True) if time is not None else torch.zeros(len(rate), 1, dtype=torch.bool)
    if init == "theory":
        weight = sharpness * torch.where((here & ~out)[..., None], ridge.weight.nan_to_num(0.0), 0.0)
    base = mean
    if init == "theory":
        predicted = ridge.bias + mean - ridge.mean  # on the scale of the mean damage
        # Where nothing could be regressed (a unit that no answer depends on) the unit's mean stands for every token.
        base = torch.where(predicted.isfinite(), predicted, mean)
    bias = sharpness * (base.double() - saving.log() - log_price)
    bias = torch.where(here, bias, LOGIT_LIMIT)
    if init == "theory-bias":
        bias = bias.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    bias = torch.where(out, LEFT_OUT, bias)
    about = {**profile.about, "log_price": log_price, "sharpness": sharpness}
    gates = weight.float(), bias.float()
    if time is not None:
        expected = time.prompt_share(rate)
        about |= {"latency": budget, "expected_latency": expected, "measured_on": time.times.device}
        if answer_tokens:
            answer = {"tokens": answer_tokens, "latency": budget, "expected_latency": time.share(rate)}
            about |= {"latency": min(1.0, round(expected, 3)), "answer": answer}
        budget = flops.share(rate)
    return Plan(*gates, float(budget), kv, init, profile.model, rate.float(), about, profile.decide_at)


def _log_damage(profile: Profile, kv: KVPolicy, init: Init) -> tuple[Tensor, Tensor]:
    """Mean and spread, over a unit's tokens, of the predicted log damage of skipping one token.

    The ridge predicts the mean log of a noisy estimate, which is low by what the noise is, more in one unit than in
    another, and knows nothing of tokens that no answer depends on. So the prediction is shifted until the power mean
    of exp(prediction) over the unit's tokens, as a log-normal, is the one that was measured. Gates that tell tokens
    apart use the damages of tokens taken one by one; a bias alone skips whole units, and uses theirs.
    """
    damage = profile.damage[kv]
    if init == "theory":
        std, done = damage.ridge.std.nan_to_num(0.0), damage.typical
    else:
        std, done = torch.zeros_like(damage.ridge.std), damage.unit / profile.tokens_per_row
    return done.clamp(min=1e-30).log().float() - EXPONENT * std.square() / 2, std


def skip_set(profile: Profile, budget: float, kv: KVPolicy = "retain") -> Bool[Tensor, "layers modality"]:
    """The units a static plan runs at a budget: greedy by measured damage per FLOP. True runs."""
    run, _ = allocate(profile.damage[kv].unit, profile.unit_cost(kv), profile.floor(kv), profile.total, budget)
    return run > 0.5
