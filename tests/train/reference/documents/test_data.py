"""Rendered pages and their questions: what a row holds, what splits share (nothing), and what answers come from."""

import re
from collections import Counter
from dataclasses import fields
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from skipit.train.reference.documents.charts import LOOKS
from skipit.train.reference.documents.data import (
    QUESTIONS,
    conversations_dataset,
    documents_dataset,
    draw_document,
    questions_of,
)
from skipit.train.reference.documents.layouts import KINDS, STYLES, Facts
from skipit.train.reference.documents.page import SIDE
from skipit.train.reference.documents.questions import ABSENT, TASKS, ask
from skipit.train.reference.documents.words import FONTS, SPLITS, WORDS


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(documents_dataset("test", size=64))


def listed(split: Any) -> set[str]:
    return {word for f in fields(WORDS[split]) for word in getattr(WORDS[split], f.name)}


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_nothing(one: Any, other: Any) -> None:
    assert not listed(one) & listed(other)
    assert not {face for family in FONTS[one] for face in family} & {face for family in FONTS[other] for face in family}
    assert not set(STYLES[one]) & set(STYLES[other])
    assert not set(LOOKS[one]) & set(LOOKS[other])
    pages = [np.asarray(documents_dataset(split, 1)[0]["images"][0]) for split in (one, other)]
    assert not np.array_equal(*pages)


def test_train_and_test_have_six_fonts_and_no_family_in_common() -> None:
    faces = [face for families in FONTS.values() for family in families for face in family]
    assert len(faces) == len(set(faces)) >= 6
    family = {face: re.split(r"-|\.|10|Bol", face)[0] for face in faces if face}
    by_split = {split: {family[f] for fam in FONTS[split] for f in fam if f} for split in SPLITS}
    assert not by_split["train"] & by_split["test"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_shows_all_its_words_and_only_its_own_splits(split: Any, kind: Any) -> None:
    others = set().union(*(listed(other) for other in SPLITS if other != split))
    for number in range(6):
        document = draw_document(split, kind, np.random.default_rng(number))
        assert document.page.image.size == (SIDE, SIDE)
        shown = " ".join(word.text for word in document.page.words)
        assert sorted(shown.split()) == sorted(" ".join(document.texts).split())
        assert not others & set(re.findall(r"[A-Za-z]+", shown)) - {"Invoice", "Date"}, "labels of every split"
        for word in document.page.words:
            assert len(word.xs) == len(word.text)
            assert (np.diff(word.xs) > 0).all()
            assert word.xs.min() > 0
            assert word.xs.max() < SIDE
            assert 0 < word.y < SIDE


def test_words_are_where_the_page_says() -> None:
    """The paper around a word is lighter than the word's own place, turned or not."""
    darker = 0
    for number in range(20):
        document = draw_document("train", "form", np.random.default_rng(number))
        grey = np.asarray(document.page.image.convert("L"), dtype=float)
        for word in document.page.words:
            y, x0, x1 = round(word.y), int(word.xs[0] - 3), int(word.xs[-1] + 3)
            darker += grey[y - 6 : y + 6, max(x0, 0) : x1].mean() < grey.mean() - 5
    assert darker > 0.97 * sum(
        len(draw_document("train", "form", np.random.default_rng(n)).page.words) for n in range(20)
    )


def test_a_row_is_in_the_conversational_vision_format(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (user,), (assistant,) = row["prompt"], row["completion"]
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert assistant["content"][0]["text"] == row["answer"]
        assert row["images"][0].size == (SIDE, SIDE)
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(TASKS, len(rows) // len(TASKS))
    assert {row["page"] for row in rows} == set(KINDS)


def test_the_same_request_gives_the_same_rows() -> None:
    short, long = documents_dataset("train", 3, seed=5), documents_dataset("train", 6, seed=5)
    assert short[:] == long[:3]
    assert documents_dataset("train", 3, seed=6)["answer"] != short["answer"]


def test_conversations_ask_more_about_the_same_pages() -> None:
    """Different questions, each answered, of which the first is the one that is asked alone."""
    alone, together = documents_dataset("test", 16), conversations_dataset("test", 16)
    for one, many in zip(alone, together, strict=True):
        assert (many["images"], many["prompt"]) == (one["images"], one["prompt"])
        assert [many[name] for name in ("kind", "page", "answer")] == [one[name] for name in ("kind", "page", "answer")]
        assert many["completion"][0] == one["completion"][0]
        turns = [*many["prompt"], *many["completion"]]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        asked = [turn["content"][-1]["text"] for turn in turns[::2]]
        assert len({*asked}) == len(asked)
        assert 3 <= len(asked) <= QUESTIONS
    assert conversations_dataset("test", 3)[:] == together[:3]


FACTS = Facts(
    "Farm 1990", {"date": "1990-01-02", "cashier": "Mary"}, ["Tea", "Milk"], {"the price of {}": ["$2.50", "$3.00"]}
)
TEXTS = ["Farm 1990", "Date: 1990-01-02", "Tea: $2.50", "Milk: $3.00", "Cashier: Mary"]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("lookup", {("What is the price of Tea?", "$2.50"), ("What is the cashier?", "Mary")}),
        ("copy", {("What is the title?", "Farm 1990"), ("Copy the line that begins with Milk.", "Milk: $3.00")}),
        ("compare", {("Which has the largest price?", "Milk"), ("Which is smaller, the price of Tea or Milk?", "Tea")}),
        ("sum", {("What is the price of Tea plus that of Milk?", "$5.50")}),
        ("count", {("How many entries does the page list?", "2")}),
        ("yesno", {("Is the price of Milk larger than that of Tea?", "yes"),
                   ("Is the price of Tea larger than that of Milk?", "no")}),
        ("absent", {("What is the price of Bread?", ABSENT)}),
        ("read", {("Read the page.", "\n".join(TEXTS))}),
    ],
)  # fmt: skip
def test_answers_follow_from_the_page(task: Any, expected: set[tuple[str, str]]) -> None:
    rng = np.random.default_rng(0)
    asked = {ask(task, FACTS, TEXTS, WORDS["train"], rng) for _ in range(400)}
    assert expected <= asked


def test_yes_and_no_are_equally_frequent() -> None:
    rng = np.random.default_rng(0)
    answers = Counter(ask("yesno", FACTS, TEXTS, WORDS["train"], rng)[1] for _ in range(1000))
    assert 0.4 < answers["yes"] / 1000 < 0.6


def test_every_lookup_can_be_read_off_the_page() -> None:
    for number, kind in enumerate(KINDS * 10):
        rng = np.random.default_rng(number)
        document = draw_document("calibration", kind, rng)
        page = " ".join(document.texts)
        for task, question, answer in questions_of(document, "calibration", rng):
            if task in ("lookup", "copy", "compare"):
                assert answer in page, question
            if task == "absent":
                assert answer == ABSENT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "`split`: got 'validation', expected one of train, calibration, test"),
        ({"size": 0}, "`size`: got 0, expected a whole number, at least 1"),
        ({"questions": 0}, "`questions`: got 0, expected a whole number, at least 1"),
        ({"seed": -1}, "`seed`: got -1, expected a whole number, at least 0"),
        ({"kinds": ["guess"]}, r"`kinds`: got \['guess'\], expected a list of one or more of lookup, copy"),
        ({"pages": "form"}, "`pages`: got 'form', expected a list of one or more of receipt"),
        ({"pages": ["sign"], "kinds": ["sum"]}, r"`pages`: got \['sign'\], none of which has anything to ask .* 'sum'"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents_dataset(**{"split": "test", "size": 1, **options})
