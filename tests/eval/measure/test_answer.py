"""One question to a gated model: the same answer as `generate`, what it executed, and its depth map."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from skipit.eval.measure import answer as answering
from skipit.eval.measure.answer import answer, open_images
from skipit.router import RouterConfig, attach, gate_state, set_gates
from skipit.router.errors import InputError, RouterConfigError
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset

PICTURE = Image.new("L", (8, 8))


@pytest.fixture(scope="module")
def gated() -> tuple[Any, Any]:
    """The reference model; at operating point "0.5" its last six layers are skipped, by default everything runs."""
    model, processor = load_model("reference")
    attach(model, RouterConfig(operating_points={"0.5": 0.0}, threshold=-100.0))
    gates = gate_state(model)
    bias = torch.where(torch.arange(12)[:, None] < 6, 5.0, -5.0).expand_as(gates["bias"])
    set_gates(model, torch.zeros_like(gates["weight"]), bias)
    return model, processor


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return reference_dataset("test", 1, kinds=["row"])[0]


def question(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["content"][1]["text"])


def test_a_dense_answer_is_what_transformers_generates(gated: tuple[Any, Any], row: dict[str, Any]) -> None:
    model, processor = load_model("reference")
    batch: dict[str, Tensor] = Collator(processor, with_completion=False)([row])
    ids = model.generate(**batch, max_new_tokens=64, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True).strip()
    dense = answer(*gated, row["images"], question(row), dense=True)
    assert (dense.text, dense.compute, dense.depth) == (expected, None, None)
    everything = answer(*gated, row["images"], question(row))
    assert everything.text == expected
    assert everything.compute == pytest.approx(1, abs=0.005), "the gates themselves cost little"
    assert everything.depth.patches.eq(12).all()


def test_half_of_the_layers(gated: tuple[Any, Any], row: dict[str, Any]) -> None:
    reply = answer(*gated, row["images"], question(row), budget=0.5, max_new_tokens=3)
    # Skipped tokens still leave keys and values.
    assert 0.5 < reply.compute < 0.6  # type: ignore[operator]
    assert reply.prompt == question(row)
    assert reply.depth.patches.shape == (6, 6)
    assert reply.depth.patches.eq(6).all()
    assert set(reply.depth.token_depth) == {6}
    assert [token for token in reply.depth.tokens if token in question(row).split()] == question(row).split()


def test_two_images(gated: tuple[Any, Any], row: dict[str, Any]) -> None:
    reply = answer(*gated, row["images"] * 2, question(row))
    assert reply.depth.patches.shape == (6, 6), "of the first one"
    assert "<image>" not in reply.depth.tokens


def test_no_image(gated: tuple[Any, Any], tmp_path: Path) -> None:
    reply = answer(*gated, [], "which digit is top left ?", max_new_tokens=1)
    with pytest.raises(InputError, match="a depth map needs an image, and there was none"):
        reply.draw(tmp_path / "depth.png")


def test_depth_map(gated: tuple[Any, Any], row: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    import skipit.eval.plots

    drawn = skipit.eval.plots.plot_depth_map
    titles: list[str] = []
    monkeypatch.setattr("skipit.eval.plots.plot_depth_map", lambda *args: (titles.append(args[-1]), drawn(*args)))
    answer(*gated, row["images"], question(row), budget=0.5).draw(tmp_path / "depth.png")
    with Image.open(tmp_path / "depth.png") as picture:
        picture.verify()
    text = answer(*gated, row["images"], question(row), budget=0.5).text
    assert titles == [f"{question(row)}\n\N{RIGHTWARDS ARROW} {text}"]
    dense = answer(*gated, row["images"], question(row), dense=True)
    with pytest.raises(InputError, match="a dense run executes every layer for every token: it has no depth map"):
        dense.draw(tmp_path / "dense.png")


def test_an_unknown_budget_is_refused_before_anything_runs(gated: tuple[Any, Any], row: dict[str, Any]) -> None:
    with pytest.raises(RouterConfigError, match="got '0.3', this router is calibrated for: 0.5"):  # noqa: RUF043
        answer(*gated, row["images"], question(row), budget=0.3)


def test_open_images(tmp_path: Path) -> None:
    Image.new("LA", (4, 4)).save(tmp_path / "grey.png")
    (grey,) = open_images([tmp_path / "grey.png"])
    assert grey.mode == "RGB"
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:-20])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png", "no.png"):
        with pytest.raises(InputError, match=f"image {tmp_path / name} cannot be read: "):
            open_images([tmp_path / name])


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
    assert answering._text(prompt) == text


def test_examples_are_of_different_kinds_and_have_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = SimpleNamespace(patches=torch.ones(1, 2), tokens=["a" * 99], token_depth=[3], layers=4)

    def answer(model: Any, processor: Any, images: list[Any], prompt: str, *, budget: Any) -> Any:
        assert budget == 0.25
        return SimpleNamespace(text=prompt.upper(), depth=depth, compute=0.5, seen=images[0])

    monkeypatch.setattr(answering, "answer", answer)
    rows = [
        {"prompt": "no image", "images": [], "answer": "x", "kind": "a"},
        {"prompt": "first", "images": [PICTURE], "answer": "FIRST", "kind": "a"},
        {"prompt": "again", "images": [PICTURE], "answer": "x", "kind": "a"},
        {"prompt": "second", "images": [PICTURE], "answer": "x", "kind": "b"},
        {"prompt": "third", "images": [PICTURE], "answer": "x", "kind": "c"},
    ]
    found, pictures, _ = answering.depth_examples(None, None, rows, 0.25, number=2)
    assert [(row["prompt"], row["answer"], row["wanted"], row["right"]) for row in found] == [
        ("first", "FIRST", "FIRST", True),
        ("second", "SECOND", "x", False),
    ]
    assert len(pictures) == 2
    assert len(found[0]["tokens"][0]) <= 40
    assert found[0]["patches"] == [[1.0, 1.0]]
    assert answering.depth_examples(None, None, rows[:1], 0.25)[2] == "no row has an image and a question of one turn."


def test_where_patches_lie_nowhere_it_is_said(
    gated: tuple[Any, Any], row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(model: Any, processor: Any, row: Any) -> Any:
        raise InputError("where the image tokens lie is not known: the picture is too small.")

    monkeypatch.setattr(answering, "picture_views", unknown)
    examples, _, why = answering.depth_examples(*gated, [row], 0.5)
    assert (examples, why) == ([], "where the image tokens lie is not known: the picture is too small.")
    with pytest.raises(InputError, match=f"{why} A depth map cannot be drawn for it; leave out `--depth-map`."):
        answer(*gated, row["images"], question(row), max_new_tokens=1).draw(tmp_path / "depth.png")
