"""Intervals over rows: what is known of a mean, pairing, and where there is nothing to say."""

import math

import numpy as np
import pytest

from skipit.eval.intervals import Interval, row_interval
from skipit.eval.tracking import Resampling
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
