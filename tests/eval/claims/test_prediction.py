"""Predictions against controlled skipping."""

import math

import pytest

from skipit.eval.claims.prediction import by_scope, rank_correlation


def test_intervals_hold_the_value_and_missing_units_are_left_out() -> None:
    found = rank_correlation([1.0, 2.0, math.nan, 3.0, 4.0, 5.0], [1.0, 3.0, 9.0, 2.0, 4.0, 5.0])
    assert found.units == 5
    assert found.value == pytest.approx(0.9)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, math.nan, math.nan]])
def test_no_correlation_without_variation_or_units(values: list[float]) -> None:
    assert math.isnan(rank_correlation(values, [1.0, 2.0, 3.0, 4.0]).value)


def test_scopes_are_the_columns() -> None:
    found = by_scope([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert (found["text"].value, found["vision"].value) == (1.0, -1.0)
