"""Statement 12 of docs/theory.md: what is certified is certified with the stated confidence, and nothing else is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from skipit.theory.risk import learn_then_test, samples_to_certify

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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: learn_then_test([1], 10, 0.0, 0.1),
            r"`eps` is 0, expected a value in \(0, 1\). Pass a share strictly",
        ),
        (lambda: learn_then_test([1], 10, 0.1, 1.0), r"`delta` is 1, expected a value in \(0, 1\)"),
        (lambda: learn_then_test([1], 0, 0.1, 0.1), r"`trials` is 0, expected 1 or more. Calibrate on at least one"),
        (lambda: learn_then_test([3, 11], 10, 0.1, 0.1), r"`errors` holds 11, expected counts from 0 to `trials` = 10"),
    ],
)
def test_errors_say_what_was_got_and_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
