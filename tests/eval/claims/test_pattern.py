"""Late entry and early exit: verdicts follow from thresholds and rates, and can go either way."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tiny_models
import torch
from made_profiles import made_profile
from torch import Tensor

from skipit.eval.claims.pattern import find_pattern, row_skip_rates
from skipit.eval.measure.recorded import Record
from skipit.eval.statistics import Resampling
from skipit.router import InputError
from skipit.router.config import KVPolicy
from skipit.theory.cost import LayerCost
from skipit.theory.modes import redundant_and_unattended, span_of
from skipit.theory.profile import Profile
from skipit.theory.profile import profile as measure

LAYERS = 12
FEW = Resampling(resamples=1000)
RNG = np.random.default_rng(0)


def made(geometric: list[float], attention: list[float]) -> Profile:
    """A profile of which only vision's redundancy and cross-attention matter."""
    layers = len(geometric)
    vision = torch.tensor(geometric, dtype=torch.float64)
    table = torch.stack([torch.ones(layers).double(), vision], -1)
    var = torch.tensor(attention, dtype=torch.float64)
    cost, damage = LayerCost(100.0, 10.0, 1.0, 60.0, 0.5, 8), torch.ones(layers, 2).double()
    damages: dict[KVPolicy, torch.Tensor] = {"retain": damage, "evict": damage}
    return made_profile(cost, damages, geometric=table, var_text=var, var_last=var / 2)


# Early and late layers are redundant; text looks at vision in layers 1 and 4 to 7.
U_SHAPED = made(
    [0.1, 0.1, 0.1, 0.5, 0.9, 0.9, 0.8, 0.9, 0.2, 0.1, 0.1, 0.1], [0, 0.5, *[0.1] * 2, *[0.5] * 4, *[0.1] * 4]
)


def rows_of(means: list[float], rows: int = 40) -> np.ndarray:
    return np.clip(np.array(means) + RNG.normal(0, 0.05, (rows, len(means))), 0, 1)


def test_the_paper_s_rule_decides_in_the_profile() -> None:
    found = find_pattern(U_SHAPED, rows_of([0.5] * LAYERS), eps=0.2, nu=0.2, resampling=FEW)
    assert (found.entry, found.exit) == (1, 4)  # layer 1 is redundant but looked at
    # Of six layers that qualify one lies first in half of all orders; four last, or these and one first, seldom.
    assert found.theory == {"late entry": "not shown", "early exit": "found", "both": "found"}
    strict = find_pattern(U_SHAPED, [0.5] * LAYERS, eps=0.1, nu=0.0, resampling=FEW)
    assert (strict.entry, strict.exit) == (1, 0)
    assert strict.theory == {"late entry": "not shown", "early exit": "not found", "both": "not found"}
    anything = find_pattern(U_SHAPED, [0.5] * LAYERS, eps=2.0, nu=1.0, resampling=FEW)
    assert (anything.entry, anything.exit) == (LAYERS, LAYERS)  # where no layer is needed there is no entry
    assert set(anything.theory.values()) == {"not found"}


def test_thresholds_are_this_model_s_medians_unless_given() -> None:
    found = find_pattern(U_SHAPED, [0.5] * LAYERS, resampling=FEW)
    assert found.eps == pytest.approx(0.15)  # between the sixth and the seventh of twelve
    assert found.nu == 0.1
    assert [layer for layer in range(LAYERS) if found.qualifying[layer]] == [0, 2, 9, 10, 11]
    assert found.theory["early exit"] == "found"


def test_a_real_profile_gives_the_stretches_of_the_fixed_modes() -> None:
    batch = tiny_models.inputs("llava", [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12]])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    profile = measure(tiny_models.build("llava"), [{**batch, "labels": labels}])
    found = find_pattern(profile, [0.0] * tiny_models.LAYERS, resampling=FEW)
    qualifying = redundant_and_unattended(profile, found.eps, found.nu)
    assert found.entry == span_of(profile, qualifying, "late-entry").entry
    assert found.exit == tiny_models.LAYERS - span_of(profile, qualifying, "early-exit").exit
    assert found.geometric == tuple(profile.geometric[:, 1].tolist())


@pytest.mark.parametrize(
    ("means", "early", "late"),
    [
        ([0.9] * 4 + [0.1] * 4 + [0.8] * 4, "found", "found"),
        ([0.1] * 4 + [0.1] * 4 + [0.9] * 4, "not shown", "found"),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0], "found", "not found"),
        ([0.1] * 4 + [0.9] * 4 + [0.1] * 4, "not found", "not found"),
        # One layer alone stands out: rows agree on it, but in a third of all orders it would lie there.
        ([0.9] + [0.5] * 11, "not shown", "not shown"),
        ([0.5] * 12, "not shown", "not shown"),
    ],
)
def test_thirds_decide_in_the_router(means: list[float], early: str, late: str) -> None:
    found = find_pattern(U_SHAPED, rows_of(means), resampling=FEW)
    assert found.outer == {"first third": early, "last third": late}
    assert found.thirds["first"].value == pytest.approx(np.mean(means[:4]), abs=0.05)
    assert found.early.difference.value == pytest.approx(np.mean(means[:4]) - np.mean(means[4:8]), abs=0.05)
    assert found.late.difference.low <= found.late.difference.value <= found.late.difference.high
    assert found.early.p_shift >= 1 / LAYERS
    assert found.rows == 40


def test_rows_that_disagree_decide_nothing() -> None:
    table = np.full((4, LAYERS), 0.5)
    table[0, :4], table[1:, :4] = 1.0, 0.45  # one row in four skips early, the others do not
    found = find_pattern(U_SHAPED, table, resampling=FEW)
    assert found.early.difference.value > 0
    assert found.early.p <= 0.05
    assert found.early.difference.low < 0
    assert found.outer["first third"] == "not shown"


@pytest.mark.parametrize(
    ("means", "first", "last", "entry", "leaving"),
    [
        ([0.9] * 3 + [0.1] * 5 + [0.8] * 4, 3, 4, "not shown", "not shown"),  # each; both are
        ([0.9] * 4 + [0.1] * 8, 4, 0, "found", "not found"),
        # Vision leaves after two layers: the last third is skipped no more than the middle, and yet this is early exit.
        ([0.0, 0.1] + [1.0] * 10, 0, 10, "not found", "found"),
        ([0.1] * 4 + [0.9] * 4 + [0.1] * 4, 0, 0, "not found", "not found"),
        ([0.9] * 12, 12, 12, "not found", "not found"),
        ([0.1] * 12, 0, 0, "not found", "not found"),
    ],
)
def test_stretches_decide_in_the_router(means: list[float], first: int, last: int, entry: str, leaving: str) -> None:
    found = find_pattern(U_SHAPED, rows_of(means), resampling=FEW)
    assert (found.learned_entry.length.value, found.learned_exit.length.value) == (first, last)
    both = "found" if 0 < min(first, last) < LAYERS else "not found"
    assert found.learned == {"late entry": entry, "early exit": leaving, "both": both}


def test_a_stretch_is_compared_with_skipped_layers_anywhere() -> None:
    means = [0.9, 0.9, 0.1, 0.9, *[0.1] * 7, 0.9]
    found = find_pattern(U_SHAPED, means, resampling=FEW)
    orders = [set(chosen) for chosen in combinations(range(LAYERS), 4)]
    assert found.learned_entry.p == pytest.approx(sum({0, 1} <= order for order in orders) / len(orders))
    assert found.learned_exit.p == pytest.approx(4 / 12)
    assert find_pattern(U_SHAPED, [0.0] * LAYERS, resampling=FEW).learned_entry.p == 1


def test_a_stretch_on_which_rows_disagree_is_not_found() -> None:
    table = np.full((5, LAYERS), 0.2)
    table[:3, 0] = 0.75  # the mean is 0.53, but without one of these rows it is not a half
    found = find_pattern(U_SHAPED, table, resampling=FEW)
    assert found.learned_entry.length.value == 1
    assert found.learned_entry.length.low == 0
    assert found.learned["late entry"] == "not found"


def test_rates_by_layer_have_no_interval_over_rows() -> None:
    means = [0.9] * 4 + [0.1] * 5 + [0.4, 0.9, 0.8]
    found = find_pattern(U_SHAPED, means, resampling=FEW)
    assert found.rows == 0
    assert math.isnan(found.early.difference.low)
    assert found.learned["late entry"] == "found"
    assert (found.learned_entry.length.value, found.learned_exit.length.value) == (4, 2)
    assert find_pattern(U_SHAPED, means, most=0.4, resampling=FEW).learned_exit.length.value == 3
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["early"]["difference"]["low"] is None
    assert written["learned"]["late entry"] == "found"
    assert written["qualifying"] == list(found.qualifying)


def test_rates_come_from_records_row_by_row() -> None:
    run = torch.tensor([[[1, 0, 1, 0], [1, 1, 1, 1]], [[0, 0, 1, 1], [1, 1, 1, 0]]], dtype=torch.bool)
    stratum = torch.tensor([[1, 1, 0, 2], [0, 0, 0, 0]])
    real = torch.tensor([[True] * 4, [False, True, True, True]])
    record = Record(run, stratum, real)
    rates = row_skip_rates([record, replace(record, run=~run)])
    assert rates[0].tolist() == [0.5, 1.0]
    assert rates[2].tolist() == [0.5, 0.0]
    assert rates[[1, 3]].isnan().all()  # rows without an image
    with_gaps: Tensor = torch.full((4, LAYERS), torch.nan).double()
    with_gaps[0] = 0.5
    assert find_pattern(U_SHAPED, with_gaps, resampling=FEW).rows == 1


def test_bad_input_is_named() -> None:
    with pytest.raises(
        InputError, match=r"`rates`: got shape \(3,\) for a profile of 12 layers, expected \[rows, layers\]"
    ):
        find_pattern(U_SHAPED, [0.5] * 3)
    with pytest.raises(InputError, match="`rates`: got values from 0 to 90, expected shares"):
        find_pattern(U_SHAPED, [0.0] * 11 + [90.0])
    with pytest.raises(InputError, match="`rates`: got no row with vision tokens"):
        find_pattern(U_SHAPED, np.full((2, LAYERS), np.nan))
    with pytest.raises(InputError, match="`eps`: got 3"):
        find_pattern(U_SHAPED, [0.5] * LAYERS, eps=3)
