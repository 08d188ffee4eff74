"""Which routers vLLM can serve, and what requests may ask for."""

from typing import Any

import pytest

from skipit.router import RouterConfig, RouterConfigError
from skipit.router.config import EVERYTHING
from skipit.vllm.requests import Spending, check_servable, names, spending

POINTS = {"0.5": 0.25, "fast": 1.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv": "evict"}, r"`kv`: got 'evict', under vLLM gates run with 'retain'.*SKIPIT_VLLM=0"),
        ({"unit": "attention"}, "`unit`: got 'attention', under vLLM gates run with 'block' or 'mlp'"),
        ({"decide_at": None}, "`decide_at`: got None"),
        ({"decide_at": (0, 2)}, r"`decide_at`: got \(0, 2\)"),
        ({"granularity": "sequence"}, "`granularity`: got 'sequence'"),
    ],
)
def test_routers_that_vllm_cannot_follow_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RouterConfigError, match=message):
        check_servable(RouterConfig(**settings))


@pytest.mark.parametrize("settings", [{}, {"unit": "mlp"}, {"budget_per": "input"}])
def test_others_are_served(settings: dict[str, Any]) -> None:
    check_servable(RouterConfig(**settings))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, Spending("default", -0.5)),
        ({"top_n": 3}, Spending("default", -0.5)),
        ({"skipit_budget": 0.5}, Spending("0.5", 0.25)),
        ({"skipit_budget": "0.5"}, Spending("0.5", 0.25)),
        ({"skipit_budget": "fast"}, Spending("fast", 1.5)),
        ({"skipit_budget": "0.3", "skipit_budget_per": "input"}, Spending("input", None, 0.3)),
        ({"skipit_budget": 0.3, "skipit_budget_per": "input"}, Spending("input", None, 0.3)),
        ({"skipit_budget": 1}, Spending("1", EVERYTHING)),
        ({"skipit_budget": 1, "skipit_budget_per": "input"}, Spending("input", EVERYTHING, 1.0)),
    ],
)
def test_what_a_request_spends(asked: dict[str, Any] | None, expected: Spending) -> None:
    config = RouterConfig(threshold=-0.5, operating_points=POINTS)
    assert spending(config, asked) == expected
    assert expected.name in names(config)


def test_the_checkpoint_says_what_budgets_are_per() -> None:
    config = RouterConfig(threshold=0.25, operating_points=POINTS, budget_per="input")
    assert spending(config, {}) == Spending("input", None, 0.5)
    assert spending(config, {"skipit_budget": "fast", "skipit_budget_per": "data"}) == Spending("fast", 1.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"skipit_budget": 0.3}, "`budget`: got '0.3', this router is calibrated for: 0.5, fast"),
        ({"skipit_budget": [0.5]}, "calibrated for: 0.5, fast"),
        ({"skipit_budget": "fast", "skipit_budget_per": "input"}, r"`budget`: got 'fast'.*number in \(0, 1\]"),
        ({"skipit_budget_per": "day"}, "`skipit_budget_per`: got 'day', expected one of data, input"),
        ({"skipit_bugdet": 0.5}, "`skipit_bugdet`: not an argument; there are `skipit_budget` and `skipit_budget_per`"),
    ],
)
def test_unknown_budgets_name_the_known_ones(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RouterConfigError, match=message):
        spending(RouterConfig(operating_points=POINTS), asked)
