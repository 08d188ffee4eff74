"""A budget of one call of `generate` is `with running(budget=...)` around it, and is nobody else's."""

import copy
import threading
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, ROWS, WIDTH, build, inputs
from torch import Tensor
from transformers import GenerationConfig

import skipit
from skipit.router import RouterConfig, RouterConfigError, Trace, attach, detach, find_router, running, set_gates

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def gated(family: str = "llava") -> Any:
    model = build(family)
    attach(model, RouterConfig(operating_points={"0.5": 0.5, "none": 100.0}))
    generator = torch.Generator().manual_seed(3)
    set_gates(model, torch.randn(LAYERS, 2, WIDTH, generator=generator), torch.zeros(LAYERS, 2))
    return model


def ran(model: Any, family: str = "llava", **options: Any) -> tuple[Tensor, list[int]]:
    """Tokens, and how many tokens ran in all layers of each step."""
    trace = Trace()
    with running(trace=trace):
        tokens = model.generate(**inputs(family, ROWS), **{**NEW, **options})
    return tokens, [int(step.run.sum()) for step in trace.steps]


def same(found: tuple[Tensor, list[int]], wanted: tuple[Tensor, list[int]]) -> bool:
    return torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_a_call_is_running_around_it(family: str) -> None:
    model = gated(family)
    default = ran(model, family)
    for budget in (0.5, "0.5", "none"):
        with running(budget=budget):
            wanted = ran(model, family)
        assert wanted[1] != default[1]
        assert same(ran(model, family, budget=budget), wanted)
        settings = GenerationConfig(**NEW, budget=budget)  # as `transformers serve` makes it from a request
        assert same(ran(model, family, generation_config=settings), wanted)
    assert same(ran(model, family), default)


def test_what_is_said_closest_to_the_call_counts() -> None:
    model = gated()
    half, none = ran(model, budget=0.5), ran(model, budget="none")
    settings = GenerationConfig(**NEW, budget=0.5)
    with running(budget="none"):
        assert same(ran(model), none)
        assert same(ran(model, generation_config=settings), half)
        assert same(ran(model, generation_config=settings, budget="none"), none)
        assert torch.equal(skipit.generate(model, **inputs("llava", ROWS), **NEW), none[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_per_input_is_running_around_it(family: str) -> None:
    model = gated(family)
    half = ran(model, family, budget=0.5)
    with running(budget=0.8, budget_per="input"):
        wanted = ran(model, family)
        assert same(ran(model, family, budget=0.5, budget_per="data"), half)
    assert wanted[1] != ran(model, family)[1]
    assert same(ran(model, family, budget=0.8, budget_per="input"), wanted)
    settings = GenerationConfig(**NEW, budget=0.8, budget_per="input")
    assert same(ran(model, family, generation_config=settings), wanted)
    tokens, trace = skipit.generate(
        model, **inputs(family, ROWS), **NEW, budget=0.8, budget_per="input", return_trace=True
    )
    assert torch.equal(tokens, wanted[0])
    assert int(trace.run.sum()) == sum(wanted[1])


class TakingTurns:
    """A streamer that lets another generation make a step after each of this one's."""

    def __init__(self, turn: threading.Barrier) -> None:
        self.turn = turn

    def put(self, value: Tensor) -> None:
        self.turn.wait(timeout=60)

    def end(self) -> None:
        pass


def test_interleaved_requests_do_not_disturb_each_other() -> None:
    model = gated()
    one = {name: value[:1] for name, value in inputs("llava", ROWS[:1]).items()}
    budgets: list[float | str | None] = [0.5, "none", None]
    wanted = [model.generate(**one, **NEW, budget=budget) for budget in budgets]
    assert not torch.equal(wanted[0], wanted[1])
    turn, found = threading.Barrier(len(budgets)), {}

    def request(number: int) -> None:
        streamer = TakingTurns(turn)
        found[number] = model.generate(**one, **NEW, budget=budgets[number], streamer=streamer)

    threads = [threading.Thread(target=request, args=(number,)) for number in range(len(budgets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(torch.equal(found[number], wanted[number]) for number in range(len(budgets)))


@pytest.mark.parametrize("budget", [0.7, "fast", [0.5], {"a": 1}])
def test_an_unknown_budget_is_refused(budget: Any) -> None:
    with pytest.raises(RouterConfigError, match=r"`budget`: got .* calibrated for: 0.5, none"):
        ran(gated(), budget=budget)


def test_nothing_of_it_is_left() -> None:
    model = gated()
    twin = copy.deepcopy(model)
    assert same(ran(twin, budget=0.5), ran(model, budget=0.5))
    detach(model)
    assert type(model) is type(build("llava"))
    with pytest.raises(ValueError, match="budget"):
        model.generate(**inputs("llava", ROWS), **NEW, budget=0.5)
    base = build("llava").model  # does not generate
    attach(base, RouterConfig())
    detach(base)
    assert type(base) is type(build("llava").model)


def test_a_budget_at_load_is_the_default_one(tmp_path: Any) -> None:
    from families import processor

    model = gated()
    skipit.save_gated(model, processor("llava"), tmp_path / "out")
    at_half, found = skipit.load(tmp_path / "out", budget=0.5)
    assert same(ran(at_half), ran(model, budget=0.5))
    assert same(ran(at_half, budget="none"), ran(model, budget="none"))
    skipit.save_gated(at_half, found, tmp_path / "again")
    assert find_router(skipit.load(tmp_path / "again")[0])[1].config.threshold == 0.5
    with pytest.raises(RouterConfigError, match=r"`budget`: got .0.7., this router is calibrated for: 0.5, none"):
        skipit.load(tmp_path / "out", budget=0.7)
