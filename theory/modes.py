"""Late entry and early exit: vision tokens skip a first or a last stretch of the layers, the same for every input.

The two modes of Hartman et al., "Skip-It?" (arXiv 2509.25584). Their rule takes layers whose vision states are
redundant and which text hardly attends to; ours takes layers whose predicted damage is small, or the pair of stretches
that does the least damage within a compute budget.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from skipit.router.config import KVPolicy
from skipit.router.errors import InputError, short
from skipit.router.modality import VISION

from .bounds import combine_damages
from .plan import LOGIT_LIMIT, Plan, SpanMode, check_budget
from .profile import Profile


@dataclass(frozen=True)
class Span:
    """The layers that vision tokens run: from `entry` up to, but without, `exit`.

    Attributes:
        entry: layers skipped at the start.
        exit: first layer that is skipped at the end; the number of layers if there is none.
        run: bool [layers, modalities], what `FixedUnits` takes; text runs everything.
        damage: predicted KL per answer token, in nats: at most this, to second order (statement 10).
        compute: expected share of the dense decoder's FLOPs, gates not counted. Under `evict` it is an upper bound,
            because the keys that text then does not see are not subtracted.
    """

    entry: int
    exit: int
    run: Bool[Tensor, "layers modality"]
    damage: float
    compute: float

    @property
    def skipped(self) -> int:
        """Layers that vision tokens skip."""
        return int((~self.run).sum())


def redundant_and_unattended(profile: Profile, eps: float, nu: float) -> Bool[Tensor, " layers"]:
    """The paper's rule: layers with geo <= eps for vision and VAR <= nu; the thresholds are the user's.

    VAR has to be low both for the last prompt token and for all text queries.

    Args:
        profile: of the model.
        eps: largest mean cosine distance of a vision token's states before and after the layer, in [0, 2].
        nu: largest share of text's attention that goes to vision, in [0, 1].

    Raises:
        InputError: a threshold is out of range, or the profile has no vision tokens.
    """
    for name, value, high in (("eps", eps, 2), ("nu", nu, 1)):
        if not 0 <= value <= high:
            raise InputError(f"`{name}`: got {short(value)}, expected a number in [0, {high}].")
    _check_vision(profile)
    return (profile.geometric[:, VISION] <= eps) & (profile.attention <= nu)


def harmless(profile: Profile, limit: float, kv: KVPolicy = "retain") -> Bool[Tensor, " layers"]:
    """Our rule: layers which all vision tokens may skip at a damage of at most `limit`.

    Args:
        profile: of the model.
        limit: KL per answer token, in nats, for one layer alone.
        kv: K/V policy of skipped tokens.

    Raises:
        InputError: `limit` is negative, or the profile has no vision tokens.
    """
    if not limit >= 0:
        raise InputError(f"`limit`: got {short(limit)}, expected a damage in nats, at least 0.")
    _check_vision(profile)
    return profile.damage[kv].unit[:, VISION] <= limit


def span_of(
    profile: Profile, qualifying: Bool[Tensor, " layers"], mode: SpanMode = "both", kv: KVPolicy = "retain"
) -> Span:
    """The longest stretches of qualifying layers at the start, at the end, or both.

    Args:
        profile: of the model.
        qualifying: layers that vision tokens may skip.
        mode: which ends to skip. Layers between the two stretches run, whether they qualify or not.
        kv: K/V policy of skipped tokens.
    """
    layers = len(qualifying)
    first = int(qualifying.long().cumprod(0).sum()) if mode != "early-exit" else 0
    last = int(qualifying.flip(0).long().cumprod(0).sum()) if mode != "late-entry" else 0
    return _span(profile, first, max(layers - last, first), kv)


def span_for_budget(profile: Profile, budget: float, mode: SpanMode = "both", kv: KVPolicy = "retain") -> Span:
    """The stretches that meet a budget with the least predicted damage; of equals, the cheapest.

    Args:
        profile: of the model.
        budget: share of the dense decoder's FLOPs to spend, in (0, 1].
        mode: which ends may be skipped.
        kv: K/V policy of skipped tokens.

    Raises:
        InputError: skipping all vision tokens everywhere spends more than the budget, or there are no vision tokens.
        ValueError: `budget` is not in (0, 1].
    """
    check_budget(budget)
    _check_vision(profile)
    layers = len(profile.costs.layers)
    entries = range(layers + 1) if mode != "early-exit" else range(1)
    spans = [
        _span(profile, entry, end, kv)
        for entry in entries
        for end in (range(entry, layers + 1) if mode != "late-entry" else [layers])
    ]
    within = [span for span in spans if span.compute <= budget]
    if not within:
        raise InputError(
            f"`budget`: got {budget:g}, but a model whose vision tokens skip every layer still spends "
            f"{min(span.compute for span in spans):.3f} of the dense decoder's FLOPs ({kv}). Choose a larger budget, "
            "or gates, which may skip text too."
        )
    return min(within, key=lambda span: (span.damage, span.compute))


def choose_span(
    profile: Profile,
    mode: SpanMode = "both",
    kv: KVPolicy = "retain",
    *,
    budget: float = 0.5,
    limit: float | None = None,
    eps: float | None = None,
    nu: float | None = None,
) -> Span:
    """The span of one of three rules: the paper's with `eps` and `nu`, ours with `limit`, or else the budget's.

    Args:
        profile: of the model.
        mode: which ends may be skipped.
        kv: K/V policy of skipped tokens.
        budget: of `span_for_budget`.
        limit: of `harmless`.
        eps: of `redundant_and_unattended`.
        nu: of `redundant_and_unattended`.

    Raises:
        InputError: the thresholds are of no rule, of both or out of range, no layer qualifies, or the budget cannot be
            met.
        ValueError: `budget` is not in (0, 1].
    """
    if (eps is None) != (nu is None) or (eps is not None and limit is not None):
        raise InputError("give `eps` and `nu` (redundant and hardly attended to), or `limit` (of damage), or neither.")
    if eps is None and limit is None:
        return span_for_budget(profile, budget, mode, kv)
    if eps is not None and nu is not None:
        span = span_of(profile, redundant_and_unattended(profile, eps, nu), mode, kv)
    else:
        span = span_of(profile, harmless(profile, float(limit or 0.0), kv), mode, kv)
    if span.skipped == 0:
        raise InputError(f"no layer qualifies for {mode}. {_ends(profile, kv)} Allow more, or choose by budget.")
    return span


def span_plan(profile: Profile, span: Span, mode: SpanMode, kv: KVPolicy = "retain") -> Plan:
    """Constant gates that do what a span says, so that every later step runs it as it runs any other plan.

    Args:
        profile: the span was made from.
        span: which layers vision tokens run.
        mode: recorded as the plan's `init`.
        kv: K/V policy the span was made for.
    """
    bias = torch.where(span.run, LOGIT_LIMIT, -LOGIT_LIMIT)
    weight = torch.zeros_like(profile.damage[kv].ridge.weight)
    about = {**profile.about, "entry": span.entry, "exit": span.exit, "damage": span.damage}
    return Plan(weight, bias, span.compute, kv, mode, profile.model, span.run.float(), about, profile.decide_at)


def _span(profile: Profile, entry: int, end: int, kv: KVPolicy) -> Span:
    run = torch.ones_like(profile.keys, dtype=torch.bool)
    run[:entry, VISION] = run[end:, VISION] = False
    saved = float(profile.unit_cost(kv)[~run].sum())
    damage = combine_damages(profile.damage[kv].unit[~run]).item()
    return Span(entry, end, run, damage, 1 - saved / profile.total)


def _check_vision(profile: Profile) -> None:
    if not bool(profile.geometric[:, VISION].isfinite().all()):
        raise InputError("the profile has no vision tokens: late entry and early exit are about them. Give images.")


def _ends(profile: Profile, kv: KVPolicy) -> str:
    figures = [
        f"the {name} layer: geo {profile.geometric[layer, VISION].item():.4f}, "
        f"VAR {profile.attention[layer].item():.3f}, "
        f"damage {profile.damage[kv].unit[layer, VISION].item():.5f} nats"
        for name, layer in (("first", 0), ("last", -1))
    ]
    return f"Measured for vision in {'; in '.join(figures)}."
