"""Intervals over rows and of accuracies: checked against other formulas and by coverage; pairing; nothing to say."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from skipit.eval.statistics import (
    FEWEST,
    LEVEL,
    Interval,
    Resampling,
    beyond_chance,
    paired_difference,
    proportion,
    row_interval,
    side,
)
from skipit.router import InputError

RNG = np.random.default_rng(0)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = RNG.normal(2.0, 1.0, 400)
    found = row_interval(values)
    error = 1.96 * values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + error, abs=0.02)
    narrow = row_interval(values, resampling=Resampling(confidence=0.5))
    assert found.low < narrow.low < narrow.high < found.high
    assert row_interval(values) == found


def test_columns_are_drawn_together() -> None:
    hard = RNG.normal(0.0, 10.0, 200)
    pair = np.stack([hard + 1.0, hard], -1)
    found = row_interval(pair, lambda means: means[..., 0] - means[..., 1])
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_resamples_without_a_value_do_not_count() -> None:
    columns = [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]  # two in three rows have no tokens: some draws have none at all
    assert row_interval(columns, lambda means: means[..., 0] / means[..., 1]) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("values", "value"), [([], math.nan), ([0.5], 0.5)])
def test_too_few_rows_have_no_interval(values: list[float], value: float) -> None:
    found = row_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((value, math.nan, math.nan), nan_ok=True)
    assert found.to_json()["low"] is None


def test_several_columns_need_a_statistic() -> None:
    with pytest.raises(InputError, match=r"`values`: got shape \(2, 2\) and no statistic, expected \[rows\]"):
        row_interval(np.ones((2, 2)))


def test_counts() -> None:
    first = [True] * 90 + [False] * 10
    second = [True] * 80 + [False] * 10 + [True] * 3 + [False] * 7
    found = paired_difference(first, second)
    assert (found.lost, found.gained, found.rows) == (10, 3, 100)
    assert found.value == pytest.approx(-0.07)
    assert found.p == pytest.approx(binomtest(3, 13).pvalue)
    assert found.low < found.value < found.high < 0.02
    assert paired_difference(second, first).value == pytest.approx(0.07)


def test_no_change_is_not_certainty() -> None:
    few, many = (paired_difference([True] * rows, [True] * rows) for rows in (10, 1000))
    assert (few.value, few.p) == (0.0, 1.0)
    assert few.low < -0.05
    assert -0.05 < many.low < 0 < many.high < 0.05


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        first = rng.random(60) < 0.9
        second = np.where(rng.random(60) < 0.1, ~first, first)
        truth = 0.1 * (0.1 - 0.9)
        found = paired_difference(list(first), list(second))
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 400 <= 0.99


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="`first` has 1 rows and `second` 2, expected as many, and at least one"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="`first` has 0 rows and `second` 0"):
        paired_difference([], [])


def test_proportion() -> None:
    assert proportion(0.5, 100).low == pytest.approx(0.404, abs=1e-3)
    assert proportion(0.0, 16).high == pytest.approx(0.194, abs=1e-3)
    with pytest.raises(ValueError, match=r"`share` is 1\.5 of 3 rows, expected one in"):
        proportion(1.5, 3)


@pytest.mark.parametrize("tests", [1, 3, 20])
def test_chance_alone_is_seldom_evidence_however_much_is_looked_at(tests: int) -> None:
    drawn = RNG.uniform(size=(2000, tests))
    named = np.mean([bool(beyond_chance(dict(zip("abcdefghijklmnopqrst", p, strict=False)))) for p in drawn])
    assert named == pytest.approx(LEVEL, abs=0.015)
    assert beyond_chance({"a": 0.0001, **dict.fromkeys("bcdefg", 0.9)}) == ["a"], "and evidence is"


def test_rows_that_agree_by_chance_have_no_side() -> None:
    few = row_interval([1.0] * (FEWEST - 1))
    assert few.low == few.high == 1
    assert side(few, FEWEST - 1) == 0
    assert side(few, FEWEST) == 1
    assert side(Interval(0.1, math.nan, math.nan), 40) == 0
