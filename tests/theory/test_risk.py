"""Statement 12 of docs/theory.md: what is certified is certified with the stated confidence, and nothing else is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from skipit.router import InputError
from skipit.theory.risk import allowed_errors, certify, check_rows, learn_then_test, samples_to_certify, threshold_grid

# No deadline: the first example pays for imports, and a busy machine is no error.
examples = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("trials", [20, 149, 500])
@pytest.mark.parametrize(("eps", "delta"), [(0.02, 0.05), (0.1, 0.1), (0.3, 0.01)])
def test_12_a_risky_threshold_is_certified_with_probability_below_delta(trials: int, eps: float, delta: float) -> None:
    """Exact, not simulated: the sum over all outcomes of the calibration."""
    outcomes = np.arange(trials + 1)
    certified = [learn_then_test([k], trials, eps, delta).index == 0 for k in outcomes]
    for risk in (eps * 1.0001, eps * 1.2, min(0.99, eps * 2)):
        assert binom.pmf(outcomes, trials, risk)[certified].sum() <= delta


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("first_risk", [0.004, 0.05001])
def test_12_the_whole_sequence_is_wrong_with_probability_below_delta(nested: bool, first_risk: float) -> None:
    runs, trials, eps, delta = 1500, 200, 0.05, 0.1
    risks = np.linspace(first_risk, 0.12, 10)
    random = np.random.default_rng(0)
    wrong = certified = 0
    for _ in range(runs):
        draws = random.random((trials, 1 if nested else len(risks)))
        index = learn_then_test((draws < risks).sum(0).tolist(), trials, eps, delta).index
        certified += index is not None
        wrong += index is not None and risks[index] > eps
    assert wrong <= runs * delta + 3 * math.sqrt(runs * delta * (1 - delta))
    if first_risk < eps:
        assert certified > 0.99 * runs


def test_12_stops_at_the_first_threshold_that_is_not_rejected() -> None:
    found = learn_then_test([0, 1, 200, 0], trials=1000, eps=0.02, delta=0.05)
    assert found.index == 1
    assert found.p_values.shape == (4,)
    assert learn_then_test([30], trials=1000, eps=0.02, delta=0.05).index is None
    assert learn_then_test([], trials=1000, eps=0.02, delta=0.05).index is None


@examples
@given(st.floats(0.005, 0.5), st.floats(0.01, 0.5))
def test_12_fewest_samples_are_enough_and_one_less_is_not(eps: float, delta: float) -> None:
    needed = samples_to_certify(eps, delta)
    assert learn_then_test([0], needed, eps, delta).index == 0
    if needed > 1:
        assert learn_then_test([0], needed - 1, eps, delta).index is None


# --- From a table of disagreements


@pytest.mark.parametrize(("risk", "confidence", "rows"), [(0.02, 0.95, 400), (0.05, 0.9, 150), (0.1, 0.8, 60)])
def test_random_splits_violate_the_risk_less_often_than_promised(risk: float, confidence: float, rows: int) -> None:
    """A population of rows, each with the threshold beyond which its answer changes, and a few that flip back."""
    random = np.random.default_rng(0)
    limits = random.gamma(6.0, 1.0, size=5000)
    thresholds = np.linspace(0.5, 6, 12)
    population = (limits < thresholds[:, None]) ^ (random.random((12, 5000)) < 0.003)
    true_risk = population.mean(1)
    assert true_risk[0] < risk < true_risk[-1]
    splits, violated, useful = 200, 0, 0
    for _ in range(splits):
        drawn = random.integers(0, 5000, rows)
        index = certify(torch.from_numpy(population[:, drawn]), risk, confidence).index
        violated += index is not None and true_risk[index] > risk
        useful += index is not None and index > 0
    promised = splits * (1 - confidence)
    assert violated <= promised + 3 * math.sqrt(promised * confidence)
    assert useful > 0.5 * splits  # and not because nothing is ever certified


@examples
@given(st.integers(1, 400), st.floats(0.005, 0.5), st.floats(0.01, 0.5))
def test_allowed_errors_pass_and_one_more_does_not(trials: int, eps: float, delta: float) -> None:
    most = allowed_errors(trials, eps, delta)
    if most >= 0:
        assert learn_then_test([most], trials, eps, delta).index == 0
    if most < trials:
        assert learn_then_test([most + 1], trials, eps, delta).index is None


@examples
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=300))
def test_a_grid_rises_in_steps_of_skips(values: list[float]) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    grid = threshold_grid(logits)
    assert grid == sorted(set(grid))
    skipped = [float((logits <= threshold).double().mean()) for threshold in grid]
    assert skipped[0] >= 0.05  # a threshold that skips nothing needs no certificate
    assert skipped[-1] >= 0.8


def test_constant_gates_have_two_thresholds_and_the_first_is_their_plan() -> None:
    assert threshold_grid(torch.tensor([-8.0] * 40 + [8.0] * 60)) == [-8.0, 8.0]


def test_too_few_rows_are_refused_with_the_number_that_is_needed() -> None:
    message = r"148 rows to certify with: a risk of 0.02 .* 0.95 needs at least 149 \(`samples_to_certify`\), without a"
    with pytest.raises(InputError, match=message):
        check_rows(148, 0.02, 0.95)
    check_rows(149, 0.02, 0.95)
    with pytest.raises(InputError, match="20 rows to certify with"):
        certify(torch.zeros(3, 20, dtype=torch.bool), 0.02, 0.95)
    with pytest.raises(InputError, match="no gate decided anything"):
        threshold_grid(torch.zeros(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: learn_then_test([1], 10, 0.0, 0.1),
            r"`eps` is 0, expected a value in \(0, 1\). Pass a share strictly",
        ),
        (lambda: learn_then_test([1], 10, 0.1, 1.0), r"`delta` is 1, expected a value in \(0, 1\)"),
        (lambda: certify(torch.zeros(1, 9, dtype=torch.bool), 1.0, 0.9), r"`risk` is 1, expected a value in \(0, 1\)"),
        (lambda: check_rows(9, 0.1, 95), r"`confidence` is 95, expected a value in \(0, 1\). Pass a share"),
        (lambda: allowed_errors(9, -0.1, 0.1), r"`eps` is -0.1, expected a value in \(0, 1\)"),
        (lambda: learn_then_test([1], 0, 0.1, 0.1), r"`trials` is 0, expected 1 or more. Calibrate on at least one"),
        (lambda: learn_then_test([3, 11], 10, 0.1, 0.1), r"`errors` holds 11, expected counts from 0 to `trials` = 10"),
    ],
)
def test_errors_say_what_was_got_and_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
