"""Thresholds that hit a compute budget as measured in gathered execution, on data the training did not see."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import Decision, Gated, InputError, Step, Trace, find_router, running
from skipit.router.call import Call, Mode
from skipit.router.config import EVERYTHING, KVPolicy
from skipit.router.gates import TokenGate

from .cost import CostModel, Costs, share_of, total_of
from .inputs import keeps_logits, to_model
from .labels import before_answer
from .plan import check_budget
from .time_model import TimeModel

LIMIT = 30.0  # of thresholds: no gate's logit lies beyond


@torch.no_grad()
def _asked(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], **options: Any
) -> Iterator[tuple[Step, Bool[Tensor, "batch seq"] | None]]:
    """Run rows as prompts: what ran, and where answers are part of the rows, which tokens are the prompt's.

    Answers do not decide for their prompt.
    """
    unread = {"logits_to_keep": 1} if keeps_logits(model) else {}
    for batch in batches:
        inputs, trace = to_model(batch, model), Trace()
        labels = inputs.pop("labels", None)
        prompt = None if labels is None else before_answer(labels)
        with running(**options, prompt=prompt, trace=trace):
            model(**inputs, use_cache=False, **unread)
        for step in trace.steps:
            yield step, prompt


def measured_share(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    costs: Costs,
    kv: KVPolicy,
    threshold: float,
    mode: Mode = "gathered",
) -> float:
    """Share of what the dense decoder spends, FLOPs or time, that execution spends at a threshold, over all batches."""
    asked = _asked(model, batches, policy=Gated(threshold), mode=mode, kv=kv)
    return share_of((step for step, _ in asked), costs)


@dataclass(frozen=True)
class Listening(Gated):
    """Keeps what the gates say, of every call and stretch of layers in turn."""

    said: list[Tensor] = field(default_factory=list)

    def logits(self, layers: range, hidden: Tensor, call: Call, gates: Sequence[TokenGate]) -> Tensor:
        """What is compared with the threshold."""
        said = super().logits(layers, hidden, call, gates)
        self.said.append(said.detach())
        return said


def _once(model: nn.Module) -> bool:
    """Whether gates decide before any layer runs."""
    return find_router(model)[1].config.decide_at == (0,)


def shares_of(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], costs: Costs, kv: KVPolicy, *, mode: Mode = "gathered"
) -> Callable[[float], float]:
    """From a threshold to the share of what the dense decoder spends that execution spends at it, over all batches.

    Where gates decide once, before any layer runs, one pass finds it for every threshold; no layer runs in it, if the
    mode lets layers be left out. Elsewhere every threshold is tried.
    """
    if not _once(model):
        return partial(measured_share, model, batches, costs, kv, mode=mode)
    policy = Listening(LIMIT)
    steps = [step for step, _ in _asked(model, batches, policy=policy, mode=mode, kv=kv)]
    return spending(steps, policy.said, costs)


def spending(
    steps: Sequence[Step], said: Sequence[Float[Tensor, "layers batch seq"]], costs: Costs
) -> Callable[[float], float]:
    """From a threshold to the share of what the dense decoder spends; see `totals`."""
    spent = totals(steps, said, costs)

    def share(threshold: float) -> float:
        executed, dense = spent(threshold)
        return executed / dense

    return share


def totals(
    steps: Sequence[Step], said: Sequence[Float[Tensor, "layers batch seq"]], costs: Costs
) -> Callable[[float], tuple[float, float]]:
    """From a threshold to what is executed at it and what the dense decoder spends, over calls that begin a generation.

    Args:
        steps: of the calls, whatever ran in them.
        said: the gates' logits in each.
        costs: of the model's layers.
    """

    def planned(step: Step, run: Bool[Tensor, "layers batch seq"]) -> Step:
        return replace(step, decisions={layer: Decision(run[layer]) for layer in step.decisions})

    def spent(threshold: float) -> tuple[float, float]:
        run = ((logits > threshold).to(step.real.device) for step, logits in zip(steps, said, strict=True))
        return total_of(map(planned, steps, run), costs)

    return spent


@torch.no_grad()
def measure_capacity(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], *, quantile: float = 0.99
) -> tuple[float, ...]:
    """The share of a prompt's tokens that run each layer, which hardly any prompt exceeds: a `capacity` to compile for.

    Args:
        model: with gates, at the operating point that will be served.
        batches: prompts such as the model will be asked.
        quantile: of the prompts that must have room.

    Raises:
        InputError: no batch.
    """
    shares = []
    for step, prompt in _asked(model, batches):
        asking = step.real if prompt is None else step.real & prompt
        shares.append((step.run & asking).sum(-1) / asking.sum(-1))
    if not shares:
        raise InputError("`batches`: got none, expected prompts to measure how many of their tokens run each layer.")
    by_layer = torch.cat(shares, dim=1).double().quantile(quantile, dim=1, interpolation="higher")
    return tuple(by_layer.clamp(min=1e-6).tolist())  # room for one token, where none has run


def calibrate(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    costs: Costs,
    budget: float,
    kv: KVPolicy,
    *,
    tolerance: float = 0.002,
    steps: int = 18,
    mode: Mode = "gathered",
) -> tuple[float, float]:
    """The threshold at which a gated model spends a budget.

    Bisection between thresholds at which (nearly) everything and nothing runs. Where gates decide once, before any
    layer, one pass tells what every threshold spends. Elsewhere each is tried, and the share need not fall evenly with
    the threshold, because skipping changes the states that later gates see; the best threshold met is returned.

    Args:
        model: with gates, in eval mode.
        batches: held-out model inputs.
        costs: of the model's layers, in FLOPs or in time.
        budget: share of what the dense decoder spends, in (0, 1].
        kv: K/V policy.
        tolerance: share that is close enough.
        steps: thresholds to try, at most.
        mode: of execution; `masked` is for models whose weights are sharded (ZeRO-3), every process of which must
            run every module. Both decide alike, to rounding.

    Returns:
        The threshold and the share measured at it.
    """
    if check_budget(budget) == 1:
        return EVERYTHING, 1.0  # nothing is decided then, so gates cost nothing
    share_at = shares_of(model, batches, costs, kv, mode=mode)
    threshold, share = threshold_for(share_at, budget, tolerance=tolerance, steps=steps)
    return threshold, measured_share(model, batches, costs, kv, threshold, mode) if _once(model) else share


def threshold_for(
    share_at: Callable[[float], float], budget: float, *, start: float = 0.0, tolerance: float, steps: int
) -> tuple[float, float]:
    """The threshold at which a budget is spent, by bisection, and what is spent there.

    Args:
        share_at: what a threshold spends.
        budget: to be spent.
        start: the first threshold that is tried, no further than `LIMIT`; the next ones are twice as far each time,
            until two are on both sides.
        tolerance: share that is close enough.
        steps: thresholds to try, at most; the best one met is returned.
    """
    low, high, reach, threshold = -LIMIT, LIMIT, 1.0, max(-LIMIT, min(LIMIT, start))
    best: tuple[float, float] | None = None
    for _ in range(steps):
        share = share_at(threshold)
        # Of two thresholds as close, the one that was met first.
        if best is None or abs(share - budget) < abs(best[1] - budget):
            best = (threshold, share)
        if abs(share - budget) <= tolerance:
            break
        low, high = (threshold, high) if share > budget else (low, threshold)
        if low > -LIMIT and high < LIMIT:
            threshold = (low + high) / 2
        else:
            threshold = max(-LIMIT, min(LIMIT, threshold + (reach if share > budget else -reach)))
            reach *= 2
    assert best is not None
    return best


@dataclass(frozen=True)
class Took:
    """What a budget in time came to.

    Attributes:
        asked: share of the dense layers' time for a prompt.
        share: what was found on held-out rows, by the table of `skipit bench`.
        device: on which it was measured.
    """

    asked: float
    share: float
    device: str

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def sentence(self) -> str:
        """In words."""
        return f"{self.share:.1%} of the dense layers' time for a prompt by `skipit bench` on {self.device}"


@dataclass(frozen=True)
class Met:
    """A threshold that spends a budget on held-out rows.

    Attributes:
        threshold: of the gates.
        flops: share of the dense decoder's FLOPs that is spent at it.
        took: its time, where that was asked for.
    """

    threshold: float
    flops: float
    took: Took | None = None


def meet(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    costs: CostModel,
    budget: float,
    kv: KVPolicy,
    *,
    times: TimeModel | None = None,
    mode: Mode = "gathered",
) -> Met:
    """Calibrate to a share of the dense decoder's FLOPs, or of its layers' time where `times` are given."""
    if times is None:
        return Met(*calibrate(model, batches, costs, budget, kv, mode=mode))
    threshold, share = calibrate(model, batches, times, budget, kv, mode=mode)
    flops = measured_share(model, batches, costs, kv, threshold, mode)
    return Met(threshold, flops, Took(budget, share, times.times.device))
