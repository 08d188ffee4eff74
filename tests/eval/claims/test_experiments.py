"""Experiments of an evaluation on other data: answers without completions, conversations, rows without images."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from skipit.eval.claims import experiments
from skipit.eval.claims.experiments import controlled_skipping, depth_examples, outer_layers
from skipit.router import find_router
from skipit.router.errors import SkipItError
from skipit.train.data.sources import load_data, load_model
from skipit.train.export import profile_model

PICTURE = Image.new("L", (8, 8))


def test_a_row_without_a_completion_is_answered_by_its_answer() -> None:
    assert experiments._completed({"answer": 7, "prompt": "x"}, 0)["completion"] == [
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]}
    ]
    row = {"completion": "8", "answer": "7"}
    assert experiments._completed(row, 0) is row


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("what?", "what?"),
        ([{"role": "user", "content": "what?"}], "what?"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], "what?"),
        ([{"role": "user", "content": [{"type": "image", "text": None}]}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None),
    ],
)
def test_the_question_of_a_row(prompt: Any, text: str | None) -> None:
    assert experiments._text(prompt) == text


def test_examples_are_of_different_kinds_and_have_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = SimpleNamespace(patches=torch.ones(1, 2), tokens=["a" * 99], token_depth=[3], layers=4)

    def answer(model: Any, processor: Any, images: list[Any], prompt: str, *, budget: Any) -> Any:
        assert budget == 0.25
        return SimpleNamespace(text=prompt.upper(), depth=depth, compute=0.5)

    monkeypatch.setattr(experiments, "answer", answer)
    rows = [
        {"prompt": "no image", "images": [], "answer": "x", "kind": "a"},
        {"prompt": "first", "images": [PICTURE], "answer": "FIRST", "kind": "a"},
        {"prompt": "again", "images": [PICTURE], "answer": "x", "kind": "a"},
        {"prompt": "second", "images": [PICTURE], "answer": "x", "kind": "b"},
        {"prompt": "third", "images": [PICTURE], "answer": "x", "kind": "c"},
    ]
    found, pictures = depth_examples(None, None, rows, 0.25, number=2)
    assert [(row["prompt"], row["answer"], row["wanted"], row["right"]) for row in found] == [
        ("first", "FIRST", "FIRST", True),
        ("second", "SECOND", "x", False),
    ]
    assert len(pictures) == 2
    assert len(found[0]["tokens"][0]) <= 40
    assert found[0]["patches"] == [[1.0, 1.0]]


def test_controlled_skipping_leaves_the_dense_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(experiments, "note", notes.append)
    model, processor = load_model("reference")
    rows = load_data("reference", "test", 2)
    measured = profile_model(model, processor, rows, draws=1)
    answers = rows.remove_columns("completion")
    found = controlled_skipping(model, processor, answers, measured, "evict")
    assert found.keys() == {"units", "growing", "quadrants"}
    assert found["units"]["kv"] == found["growing"]["kv"] == "evict"
    assert found["units"]["rows"] == 2
    with pytest.raises(SkipItError, match="has no gates"):
        find_router(model)
    # A measure that cannot be had leaves the others standing.
    measured.var_text.fill_(torch.nan)
    measured.var_last.fill_(torch.nan)
    assert controlled_skipping(model, processor, answers, measured, "evict").keys() == {"units", "growing"}
    assert notes.pop().startswith("the 2x2 experiment is left out: ")
    assert outer_layers(measured, torch.full((12,), torch.nan).numpy()) is None
    assert notes.pop().startswith("late entry and early exit are left out: ")
