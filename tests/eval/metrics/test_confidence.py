"""Calibration: the error of known cases, and of torchmetrics' own implementation."""

import inspect
import math

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from skipit.eval.metrics import ExpectedCalibrationError
from skipit.eval.metrics.confidence import confidence_bins, expected_calibration_error


@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_it_is_what_torchmetrics_computes(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    confidence = torch.rand(500, generator=generator)
    correct = torch.rand(500, generator=generator) < confidence**2
    expected = binary_calibration_error(confidence, correct.long(), n_bins=bins, norm="l1")
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected.item(), abs=1e-6)


def test_known_errors() -> None:
    sure = torch.ones(8)
    assert expected_calibration_error(sure, torch.ones(8, dtype=torch.bool)) == 0
    assert expected_calibration_error(sure, torch.zeros(8, dtype=torch.bool)) == 1
    half = torch.tensor([True, False] * 4)
    assert expected_calibration_error(sure / 2, half) == 0
    assert expected_calibration_error(sure * 0.75, half) == 0.25
    # Errors in different bins do not cancel, those in one bin do.
    confidence, correct = torch.tensor([0.25, 0.75]), torch.tensor([True, False])
    assert expected_calibration_error(confidence, correct, bins=2) == 0.75
    assert expected_calibration_error(confidence, correct, bins=1) == 0
    assert math.isnan(expected_calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


def test_every_confidence_has_a_bin() -> None:
    found = confidence_bins(torch.tensor([0.0, 0.25, 0.5, 0.999, 1.0]), torch.ones(5, dtype=torch.bool), bins=4)
    assert found.number.tolist() == [1, 1, 1, 2]


def test_bad_input_is_named() -> None:
    plain = inspect.unwrap(confidence_bins)  # without the shape checks that only tests have
    with pytest.raises(ValueError, match=r"`confidence` has shape \(2,\) and `correct` \(3,\), expected \[answers\]"):
        plain(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`confidence` goes from -0\.5 to 0\.5, expected probabilities"):
        confidence_bins(torch.tensor([-0.5, 0.5]), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`bins` is 0, expected at least 1"):
        ExpectedCalibrationError(bins=0)
