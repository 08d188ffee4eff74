"""Answers against several right ones: the official VQA accuracy, and ANLS of scene text and documents."""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from skipit.router.errors import short

from .answers import MeanScore, check_paired, exact_match_scores
from .relaxed import relaxed_scores

Metric = Literal["usual", "anls", "relaxed"]
METRICS: tuple[Metric, ...] = get_args(Metric)
HUMANS = 10  # who answer each question of VQAv2, TextVQA and VizWiz

# Punctuation of the official VQA evaluation; the full stop and the comma between digits have their own rules.
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_VQA_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_VQA_ARTICLES = frozenset({"a", "an", "the"})


def normalize_vqa_answer(text: str) -> str:
    """Normalize an answer as the official VQA evaluation does: punctuation, number words, articles.

    Follows `VQAEval` of https://github.com/GT-Vision-Lab/VQA with one difference: that table of contractions puts
    missing apostrophes back ("dont" becomes "don't"), here all apostrophes are dropped, on both sides.

    Args:
        text: An answer as generated or annotated.

    Returns:
        The normalized answer.

    Example:
        >>> normalize_vqa_answer("The two dogs, don't!")
        '2 dogs dont'
    """
    text = " ".join(text.split())
    joined = text
    comma_in_number = re.search(r"\d,\d", text) is not None
    for mark in _VQA_PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        joined = joined.replace(mark, "" if at_word_edge or comma_in_number else " ")
    joined = re.sub(r"\.(?!\d)", "", joined).replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    words = (_VQA_NUMBERS.get(word, word) for word in joined.lower().split())
    return " ".join(word for word in words if word not in _VQA_ARTICLES)


def vqa_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[Tensor, " answers"]:
    """Score each answer by how many humans gave it: min(humans / 3, 1), averaged over leaving out each human once.

    The official soft accuracy of Antol et al. 2015 (https://visualqa.org/evaluation.html), answers normalized by
    `normalize_vqa_answer`.

    Args:
        predictions: Generated answers.
        references: The human answers to each question, 10 in the official data.

    Returns:
        Scores of shape [answers] in [0, 1], float64. With 10 humans: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or more.

    Raises:
        ValueError: If a question has fewer than 4 human answers: no prediction could then reach 1.

    Example:
        >>> vqa_scores(["two"], [["2"] * 2 + ["3"] * 8]).tolist()
        [0.6]
    """
    check_paired(predictions=predictions, references=references)
    scores = []
    for index, (prediction, humans) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(humans, str) or len(humans) < 4:
            raise ValueError(
                f"`references[{index}]` is {short(humans)}, expected a list of at least 4 human answers: leaving "
                "one out, fewer can never reach 3 that agree. Use `exact_match` or `anls` for fewer references."
            )
        mine = normalize_vqa_answer(prediction)
        matches = [normalize_vqa_answer(human) == mine for human in humans]
        agreeing = sum(matches)
        # In thirds, so that the mean is one division and 0.6 is 0.6.
        thirds = sum(min(agreeing - own, 3) for own in matches)
        scores.append(thirds / (3 * len(humans)))
    return torch.tensor(scores, dtype=torch.float64)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean of `vqa_scores`.

    Args:
        predictions: Generated answers.
        references: The human answers to each question, at least 4 each.

    Returns:
        A number in [0, 1]; NaN for no answers.

    Example:
        >>> vqa_accuracy(["cat", "dog"], [["a cat"] * 10, ["cow"] * 9 + ["dog"]])
        0.65
    """
    return vqa_scores(predictions, references).mean().item()


class VQAAccuracy(MeanScore):
    """The official soft accuracy against several human answers; see `vqa_accuracy`.

    Example:
        >>> metric = VQAAccuracy()
        >>> metric.update(["cat"], [["cat"] * 3 + ["dog"] * 7])
        >>> metric.compute().item()
        0.9
    """

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add answers and the human answers to each question."""
        self.add(vqa_scores(predictions, references))


def answer_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metric: Metric = "usual"
) -> tuple[Float[Tensor, " answers"], str]:
    """Score each answer as data of its kind are scored: VQA accuracy where ten humans answered, else any exact match.

    Args:
        predictions: Generated answers.
        references: The accepted answers to each question; ten are those of ten humans, as in VQAv2 and TextVQA.
        metric: `usual` is the above; `anls` and `relaxed` (relaxed accuracy, 5 %) score every answer.

    Returns:
        Scores of shape [answers] in [0, 1], float64; and in words what was used.

    Raises:
        ValueError: If the two lists differ in length, or a question has no reference.

    Example:
        >>> scores, how = answer_scores(["cat", "2"], [["cat"] * 3 + ["dog"] * 7, ["two", "2"]])
        >>> scores.tolist(), how
        ([0.9, 1.0], 'VQA accuracy of 1 row with ten answers, exact match with any of several answers of 1 row')
    """
    if metric == "anls":
        return anls_scores(predictions, references), "ANLS"
    if metric == "relaxed":
        return relaxed_scores(predictions, references), "relaxed accuracy (5 %)"
    scores = exact_match_scores(predictions, references)
    humans = [index for index, accepted in enumerate(references) if len(accepted) == HUMANS]
    scores[humans] = vqa_scores([predictions[index] for index in humans], [references[index] for index in humans])
    several = sum(len(accepted) > 1 for accepted in references) - len(humans)
    used = {
        "VQA accuracy of {} with ten answers": len(humans),
        "exact match with any of several answers of {}": several,
        "exact match of {}": len(references) - len(humans) - several,
    }
    rows = {words: f"{count} row{'s' * (count != 1)}" for words, count in used.items() if count}
    return scores, "exact match" if not humans and not several else ", ".join(w.format(c) for w, c in rows.items())


def _relative_distance(first: str, second: str) -> float:
    first, second = (" ".join(text.lower().split()) for text in (first, second))
    longer = max(len(first), len(second))
    return edit_distance([first], [second], reduction="sum").item() / longer if longer else 0.0


def anls_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], threshold: float = 0.5
) -> Float[Tensor, " answers"]:
    """Score each answer by its normalized Levenshtein similarity to the nearest reference, 0 if it is too far.

    With d = edit distance / length of the longer string, the score is 1 - d if d < `threshold`, else 0 (Biten et al.
    2019, arXiv 1907.00490). Case and repeated white space do not count, as in the official evaluation.

    Args:
        predictions: Generated answers.
        references: One or more accepted answers per question.
        threshold: The relative distance, in (0, 1], from which an answer counts as wrong.

    Returns:
        Scores of shape [answers] in [0, 1], float64.

    Raises:
        ValueError: If a question has no reference, or `threshold` is out of range.

    Example:
        >>> anls_scores(["Acme Corp"], [["acme corp.", "ACME"]]).tolist()
        [0.9]
    """
    check_paired(predictions=predictions, references=references)
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}, expected a relative distance in (0, 1]. The usual value is 0.5.")
    scores = []
    for index, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(accepted, str) or not accepted:
            raise ValueError(
                f"`references[{index}]` is {short(accepted)}, expected a list of one or more accepted answers. "
                "Wrap a single one: [answer]."
            )
        distance = min(_relative_distance(prediction, reference) for reference in accepted)
        scores.append(1 - distance if distance < threshold else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def anls(predictions: Sequence[str], references: Sequence[Sequence[str]], threshold: float = 0.5) -> float:
    """The mean of `anls_scores`: average normalized Levenshtein similarity.

    Args:
        predictions: Generated answers.
        references: One or more accepted answers per question.
        threshold: The relative distance, in (0, 1], from which an answer counts as wrong.

    Returns:
        A number in [0, 1]; NaN for no answers.

    Example:
        >>> anls(["abcd", "xyz"], [["abcx"], ["abc"]])
        0.375
    """
    return anls_scores(predictions, references, threshold).mean().item()


class ANLS(MeanScore):
    """Average normalized Levenshtein similarity; see `anls`.

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
        self.add(anls_scores(predictions, references, self.threshold))
