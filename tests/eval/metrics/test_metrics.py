import doctest
import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

from skipit.eval import metrics
from skipit.eval.metrics import (
    ANLS,
    AnswerAgreement,
    ComputeShare,
    ExactMatch,
    ExactMatchByGroup,
    ExpectedCalibrationError,
    RelaxedAccuracy,
    SkipAlignment,
    SkipRate,
    VQAAccuracy,
    agreement,
    anls,
    compute_share,
    exact_match,
    exact_match_by_group,
    expected_calibration_error,
    relaxed_accuracy,
    skip_alignment,
    skip_rate,
    vqa_accuracy,
)
from skipit.eval.metrics.answers import exact_match_scores, mean_by_group, normalize_answer
from skipit.eval.metrics.compute import skip_counts, speed_up
from skipit.eval.metrics.vqa import anls_scores, answer_scores, normalize_vqa_answer, vqa_scores

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
HUMANS = [["2"] * 2 + ["3"] * 8, ["cat"] * 10, ["left"] * 4 + ["right"] * 6]


def masks(seed: int = 0) -> dict[str, Tensor]:
    """The masks of one call with 3 layers, 2 rows and 6 tokens, the second row padded by two."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    return {
        "run": torch.rand(3, 2, 6, generator=generator) > 0.4,
        "modality": torch.randint(0, 2, (2, 6), generator=generator),
        "real": real,
    }


@pytest.mark.parametrize("name", metrics.__all__)
def test_everything_has_a_number_in_its_docstring(name: str) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(metrics, name), name)
    found = doctest.DocTestRunner().run(example)
    assert found.failed == 0
    assert found.attempted > 0


# --- answers


@settings(deadline=None)
@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Left.", " left\n", True),
        ("\uff17", "7", True),  # full-width digit
        ("STRASSE", "straße", True),
        ("3 5", "35", False),
        ("the cat", "cat", False),
        ("1.5", "15", False),
    ],
)
def test_when_two_answers_count_as_the_same(first: str, second: str, same: bool) -> None:
    assert exact_match([first], [second]) == same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs!", "2 dogs"),
        ("the cat/dog", "cat dog"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "dont"),
        ("None", "0"),
        ("black-and-white", "black and white"),
        ("yes , please", "yes please"),
    ],
)
def test_normalization_of_the_vqa_evaluation(text: str, expected: str) -> None:
    assert normalize_vqa_answer(text) == expected


def test_exact_match_per_group() -> None:
    scores = exact_match_scores(["7", "2", "3", "5"], ["7", "2", "4", "5"])
    assert mean_by_group(scores, ["cell", "count", "count", "row"]) == {"cell": 1.0, "count": 0.5, "row": 1.0}
    assert scores.mean() == exact_match(["7", "2", "3", "5"], ["7", "2", "4", "5"]) == 0.75


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_agreement_is_symmetric_and_full_with_oneself(pairs: list[tuple[str, str]]) -> None:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    assert agreement(first, second) == agreement(second, first)
    assert agreement(first, first) == 1


def vqa_by_definition(prediction: str, humans: list[str]) -> float:
    """The published formula, read aloud: all subsets without one human, and the mean over them."""
    per_subset = []
    for left_out in range(len(humans)):
        others = humans[:left_out] + humans[left_out + 1 :]
        per_subset.append(min(others.count(prediction) / 3, 1))
    return sum(per_subset) / len(per_subset)


@settings(deadline=None)
@given(st.sampled_from("123"), st.lists(st.sampled_from("123"), min_size=4, max_size=12))
def test_vqa_accuracy_is_the_published_formula(prediction: str, humans: list[str]) -> None:
    assert vqa_accuracy([prediction], [humans]) == pytest.approx(vqa_by_definition(prediction, humans))


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_scores_that_everyone_knows(agreeing: int, score: float) -> None:
    assert vqa_scores(["yes"], [["Yes."] * agreeing + ["no"] * (10 - agreeing)]).item() == score


@pytest.mark.parametrize(
    ("prediction", "accepted", "score"),
    [
        ("Acme", ["acme"], 1.0),
        ("abcd", ["abcx", "zzzz"], 0.75),
        ("ab", ["ax"], 0.0),  # exactly at the threshold: wrong
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("two  words", ["TWO words"], 1.0),
    ],
)
def test_anls_of_known_pairs(prediction: str, accepted: list[str], score: float) -> None:
    assert anls([prediction], [accepted]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "accepted", "right"),
    [
        ("105", "100", True),  # exactly at the tolerance
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("0.01", "0", False),
        ("$1,050.00", "1000", True),
        ("5.2%", "5", True),
        ("rome.", "Rome", True),
        ("12/2", "12/3", False),
        ("96", ["none", "100"], True),
        ("nan", "1", False),
    ],
)
def test_relaxed_accuracy_of_known_pairs(prediction: str, accepted: str | list[str], right: bool) -> None:
    assert relaxed_accuracy([prediction], [accepted]) == right


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=5))
def test_without_tolerance_numbers_match_by_value(pairs: list[tuple[float, float]]) -> None:
    mine, right = zip(*((repr(a), repr(b)) for a, b in pairs), strict=True)
    share = sum(a == b for a, b in pairs) / len(pairs)
    assert relaxed_accuracy(mine, right, tolerance=0.0) == pytest.approx(share)


def test_answers_are_scored_by_the_metric_that_is_asked_for() -> None:
    said, right = ["Acme Corq", "97", "cat"], [["acme corp."], ["100"], ["cat"] * 3 + ["dog"] * 7]
    for metric, wanted, words in (
        ("usual", [0.0, 0.0, 0.9], "VQA accuracy of 1 row with ten answers, exact match of 2 rows"),
        ("anls", [0.8, 0.0, 1.0], "ANLS"),
        ("relaxed", [0.0, 1.0, 1.0], "relaxed accuracy (5 %)"),
    ):
        scores, how = answer_scores(said, right, metric)  # type: ignore[arg-type]
        assert (scores.tolist(), how) == (pytest.approx(wanted), words)


def test_a_higher_anls_threshold_forgives_more() -> None:
    assert anls_scores(["ab"], [["ax"]], threshold=0.6).item() == 0.5


def test_no_answers_give_nan() -> None:
    assert math.isnan(exact_match([], []))
    assert math.isnan(vqa_accuracy([], []))
    assert mean_by_group(torch.zeros(0), []) == {}


# --- skips, compute, time


def test_pads_never_count() -> None:
    clean, dirty = masks(), masks()
    pads = ~dirty["real"]
    dirty["run"][:, pads] = ~dirty["run"][:, pads]
    dirty["modality"][pads] = -1
    assert torch.equal(skip_rate(**clean), skip_rate(**dirty))


def test_skip_rate_is_what_counting_by_hand_gives() -> None:
    mask = masks()
    skipped = torch.zeros(3, 2)
    total = torch.zeros(3, 2)
    for layer, row, position in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(6)).tolist():
        if mask["real"][row, position]:
            unit = layer, int(mask["modality"][row, position])
            total[unit] += 1
            skipped[unit] += not mask["run"][layer, row, position]
    counts = skip_counts(**mask)
    assert torch.equal(counts[0], skipped.long())
    assert torch.equal(counts[1], total.long())
    assert torch.allclose(skip_rate(**mask), (skipped / total).double())


def test_a_unit_without_tokens_is_nan() -> None:
    mask = masks()
    rates = skip_rate(mask["run"], torch.zeros_like(mask["modality"]), mask["real"])
    assert rates[:, 1].isnan().all()
    assert not rates[:, 0].isnan().any()


def test_speed_and_compute() -> None:
    assert speed_up(120, 80) == 1.5
    assert compute_share(1.0, 4.0) == 0.25


# --- classes: as the function on everything at once, over batches and over ranks

THEORY_SET = torch.tensor([[False, True], [False, False], [True, True]])
WEIGHT = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])


def answers(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Confidences in sixteenths, whose sums are exact in any order, and whether each answer is right."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 17, (number,), generator=generator) / 16, torch.rand(number, generator=generator) < 0.7


GROUPS = ["cell", "count", "cell"]
CASES: dict[str, tuple[Callable[[], Metric], list[tuple[Any, ...]]]] = {
    "exact match": (ExactMatch, [(["1", "2"], ["1", "3"]), (["4"], ["4"]), ([], [])]),
    "agreement": (AnswerAgreement, [(["1", "2"], ["1", "3"]), (["4"], ["4"]), (["5"], ["6"])]),
    "vqa": (VQAAccuracy, [(["2", "cat"], HUMANS[:2]), (["right"], HUMANS[2:])]),
    "anls": (ANLS, [(["abcd"], [["abcx"]]), (["xyz", "x"], [["abc"], ["x"]])]),
    "relaxed": (RelaxedAccuracy, [(["97", "x"], ["100", "y"]), (["94"], ["100"]), ([], [])]),
    "groups": (
        lambda: ExactMatchByGroup(["cell", "count", "row"]),
        [(["1", "2", "3"], ["1", "3", "3"], GROUPS), (["1"], ["1"], ["count"])],
    ),
    "skip rate": (lambda: SkipRate(3), [tuple(masks(seed).values()) for seed in range(3)]),
    "alignment": (lambda: SkipAlignment(THEORY_SET, WEIGHT), [tuple(masks(seed).values()) for seed in range(3)]),
    "calibration": (lambda: ExpectedCalibrationError(4), [answers(7, 0), answers(2, 1), answers(0, 2), answers(11, 3)]),
    "compute": (ComputeShare, [(1e15, 4e15), (3e15, 4e15)]),
}


def computed(metric: Metric) -> Tensor:
    value = metric.compute()
    return torch.stack(list(value.values())) if isinstance(value, dict) else value


def together(updates: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All updates as one: lists joined, masks stacked along the batch, numbers added."""
    joined = []
    for parts in zip(*updates, strict=True):
        if isinstance(parts[0], Tensor):
            joined.append(torch.cat(parts, dim=max(parts[0].ndim - 2, 0)))
        else:
            joined.append(sum(parts, type(parts[0])()))
    return tuple(joined)


@pytest.mark.parametrize("case", CASES)
def test_batches_add_up(case: str) -> None:
    make, updates = CASES[case]
    whole, batched = make(), make()
    whole.update(*together(updates))
    for update in updates:
        batched.update(*update)
    assert torch.equal(computed(batched).nan_to_num(-1), computed(whole).nan_to_num(-1))


@pytest.mark.parametrize("case", CASES)
def test_unequal_ranks_add_up(case: str) -> None:
    """Rank 0 sees the first update, rank 1 the others: the synchronized value is that of all, not a mean of means."""
    make, updates = CASES[case]
    whole, first, second = make(), make(), make()
    whole.update(*together(updates))
    first.update(*updates[0])
    for update in updates[1:]:
        second.update(*update)
    other = iter([getattr(second, name) for name in first.metric_state])
    first.dist_sync_fn = lambda state, group: [state, next(other)]
    first.distributed_available_fn = lambda: True
    assert torch.equal(computed(first).nan_to_num(-1), computed(whole).nan_to_num(-1))


@pytest.mark.parametrize("case", CASES)
def test_nothing_seen_is_nan_and_reset_forgets(case: str) -> None:
    make, updates = CASES[case]
    metric = make()
    metric.update(*updates[0])
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert computed(metric).isnan().all()


def _rank(rank: int, rendezvous: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    values = {}
    for case, (make, updates) in CASES.items():
        metric = make()
        for update in updates[:1] if rank == 0 else updates[1:]:
            metric.update(*update)
        values[case] = computed(metric)
    torch.save(values, os.path.join(results, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # the processes import this file by its name
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    for case, (make, updates) in CASES.items():
        whole = make()
        whole.update(*together(updates))
        for rank in range(2):
            value = torch.load(tmp_path / f"{rank}.pt")[case]
            assert torch.equal(value.nan_to_num(-1), computed(whole).nan_to_num(-1)), (case, rank)


TWINS: dict[type[Metric], Callable[..., Any]] = {
    ExactMatch: exact_match,
    AnswerAgreement: agreement,
    VQAAccuracy: vqa_accuracy,
    ANLS: anls,
    RelaxedAccuracy: relaxed_accuracy,
    ExactMatchByGroup: exact_match_by_group,
    SkipRate: skip_rate,
    SkipAlignment: lambda *mask: skip_alignment(*mask, THEORY_SET, WEIGHT),
    ExpectedCalibrationError: lambda *answers: expected_calibration_error(*answers, bins=4),
    ComputeShare: compute_share,
}


@pytest.mark.parametrize("case", CASES)
def test_the_functions_agree_with_the_classes(case: str) -> None:
    make, updates = CASES[case]
    metric = make()
    metric.update(*updates[0])
    value, expected = metric.compute(), TWINS[type(metric)](*updates[0])
    if isinstance(value, dict):
        assert [name for name in value if name in expected] == list(expected)
        value, expected = torch.stack([value[name] for name in expected]), list(expected.values())
    assert torch.allclose(value, torch.as_tensor(expected, dtype=torch.float64), equal_nan=True)


def test_every_class_is_exported_with_its_function_and_stands_in_the_docs() -> None:
    classes = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)}
    assert {kind.__name__ for kind in TWINS} == classes == {type(make()).__name__ for make, _ in CASES.values()}
    assert len(metrics.__all__) == 2 * len(classes) == 20
    page = PAGE.read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)`", line)[:2] for line in table]
    assert {name for row in named for name in row} == set(metrics.__all__)
    assert {row[0] for row in named} == classes
    assert re.findall(r"^## `(\w+)`, `(\w+)`$", page, re.MULTILINE) == [tuple(row) for row in named]


def test_the_examples_of_the_docs_print_what_they_say() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == len(TWINS)
    for block in blocks:
        example = doctest.DocTestParser().get_doctest(block, {}, PAGE.name, str(PAGE), 0)
        assert len(example.examples) >= 3
        assert doctest.DocTestRunner().run(example).failed == 0


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match(["1"], []), r"`predictions` has 1 entries and `references` 0, expected one each"),
        (lambda: exact_match("12", ["1", "2"]), r"`predictions` is the string '12', expected a list"),
        (lambda: agreement(["1"], ["1", "2"]), r"`first` has 1 entries and `second` 2"),
        (lambda: mean_by_group(torch.ones(2), ["cell"]), r"`scores` has 2 entries and `groups` 1"),
        (lambda: vqa_accuracy(["1"], [["1"] * 3]), r"`references\[0\]` is .* expected a list of at least 4 human"),
        (lambda: vqa_accuracy(["1"], ["yes!"]), r"`references\[0\]` is 'yes!', expected a list of at least 4"),
        (lambda: anls(["1"], ["1"]), r"`references\[0\]` is '1', expected a list of one or more .* Wrap a single one"),
        (lambda: anls(["1"], [[]]), r"`references\[0\]` is \[\], expected a list of one or more"),
        (lambda: relaxed_accuracy(["1"], ["1"], tolerance=-1), r"`tolerance` is -1, expected a share of at least 0"),
        (lambda: anls(["1"], [["1"]], threshold=0.0), r"`threshold` is 0.0, expected a relative distance in \(0, 1\]"),
        (lambda: compute_share(1.0, 0.0), r"`executed` is 1.0 and `dense` is 0.0 FLOPs, expected executed >= 0"),
        (lambda: compute_share(math.nan, 1.0), r"`executed` is nan and `dense` is 1.0 FLOPs"),
        (lambda: speed_up(1.0, 0.0), r"`t_dense` is 1.0 and `t` is 0.0, expected two positive times"),
        (lambda: speed_up(-1.0, 1.0), r"`t_dense` is -1.0 and `t` is 1.0, expected two positive times"),
        (lambda: ComputeShare().update(1.0, 0.0), r"`dense` is 0.0 FLOPs"),
        (
            lambda: ExactMatchByGroup(["cell"]).update(["1"], ["1"], ["row"]),
            r"unknown groups \['row'\], expected one of \['cell'\] per answer. Declare every group",
        ),
        (
            lambda: ExactMatchByGroup(["cell"]).update(["1"], ["1"], []),
            r"`groups` has 0 entries for 1 answers",
        ),
        (lambda: SkipRate(2).update(**masks()), r"`run` has 3 layers, expected 2. Make a SkipRate for the 3 layers"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_that_do_not_fit() -> None:
    plain = inspect.unwrap(skip_counts)  # without the shape checks that only tests have
    mask = masks()
    with pytest.raises(ValueError, match=r"`run` has shape \(3, 2, 6\), `modality` \(2, 5\) and `real` \(2, 6\)"):
        plain(mask["run"], mask["modality"][:, 1:], mask["real"])
    mask["modality"][0, 0] = 2
    with pytest.raises(ValueError, match=r"`modality` has \[2\] at real tokens, expected 0 \(text\) or 1 \(vision\)"):
        skip_counts(**mask)
