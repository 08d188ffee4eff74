"""Late entry and early exit: the longest qualifying stretches, the least damage within a budget, and constant gates."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_profiles import made_profile
from tiny_models import LAYERS, WIDTH, build, inputs
from torch import Tensor

from skipit.router import FixedUnits, InputError, attach, running, set_gates
from skipit.theory.artefact import load_plan, save_plan
from skipit.theory.bounds import combine_damages
from skipit.theory.cost import LayerCost
from skipit.theory.modes import (
    Span,
    choose_span,
    harmless,
    redundant_and_unattended,
    span_for_budget,
    span_of,
    span_plan,
)
from skipit.theory.profile import Profile

examples = settings(max_examples=50, deadline=None)


def measured(
    damage: list[float], geometric: list[float] | None = None, var_text: list[float] | None = None, dim: int = 4
) -> Profile:
    """A profile whose text units do endless damage, with 30 vision and 10 text tokens a row."""
    layers = len(damage)

    def units(vision: list[float], text: float) -> Tensor:
        return torch.tensor([[text, value] for value in vision], dtype=torch.float64)

    return made_profile(
        LayerCost(linear=100.0, keys_values=20.0, attention=0.0, mlp=0.0, gate=1.0, kv_bytes=8),
        {"retain": units(damage, 1e6), "evict": units([4 * value for value in damage], 1e6)},
        dim,
        geometric=units(geometric or [0.1] * layers, 0.5),
        var_text=torch.tensor(var_text or [0.1] * layers, dtype=torch.float64),
        var_last=torch.full((layers,), 0.05, dtype=torch.float64),
        keys=units([15.0] * layers, 35.0),
        tokens_per_row=units([30.0] * layers, 10.0),
    )


@examples
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.sampled_from(["late-entry", "early-exit", "both"]))
def test_the_longest_stretches_are_taken(qualifying: list[bool], mode: str) -> None:
    layers = len(qualifying)
    span = span_of(measured([0.1] * layers), torch.tensor(qualifying), mode)
    skipped = ~span.run[:, 1]
    assert bool(span.run[:, 0].all())  # text runs everything
    assert all(qualifying[layer] for layer in skipped.nonzero().flatten().tolist())
    assert skipped.tolist() == [layer < span.entry or layer >= span.exit for layer in range(layers)]
    assert span.skipped == int(skipped.sum())
    if mode == "early-exit":
        assert span.entry == 0
    elif not all(qualifying):
        assert not qualifying[span.entry]
    if mode == "late-entry":
        assert span.exit == layers
    elif not all(qualifying):
        assert not qualifying[span.exit - 1]
    if all(qualifying):
        assert span.skipped == layers


def test_layers_between_the_stretches_run_even_if_they_qualify() -> None:
    span = span_of(measured([0.1] * 5), torch.tensor([True, False, True, False, True]))
    assert (span.entry, span.exit) == (1, 4)
    assert span.run[:, 1].tolist() == [False, True, True, True, False]


def test_the_papers_rule_wants_redundancy_and_little_attention() -> None:
    profile = measured([0.0] * 4, geometric=[0.01, 0.01, 0.3, 0.01], var_text=[0.1, 0.6, 0.1, 0.2])
    assert redundant_and_unattended(profile, eps=0.05, nu=0.2).tolist() == [True, False, False, True]
    profile.var_last[3] = 0.9
    assert redundant_and_unattended(profile, eps=0.05, nu=0.2).tolist() == [True, False, False, False]


def test_our_rule_wants_little_damage_under_the_chosen_policy() -> None:
    profile = measured([0.001, 0.02, 0.01])
    assert harmless(profile, 0.01).tolist() == [True, False, True]
    assert harmless(profile, 0.01, "evict").tolist() == [True, False, False]


@examples
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.floats(0.5, 1),
    st.sampled_from(["late-entry", "early-exit", "both"]),
)
def test_no_other_stretches_within_the_budget_do_less_damage(damage: list[float], budget: float, mode: str) -> None:
    layers = len(damage)
    found = span_for_budget(measured(damage), budget, mode)
    assert found.compute <= budget
    for entry, exit_ in product(range(layers + 1), repeat=2):
        allowed = (mode != "late-entry" or exit_ == layers) and (mode != "early-exit" or entry == 0)
        skipped = entry + layers - exit_
        # 30 of 40 tokens of a layer are vision, and a skip still pays 20 of 100 FLOPs.
        if entry <= exit_ and allowed and 1 - 0.75 * 0.8 * skipped / layers <= budget - 1e-9:
            other = combine_damages(torch.tensor(damage[:entry] + damage[exit_:], dtype=torch.float64)).item()
            assert found.damage <= other + 1e-12


def test_a_budget_of_everything_skips_nothing_and_a_free_stretch_is_taken() -> None:
    assert span_for_budget(measured([0.1, 0.2, 0.3]), 1.0).skipped == 0
    assert span_for_budget(measured([0.1, 0.2, 0.0]), 1.0).exit == 2  # of equal damage the cheapest


def test_a_span_becomes_constant_gates_that_run_exactly_what_it_says(tmp_path) -> None:
    profile = measured([0.1, 0.2, 0.3, 0.05], dim=WIDTH)
    span = span_for_budget(profile, 0.6)
    save_plan(span_plan(profile, span, "both"), tmp_path / "plan")
    plan = load_plan(tmp_path / "plan")
    assert (plan.init, plan.budget, plan.kv) == ("both", span.compute, "retain")
    assert (plan.about["entry"], plan.about["exit"]) == (span.entry, span.exit)
    model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7], [8, 9]])
    assert LAYERS == 4
    attach(model)
    set_gates(model, plan.weight, plan.bias)
    with torch.no_grad():
        gated = model(**batch).logits
        with running(policy=FixedUnits(span.run)):
            assert torch.equal(model(**batch).logits, gated)
        with running(mode="dense"):
            assert not torch.equal(model(**batch).logits, gated)


def test_one_of_three_rules_chooses() -> None:
    profile = measured([0.0, 0.1, 0.1, 0.001], geometric=[0.3, 0.3, 0.01, 0.01])
    assert choose_span(profile, "both", eps=0.05, nu=0.2).run[:, 1].tolist() == [True, True, False, False]
    assert choose_span(profile, "both", limit=0.01).run[:, 1].tolist() == [False, True, True, False]
    assert choose_span(profile, "both", limit=0.0).run[:, 1].tolist() == [False, True, True, True]
    assert choose_span(profile, "early-exit", budget=0.9).run[:, 1].tolist() == [True, True, True, False]


def test_no_layer_qualifies() -> None:
    span: Span = span_of(measured([0.1] * 3), torch.zeros(3, dtype=torch.bool))
    assert (span.entry, span.exit, span.skipped, span.damage, span.compute) == (0, 3, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: span_for_budget(measured([0.1] * 3), 0.2),
            InputError,
            r"`budget`: got 0.2, but a model whose vision tokens skip every layer still spends 0.400 .* \(retain\)",
        ),
        (
            lambda: span_for_budget(measured([0.1]), 1.5),
            ValueError,
            r"`budget`: got 1.5, expected a number in \(0, 1\]",
        ),
        (
            lambda: redundant_and_unattended(measured([0.1]), 2.5, 0.1),
            InputError,
            r"`eps`: got 2.5, expected a number in \[0, 2\]",
        ),
        (lambda: redundant_and_unattended(measured([0.1]), 0.1, math.nan), InputError, r"`nu`: got nan, expected"),
        (lambda: choose_span(measured([0.1]), eps=0.1), InputError, "give `eps` and `nu` .* or `limit` .* or neither"),
        (lambda: choose_span(measured([0.1]), eps=0.1, nu=0.1, limit=1.0), InputError, "give `eps` and `nu` "),
        (
            lambda: choose_span(measured([0.1, 0.02]), "early-exit", limit=0.01),
            InputError,
            r"no layer qualifies for early-exit. Measured for vision in the first layer: geo 0.1000, VAR 0.100, damage "
            r"0.10000 nats; in the last layer: .* damage 0.02000 nats. Allow more, or choose by budget.",
        ),
        (lambda: harmless(measured([0.1]), -1.0), InputError, r"`limit`: got -1.0, expected a damage in nats"),
        (
            lambda: harmless(measured([0.1], geometric=[math.nan]), 0.1),
            InputError,
            "the profile has no vision tokens: late entry and early exit are about them. Give images.",
        ),
    ],
)
def test_errors_say_what_was_got_and_expected(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
