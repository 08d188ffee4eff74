"""What a router costs and saves, as pure functions: answer scores, skip rates, compute shares and speed.

Answer scores come per answer (so that two models can be compared pair by pair) and as a mean.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MODALITIES = ("text", "vision")

Normalizer = Callable[[str], str]

# Punctuation of the official VQA evaluation; the full stop and the comma between digits have their own rules.
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_VQA_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_VQA_ARTICLES = frozenset({"a", "an", "the"})


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


def exact_match_scores(
    predictions: Sequence[str], references: Sequence[str], normalize: Normalizer = normalize_answer
) -> Float[Tensor, " answers"]:
    """Score each answer 1 if it equals its reference after normalization and 0 otherwise.

    Args:
        predictions: Generated answers.
        references: One reference per answer, in the same order.
        normalize: Applied to both sides.

    Returns:
        Scores of shape [answers] in {0, 1}, float64.

    Raises:
        ValueError: If the two lists differ in length or one is a plain string.

    Example:
        >>> exact_match_scores(["7", "3 5"], ["7.", "35"]).tolist()
        [1.0, 0.0]
    """
    _check_paired(predictions=predictions, references=references)
    same = [normalize(mine) == normalize(true) for mine, true in zip(predictions, references, strict=True)]
    return torch.tensor(same, dtype=torch.float64)


def exact_match(
    predictions: Sequence[str], references: Sequence[str], normalize: Normalizer = normalize_answer
) -> float:
    """The share of answers that equal their reference; see `exact_match_scores`.

    Args:
        predictions: Generated answers.
        references: One reference per answer, in the same order.
        normalize: Applied to both sides.

    Returns:
        A share in [0, 1]; NaN for no answers.

    Example:
        >>> exact_match(["7", "Left", "2"], ["7", "left", "3"])
        0.6666666666666666
    """
    return exact_match_scores(predictions, references, normalize).mean().item()


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
    _check_paired(scores=scores.tolist(), groups=groups)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return {group: scores[indices].double().mean().item() for group, indices in members.items()}


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
    _check_paired(first=first, second=second)
    return exact_match(first, second, normalize)


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
    _check_paired(predictions=predictions, references=references)
    scores = []
    for index, (prediction, humans) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(humans, str) or len(humans) < 4:
            raise ValueError(
                f"`references[{index}]` is {humans!r}, expected a list of at least 4 human answers: leaving one out, "
                "fewer can never reach 3 agreeing humans. Use `exact_match` or `anls` for data with fewer references."
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
    _check_paired(predictions=predictions, references=references)
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}, expected a relative distance in (0, 1]. The usual value is 0.5.")
    scores = []
    for index, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(accepted, str) or not accepted:
            raise ValueError(
                f"`references[{index}]` is {accepted!r}, expected a list of one or more accepted answers. "
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


def skip_counts(
    run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> tuple[Int[Tensor, "layers 2"], Int[Tensor, "layers 2"]]:
    """Count skipped and all tokens of each (layer, modality) in one forward call; pads never count.

    Args:
        run: Whether a layer ran for a token, bool of shape [layers, batch, seq].
        modality: 0 for text and 1 for vision, of shape [batch, seq]; any value at pads.
        real: False at pads, bool of shape [batch, seq].

    Returns:
        The number of skipped and of all tokens, both int64 of shape [layers, 2]. They add up over calls and ranks.

    Raises:
        ValueError: If shapes do not fit or a real token has another modality.

    Example:
        >>> run = torch.tensor([[[True, False, False]]])
        >>> skipped, total = skip_counts(run, torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]]))
        >>> skipped.tolist(), total.tolist()
        ([[0, 1]], [[1, 1]])
    """
    if run.ndim != 3 or modality.shape != run.shape[1:] or real.shape != run.shape[1:]:
        raise ValueError(
            f"`run` has shape {tuple(run.shape)}, `modality` {tuple(modality.shape)} and `real` {tuple(real.shape)}, "
            "expected [layers, batch, seq], [batch, seq] and [batch, seq]. Pass the masks of one forward call."
        )
    other = sorted(set(modality[real].unique().tolist()) - {0, 1})
    if other:
        raise ValueError(
            f"`modality` has {other} at real tokens, expected 0 (text) or 1 (vision). Mark pads as False in `real`."
        )
    members = torch.stack([(modality == index) & real for index in range(len(MODALITIES))])
    skipped = (~run[:, None] & members).sum(dim=(-2, -1))
    total = members.sum(dim=(-2, -1)).expand(run.shape[0], -1).clone()
    return skipped, total


def skip_rate(
    run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "layers 2"]:
    """The share of real tokens that skipped each (layer, modality) in one forward call; see `skip_counts`.

    Args:
        run: Whether a layer ran for a token, bool of shape [layers, batch, seq].
        modality: 0 for text and 1 for vision, of shape [batch, seq].
        real: False at pads, bool of shape [batch, seq].

    Returns:
        Rates of shape [layers, 2] in [0, 1], float64; NaN where a unit has no tokens.

    Example:
        >>> run = torch.tensor([[[True, True, False, False]]])
        >>> skip_rate(run, torch.tensor([[0, 1, 1, 0]]), torch.tensor([[True, True, True, False]])).tolist()
        [[0.0, 0.5]]
    """
    skipped, total = skip_counts(run, modality, real)
    return skipped.double() / total.double()


def compute_share(executed: float, dense: float) -> float:
    """The share of the dense model's compute that was executed.

    Args:
        executed: FLOPs executed, gates included.
        dense: FLOPs of the same inputs with every layer run.

    Returns:
        A share, usually in [0, 1]; slightly above 1 when the gates cost more than they save.

    Raises:
        ValueError: If `dense` is not positive or `executed` is negative.

    Example:
        >>> compute_share(executed=3.2e9, dense=6.4e9)
        0.5
    """
    if not dense > 0 or not executed >= 0:
        raise ValueError(
            f"`executed` is {executed} and `dense` is {dense} FLOPs, expected executed >= 0 and dense > 0. "
            "Count both on the same inputs."
        )
    return executed / dense


def speed_up(t_dense: float, t: float) -> float:
    """How many times faster the router is: t_dense / t.

    Args:
        t_dense: Time of the dense model, in any unit.
        t: Time of the router on the same input, in the same unit.

    Returns:
        A positive factor; below 1 the router is slower.

    Raises:
        ValueError: If a time is not positive.

    Example:
        >>> speed_up(t_dense=120.0, t=80.0)
        1.5
    """
    _check_times(t_dense, t)
    return t_dense / t


def time_saved(t_dense: float, t: float) -> float:
    """The share of the dense model's time that the router saves: 1 - t / t_dense.

    Args:
        t_dense: Time of the dense model, in any unit.
        t: Time of the router on the same input, in the same unit.

    Returns:
        A share below 1; negative if the router is slower.

    Raises:
        ValueError: If a time is not positive.

    Example:
        >>> time_saved(t_dense=120.0, t=90.0)
        0.25
    """
    _check_times(t_dense, t)
    return 1 - t / t_dense


def _relative_distance(first: str, second: str) -> float:
    first, second = (" ".join(text.lower().split()) for text in (first, second))
    # Imported here, because importing torchmetrics takes longer than importing torch.
    from torchmetrics.functional.text import edit_distance

    longer = max(len(first), len(second))
    return edit_distance([first], [second], reduction="sum").item() / longer if longer else 0.0


def _check_paired(**lists: Sequence[object]) -> None:
    (first, ours), (second, theirs) = lists.items()
    for name, values in lists.items():
        if isinstance(values, str):
            raise ValueError(
                f"`{name}` is the string {values!r}, expected a list with one entry per question. Wrap it in [ ]."
            )
    if len(ours) != len(theirs):
        raise ValueError(
            f"`{first}` has {len(ours)} entries and `{second}` {len(theirs)}, expected one each per question. "
            "Pass them in the same order."
        )


def _check_times(t_dense: float, t: float) -> None:
    if not (t_dense > 0 and t > 0):
        raise ValueError(
            f"`t_dense` is {t_dense} and `t` is {t}, expected two positive times in the same unit. Measure both again."
        )
