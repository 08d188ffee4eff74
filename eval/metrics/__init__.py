"""Scores and shares: a pure function of each, and the `torchmetrics.Metric` over it; docs/metrics.md has a number each.

Every state of a metric is a sum, so that batches and ranks add up.
"""

from .alignment import SkipAlignment, skip_alignment
from .answers import (
    AnswerAgreement,
    ExactMatch,
    ExactMatchByGroup,
    agreement,
    exact_match,
    exact_match_by_group,
)
from .compute import ComputeShare, SkipRate, compute_share, skip_rate
from .confidence import ExpectedCalibrationError, expected_calibration_error
from .relaxed import RelaxedAccuracy, relaxed_accuracy
from .vqa import ANLS, VQAAccuracy, anls, vqa_accuracy

__all__ = [
    "ANLS",
    "AnswerAgreement",
    "ComputeShare",
    "ExactMatch",
    "ExactMatchByGroup",
    "ExpectedCalibrationError",
    "RelaxedAccuracy",
    "SkipAlignment",
    "SkipRate",
    "VQAAccuracy",
    "agreement",
    "anls",
    "compute_share",
    "exact_match",
    "exact_match_by_group",
    "expected_calibration_error",
    "relaxed_accuracy",
    "skip_alignment",
    "skip_rate",
    "vqa_accuracy",
]
