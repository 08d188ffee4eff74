"""Does a model's confidence in its answers match how often they are right? Expected calibration error, from sums.

`torchmetrics.CalibrationError` keeps every confidence until the end; here the sums of each bin are the state, so that
batches and ranks add up at a fixed size, and a reliability diagram can be drawn from it.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


class ConfidenceBins(NamedTuple):
    """Sums of each of n equal bins of confidence, [0, 1/n), [1/n, 2/n), ..., [1 - 1/n, 1].

    Attributes:
        number: of answers.
        confidence: sum of their confidences.
        correct: how many are right.
    """

    number: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    correct: Int[Tensor, " bins"]

    def error(self) -> Float[Tensor, ""]:
        """Expected calibration error, float64 in [0, 1]; NaN without answers."""
        return (self.confidence - self.correct).abs().sum() / self.number.sum()


def confidence_bins(
    confidence: Float[Tensor, " answers"], correct: Bool[Tensor, " answers"], bins: int = 10
) -> ConfidenceBins:
    """Add up answers by their confidence.

    Args:
        confidence: The model's probability that each answer is right, in [0, 1].
        correct: Whether it is.
        bins: Number of bins.

    Returns:
        The sums of each bin. They add up over batches and ranks.

    Raises:
        ValueError: If the two differ in length, a confidence is no probability, or `bins` is below 1.

    Example:
        >>> found = confidence_bins(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, False]), bins=2)
        >>> found.number.tolist(), found.correct.tolist()
        ([1, 2], [0, 1])
    """
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(
            f"`confidence` has shape {tuple(confidence.shape)} and `correct` {tuple(correct.shape)}, expected "
            "[answers] for both. Pass one number and one truth value per answer."
        )
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError(
            f"`confidence` goes from {confidence.min().item():g} to {confidence.max().item():g}, expected "
            "probabilities in [0, 1]. Pass probabilities, not log-probabilities or percent."
        )
    if bins < 1:
        raise ValueError(f"`bins` is {bins}, expected at least 1. The usual number is 10.")
    values = confidence.double()
    index = (values * bins).long().clamp(max=bins - 1)
    # Without answers, bincount forgets the type of its weights.
    sums = [torch.bincount(index, weights, bins).double() for weights in (values, correct.double())]
    return ConfidenceBins(torch.bincount(index, minlength=bins), sums[0], sums[1].long())


def expected_calibration_error(
    confidence: Float[Tensor, " answers"], correct: Bool[Tensor, " answers"], bins: int = 10
) -> float:
    """Mean distance of confidence and accuracy over bins: sum of n_b / N |accuracy_b - mean confidence_b|.

    Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599). Few answers per bin make it larger by chance alone: compare
    models on the same answers, with intervals.

    Args:
        confidence: The model's probability that each answer is right, in [0, 1].
        correct: Whether it is.
        bins: Number of equal bins.

    Returns:
        A number in [0, 1]; NaN for no answers.

    Example:
        >>> confidence, correct = torch.tensor([0.95, 0.9, 0.3, 0.2]), torch.tensor([True, True, True, False])
        >>> round(expected_calibration_error(confidence, correct), 4)
        0.2625
    """
    return confidence_bins(confidence, correct, bins).error().item()


class ExpectedCalibrationError(Metric):
    """Mean distance of confidence and accuracy; see `expected_calibration_error`.

    Args:
        bins: Number of equal bins of confidence.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(torch.tensor([0.9, 0.8]), torch.tensor([True, True]))
        >>> round(metric.compute().item(), 4)
        0.15
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    number: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        empty = confidence_bins(torch.zeros(0), torch.zeros(0, dtype=torch.bool), bins)
        for name, state in empty._asdict().items():
            self.add_state(name, state, dist_reduce_fx="sum")

    def update(self, confidence: Float[Tensor, " answers"], correct: Bool[Tensor, " answers"]) -> None:
        """Add the confidence in each answer, and whether it is right."""
        added = confidence_bins(confidence, correct, len(self.number))
        self.number += added.number.to(self.number.device)
        self.confidence += added.confidence.to(self.confidence.device)
        self.correct += added.correct.to(self.correct.device)

    def compute(self) -> Float[Tensor, ""]:
        """The error, float64 in [0, 1]; NaN before the first answer."""
        return ConfidenceBins(self.number, self.confidence, self.correct).error()
