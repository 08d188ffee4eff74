"""Answers read off charts: right where a number is near enough."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .answers import MeanScore, Reference, exact_match_scores


def _number(text: str) -> float | None:
    """A number as charts write it, with a sign of money or per cent and commas between thousands; None for a text."""
    try:
        return float(text.strip().removeprefix("$").removesuffix("%").replace(",", ""))
    except ValueError:
        return None


def relaxed_scores(
    predictions: Sequence[str], references: Sequence[Reference], tolerance: float = 0.05
) -> Float[Tensor, " answers"]:
    """Score each answer 1 if it is as its reference or, both being numbers, off by at most a share of it; else 0.

    The relaxed accuracy of ChartQA (Masry et al. 2022, arXiv 2203.10244); 0 has to be met exactly.

    Args:
        predictions: Generated answers.
        references: One reference per answer, in the same order; a list of some counts if any of them does.
        tolerance: the share, at least 0.

    Returns:
        Scores of shape [answers] in {0, 1}, float64.

    Raises:
        ValueError: If the two lists differ in length, a reference is no text, or `tolerance` is negative.

    Example:
        >>> relaxed_scores(["97", "94", "Rome"], ["100", "100", "rome"]).tolist()
        [1.0, 0.0, 1.0]
    """
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` is {tolerance}, expected a share of at least 0. The usual value is 0.05.")
    scores = exact_match_scores(predictions, references)
    for index, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        given = _number(prediction)
        wanted = [_number(text) for text in ([accepted] if isinstance(accepted, str) else accepted)]
        if given is not None and any(w is not None and abs(given - w) <= tolerance * abs(w) for w in wanted):
            scores[index] = 1.0
    return scores


def relaxed_accuracy(predictions: Sequence[str], references: Sequence[Reference], tolerance: float = 0.05) -> float:
    """The mean of `relaxed_scores`.

    Args:
        predictions: Generated answers.
        references: One or several accepted answers per question.
        tolerance: The share by which a number may be off.

    Returns:
        A share in [0, 1]; NaN for no answers.

    Example:
        >>> relaxed_accuracy(["97", "94"], ["100", "100"])
        0.5
    """
    return relaxed_scores(predictions, references, tolerance).mean().item()


class RelaxedAccuracy(MeanScore):
    """The share of answers that are right or near enough; see `relaxed_accuracy`.

    Args:
        tolerance: The share by which a number may be off.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = RelaxedAccuracy()
        >>> metric.update(["97", "94"], ["100", "100"])
        >>> metric.compute().item()
        0.5
    """

    def __init__(self, tolerance: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance

    def update(self, predictions: Sequence[str], references: Sequence[Reference]) -> None:
        """Add answers and their references."""
        self.add(relaxed_scores(predictions, references, self.tolerance))
