"""The metrics of `skipit.eval` as `torchmetrics.Metric`: every state is a sum, so batches and ranks add up."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from .alignment import alignment_of_counts
from .confidence import CalibrationBins, calibration_bins
from .scores import anls_scores, compute_share, exact_match_scores, skip_counts, vqa_scores


class _MeanScore(Metric):
    """The mean of per-answer scores over all updates and ranks; NaN before the first answer."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    score_sum: Tensor
    answers: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("score_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scores: Float[Tensor, " answers"]) -> None:
        self.score_sum += scores.sum().to(self.score_sum.device)
        self.answers += len(scores)

    def compute(self) -> Float[Tensor, ""]:
        """The mean score so far: float64, in [0, 1], NaN for no answers."""
        return self.score_sum / self.answers


class ExactMatch(_MeanScore):
    """The share of answers that equal their reference; see `skipit.eval.metrics.scores.exact_match`.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["7", "left"], ["7", "right"])
        >>> metric.compute().item()
        0.5
    """

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add answers and their references."""
        self._add(exact_match_scores(predictions, references))


class AnswerAgreement(_MeanScore):
    """The share of questions to which two models give the same answer; see `skipit.eval.metrics.scores.agreement`.

    Example:
        >>> metric = AnswerAgreement()
        >>> metric.update(["7", "left", "2", "9"], ["7", "Left", "3", "9"])
        >>> metric.compute().item()
        0.75
    """

    def update(self, first: Sequence[str], second: Sequence[str]) -> None:
        """Add the answers of both models to the same questions."""
        self._add(exact_match_scores(first, second))


class VQAAccuracy(_MeanScore):
    """The official soft accuracy against several human answers; see `skipit.eval.metrics.scores.vqa_accuracy`.

    Example:
        >>> metric = VQAAccuracy()
        >>> metric.update(["cat"], [["cat"] * 3 + ["dog"] * 7])
        >>> metric.compute().item()
        0.9
    """

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add answers and the human answers to each question."""
        self._add(vqa_scores(predictions, references))


class ANLS(_MeanScore):
    """Average normalized Levenshtein similarity; see `skipit.eval.metrics.scores.anls`.

    Args:
        threshold: The relative distance, in (0, 1], from which an answer counts as wrong.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = ANLS()
        >>> metric.update(["abcd", "xyz"], [["abcx"], ["abc"]])
        >>> metric.compute().item()
        0.375
    """

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add answers and the accepted answers to each question."""
        self._add(anls_scores(predictions, references, self.threshold))


class ExactMatchByGroup(Metric):
    """The share of answers that equal their reference in each group, such as the kind of question.

    Args:
        groups: Every group there can be, so that all ranks hold the same states even if one never sees a group.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = ExactMatchByGroup(["cell", "count"])
        >>> metric.update(["7", "2", "3"], ["7", "2", "4"], ["cell", "count", "count"])
        >>> {group: share.item() for group, share in metric.compute().items()}
        {'cell': 1.0, 'count': 0.5}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    answers: Tensor

    def __init__(self, groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = tuple(groups)
        self.add_state("correct", torch.zeros(len(self.groups), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", torch.zeros(len(self.groups), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[str], groups: Sequence[str]) -> None:
        """Add answers, their references and the group of each.

        Raises:
            ValueError: If a group is not among those given at construction.
        """
        scores = exact_match_scores(predictions, references)
        unknown = sorted(set(groups) - set(self.groups))
        if unknown or len(groups) != len(scores):
            raise ValueError(
                f"`groups` has {len(groups)} entries for {len(scores)} answers and unknown groups {unknown}, expected "
                f"one of {list(self.groups)} per answer. Declare every group in ExactMatchByGroup(groups)."
            )
        index = torch.tensor([self.groups.index(group) for group in groups], dtype=torch.int64)
        self.correct += torch.bincount(index, scores, len(self.groups)).to(self.correct.device)
        self.answers += torch.bincount(index, minlength=len(self.groups)).to(self.answers.device)

    def compute(self) -> dict[str, Tensor]:
        """The share of each group: float64, in [0, 1], NaN for a group without answers."""
        return dict(zip(self.groups, self.correct / self.answers, strict=True))


class _SkipCounts(Metric):
    """Skipped and all real tokens of each (layer, modality), over all updates and ranks."""

    is_differentiable = False
    full_state_update = False

    skipped: Tensor
    total: Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("skipped", torch.zeros(layers, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(layers, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Add the masks of one forward call.

        Raises:
            ValueError: If `run` has another number of layers, or the shapes do not fit each other.
        """
        if len(run) != len(self.skipped):
            raise ValueError(
                f"`run` has {len(run)} layers, expected {len(self.skipped)}. "
                f"Make a {type(self).__name__} for the {len(run)} layers of this model."
            )
        skipped, total = skip_counts(run, modality, real)
        self.skipped += skipped.to(self.skipped.device)
        self.total += total.to(self.total.device)


class SkipRate(_SkipCounts):
    """The share of real tokens that skipped each (layer, modality); see `skipit.eval.metrics.scores.skip_rate`.

    Args:
        layers: Number of decoder layers.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = SkipRate(layers=1)
        >>> metric.update(torch.tensor([[[True, False]]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
        >>> metric.compute().tolist()
        [[0.0, 1.0]]
    """

    def compute(self) -> Float[Tensor, "layers 2"]:
        """Rates of shape [layers, 2] in [0, 1], float64; NaN where a unit has no tokens."""
        return self.skipped.double() / self.total.double()


class SkipAlignment(_SkipCounts):
    """How far decisions agree with the theory's skip set; see `skipit.eval.metrics.alignment.alignment_of_counts`.

    Args:
        theory_set: True where the theory skips a unit, of shape [layers, 2], columns text and vision.
        weight: Of one decision, by unit, such as the FLOPs that a skip saves; by default all count alike.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = SkipAlignment(torch.tensor([[False, True]]))
        >>> metric.update(torch.tensor([[[True, False]]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
        >>> metric.compute()["agreement"].item()
        1.0
    """

    def __init__(
        self, theory_set: Bool[Tensor, "layers 2"], weight: Float[Tensor, "layers 2"] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(len(theory_set), **kwargs)
        # Raises on tables that mean nothing: at once, not after a long run.
        alignment_of_counts(self.skipped, self.total, theory_set, weight)
        self.theory_set, self.weight = theory_set, weight

    def compute(self) -> dict[str, Tensor]:
        """The "inside", "outside", "balanced" and "agreement", float64, NaN where there are no tokens."""
        return alignment_of_counts(self.skipped, self.total, self.theory_set, self.weight)


class ExpectedCalibrationError(Metric):
    """Mean distance of confidence and accuracy; see `skipit.eval.metrics.confidence.expected_calibration_error`.

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
        nothing = calibration_bins(torch.zeros(0), torch.zeros(0, dtype=torch.bool), bins)
        for name, state in nothing._asdict().items():
            self.add_state(name, state, dist_reduce_fx="sum")

    def update(self, confidence: Float[Tensor, " answers"], correct: Bool[Tensor, " answers"]) -> None:
        """Add the confidence in each answer, and whether it is right."""
        added = calibration_bins(confidence, correct, len(self.number))
        self.number += added.number.to(self.number.device)
        self.confidence += added.confidence.to(self.confidence.device)
        self.correct += added.correct.to(self.correct.device)

    def compute(self) -> Float[Tensor, ""]:
        """The error, float64 in [0, 1]; NaN before the first answer."""
        return CalibrationBins(self.number, self.confidence, self.correct).error()


class ComputeShare(Metric):
    """FLOPs executed as a share of the dense model's, over all updates; see `skipit.eval.metrics.scores.compute_share`.

    Example:
        >>> metric = ComputeShare()
        >>> metric.update(executed=1e9, dense=2e9)
        >>> metric.update(executed=1e9, dense=6e9)
        >>> metric.compute().item()
        0.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    executed: Tensor
    dense: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float64, because FLOPs of a long run overflow int64 and float32 stops adding single batches.
        self.add_state("executed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("dense", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, executed: float, dense: float) -> None:
        """Add the FLOPs executed on some inputs and those of the dense model on the same inputs."""
        compute_share(executed, dense)  # raises on numbers that mean nothing
        self.executed += executed
        self.dense += dense

    def compute(self) -> Float[Tensor, ""]:
        """The share, usually in [0, 1], float64; NaN before the first update."""
        return self.executed / self.dense
