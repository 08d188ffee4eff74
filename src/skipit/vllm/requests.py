"""Which routers can be served, and what a request may ask for: plain functions that know nothing of vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipit.router import RouterConfig
from skipit.router.config import EVERYTHING, BudgetPer, check_choice, check_per_input, point_name
from skipit.router.errors import RouterConfigError, short

BUDGET, BUDGET_PER = (
    "skipit_budget",
    "skipit_budget_per",
)  # in `vllm_xargs` of a request, or `SamplingParams.extra_args`
DEFAULT, INPUT = "default", "input"  # names of spendings beside those of calibrated budgets
_DENSE = "or serve it without gates: SKIPIT_VLLM=0"


@dataclass(frozen=True)
class Spending:
    """What a request may spend.

    Attributes:
        name: under which it is counted.
        threshold: above which a token runs a layer; None where it is found from the prompt's own logits.
        share: of its FLOPs, that the prompt then spends.
    """

    name: str
    threshold: float | None
    share: float | None = None


def check_servable(config: RouterConfig) -> None:
    """Refuse a router that vLLM's pages and batches cannot follow.

    Raises:
        RouterConfigError: says why, and what to do.
    """
    reasons = {
        "kv": (config.kv == "retain", "'retain': its pages hold keys and values of every token for every layer"),
        "unit": (config.unit != "attention", "'block' or 'mlp': attention is computed for every token"),
        "decide_at": (config.decide_at == (0,), "(0,): who runs what is decided before the layers, from embeddings"),
        "granularity": (config.granularity == "token", "'token': a prompt comes in pieces, mixed with others"),
    }
    for name, (fits, wanted) in reasons.items():
        if not fits:
            raise RouterConfigError(
                f"`{name}`: got {short(getattr(config, name))}, under vLLM gates run with {wanted}. "
                f"Train gates so (`skipit train --help`), run these with `skipit.load`, {_DENSE}."
            )


def spending(config: RouterConfig, asked: Mapping[str, Any] | None) -> Spending:
    """What a request spends that asks for this.

    Args:
        config: of the router.
        asked: the request's extra arguments; those of others are passed over.

    Raises:
        RouterConfigError: an unknown budget, or an unknown argument of ours; the message names the known ones.
    """
    ours = {name: value for name, value in (asked or {}).items() if name.startswith("skipit")}
    if unknown := sorted(set(ours) - {BUDGET, BUDGET_PER}):
        raise RouterConfigError(f"`{unknown[0]}`: not an argument; there are `{BUDGET}` and `{BUDGET_PER}`.")
    budget, per = ours.get(BUDGET), ours.get(BUDGET_PER, config.budget_per)
    check_choice(BUDGET_PER, per, BudgetPer)
    if per == "data":
        return Spending(DEFAULT if budget is None else point_name(budget), config.threshold_at(budget))
    check_per_input(config.decide_at, config.granularity)
    share = config.share_at(_number(budget))
    return Spending(INPUT, EVERYTHING if share == 1 else None, share)


def names(config: RouterConfig) -> list[str]:
    """All names under which requests are counted."""
    return list(dict.fromkeys([DEFAULT, INPUT, point_name(1), *config.operating_points]))


def _number(budget: Any) -> Any:
    # Some clients can send texts only.
    try:
        return float(budget) if isinstance(budget, str) else budget
    except ValueError:
        return budget
