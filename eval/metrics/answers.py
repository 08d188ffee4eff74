"""Answers against the right ones, or those of another model: exact match, agreement, exact match by group.

Scores come per answer (so that two models can be compared pair by pair) and as a mean.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router.errors import short

from .ratio import Ratio

Normalizer = Callable[[str], str]
Reference = str | Sequence[str]
"""A right answer, or several of which any is right."""


def check_paired(**lists: Sequence[object]) -> None:
    """Refuse two lists that have not one entry each per question.

    Raises:
        ValueError: Their lengths differ, or one is a plain string.
    """
    (first, ours), (second, theirs) = lists.items()
    for name, values in lists.items():
        if isinstance(values, str):
            raise ValueError(
                f"`{name}` is the string {short(values)}, expected a list with one entry per question. Wrap it in [ ]."
            )
    if len(ours) != len(theirs):
        raise ValueError(
            f"`{first}` has {len(ours)} entries and `{second}` {len(theirs)}, expected one each per question. "
            "Pass them in the same order."
        )


class MeanScore(Ratio):
    """The mean of per-answer scores over all updates and ranks; NaN before the first answer."""

    higher_is_better = True

    def add(self, scores: Float[Tensor, " answers"]) -> None:
        """Add the scores of some answers."""
        self.count(scores.sum(), len(scores))


def normalize_answer(text: str) -> str:
    r"""Bring an answer to the form in which two answers count as the same.

    Unicode NFKC, case folded, white space collapsed to one space and removed at both ends, full stops removed at the
    end. Nothing else: "3 5" and "35" differ, "the cat" and "cat" differ, "1.5" keeps its point.

    Args:
        text: An answer as generated or annotated.

    Returns:
        The normalized answer; normalizing it again changes nothing.

    Example:
        >>> normalize_answer("  Top\n LEFT. ")
        'top left'
    """
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # Case folding can undo composition (as in Greek), so the composed form is taken again.
    return unicodedata.normalize("NFKC", words.rstrip(". "))


def exact_match_scores(
    predictions: Sequence[str], references: Sequence[Reference], normalize: Normalizer = normalize_answer
) -> Float[Tensor, " answers"]:
    """Score each answer 1 if it equals its reference after normalization, or any of several, and 0 otherwise.

    Args:
        predictions: Generated answers.
        references: One reference per answer, in the same order; a list of some counts if any of them does.
        normalize: Applied to both sides.

    Returns:
        Scores of shape [answers] in {0, 1}, float64.

    Raises:
        ValueError: If the two lists differ in length, one is a plain string, or a reference is no text.

    Example:
        >>> exact_match_scores(["7", "3 5", "two"], ["7.", "35", ["2", "two"]]).tolist()
        [1.0, 0.0, 1.0]
    """
    check_paired(predictions=predictions, references=references)
    same = []
    for index, (mine, true) in enumerate(zip(predictions, references, strict=True)):
        accepted = [true] if isinstance(true, str) else true
        if not accepted or not all(isinstance(text, str) for text in accepted):
            raise ValueError(f"`references[{index}]` is {short(true)}, expected a text or a list of one or more.")
        same.append(normalize(mine) in {normalize(text) for text in accepted})
    return torch.tensor(same, dtype=torch.float64)


def exact_match(
    predictions: Sequence[str], references: Sequence[Reference], normalize: Normalizer = normalize_answer
) -> float:
    """The share of answers that equal their reference; see `exact_match_scores`.

    Args:
        predictions: Generated answers.
        references: One reference per answer, or several of which any is right, in the same order.
        normalize: Applied to both sides.

    Returns:
        A share in [0, 1]; NaN for no answers.

    Example:
        >>> exact_match(["7", "Left", "2"], ["7", "left", "3"])
        0.6666666666666666
    """
    return exact_match_scores(predictions, references, normalize).mean().item()


class ExactMatch(MeanScore):
    """The share of answers that equal their reference; see `exact_match`.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["7", "left"], ["7", "right"])
        >>> metric.compute().item()
        0.5
    """

    def update(self, predictions: Sequence[str], references: Sequence[Reference]) -> None:
        """Add answers and their references."""
        self.add(exact_match_scores(predictions, references))


def agreement(first: Sequence[str], second: Sequence[str], normalize: Normalizer = normalize_answer) -> float:
    """The share of questions to which two models give the same answer, right or wrong.

    Args:
        first: Answers of one model, such as the dense one.
        second: Answers of the other model to the same questions.
        normalize: Applied to both sides.

    Returns:
        A share in [0, 1], symmetric in the two models; NaN for no answers.

    Raises:
        ValueError: If the two lists differ in length or one is a plain string.

    Example:
        >>> agreement(["7", "left", "2", "9"], ["7", "Left", "3", "9"])
        0.75
    """
    check_paired(first=first, second=second)
    return exact_match(first, second, normalize)


class AnswerAgreement(MeanScore):
    """The share of questions to which two models give the same answer; see `agreement`.

    Example:
        >>> metric = AnswerAgreement()
        >>> metric.update(["7", "left", "2", "9"], ["7", "Left", "3", "9"])
        >>> metric.compute().item()
        0.75
    """

    def update(self, first: Sequence[str], second: Sequence[str]) -> None:
        """Add the answers of both models to the same questions."""
        self.add(exact_match_scores(first, second))


def mean_by_group(scores: Float[Tensor, " answers"], groups: Sequence[str]) -> dict[str, float]:
    """Average any per-answer score within each group, such as the kind of question.

    Args:
        scores: Scores of shape [answers].
        groups: The group of each answer, in the same order.

    Returns:
        The mean score of each group, in order of first appearance, in the range of the scores.

    Raises:
        ValueError: If there is not exactly one group per score.

    Example:
        >>> mean_by_group(torch.tensor([1.0, 0.0, 1.0]), ["count", "count", "cell"])
        {'count': 0.5, 'cell': 1.0}
    """
    check_paired(scores=scores.tolist(), groups=groups)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return {group: scores[indices].double().mean().item() for group, indices in members.items()}


def exact_match_by_group(
    predictions: Sequence[str], references: Sequence[Reference], groups: Sequence[str]
) -> dict[str, float]:
    """The share of answers that equal their reference in each group; see `exact_match_scores` and `mean_by_group`.

    Args:
        predictions: Generated answers.
        references: One reference per answer, in the same order.
        groups: The group of each answer, such as the kind of question.

    Returns:
        The share of each group, in [0, 1], in order of first appearance.

    Example:
        >>> exact_match_by_group(["7", "2", "3"], ["7", "2", "4"], ["cell", "count", "count"])
        {'cell': 1.0, 'count': 0.5}
    """
    return mean_by_group(exact_match_scores(predictions, references), groups)


class ExactMatchByGroup(Ratio):
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

    higher_is_better = True

    def __init__(self, groups: Sequence[str], **kwargs: Any) -> None:
        super().__init__([len(groups)], **kwargs)
        self.groups = tuple(groups)

    def update(self, predictions: Sequence[str], references: Sequence[Reference], groups: Sequence[str]) -> None:
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
        self.count(torch.bincount(index, scores, len(self.groups)), torch.bincount(index, minlength=len(self.groups)))

    def compute(self) -> dict[str, Tensor]:
        """The share of each group: float64, in [0, 1], NaN for a group without answers."""
        return dict(zip(self.groups, super().compute(), strict=True))
