"""The reference data set: what a row holds, who may see which scan, and what happens to bad requests."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from skipit.train.reference.data import reference_dataset
from skipit.train.reference.digits import CELL, GRID, SPLITS, load_scans
from skipit.train.reference.questions import COLUMNS, KINDS, ROWS
from studies.architecture import IMAGE_TOKENS, build_processor


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(reference_dataset("test", size=120))


def question(row: dict[str, Any]) -> str:
    (message,) = row["prompt"]
    image, text = message["content"]
    assert (message["role"], image["type"], text["type"]) == ("user", "image", "text")
    return text["text"]


def scans_shown(dataset: Dataset) -> Iterator[bytes]:
    """The 8x8 scans that the images of a data set are made of."""
    for row in dataset:
        pixels = np.asarray(row["images"][0])
        assert pixels.shape == (GRID * CELL, GRID * CELL, 3)
        cells = pixels[::2, ::2, 0].reshape(GRID, 8, GRID, 8).swapaxes(1, 2).reshape(GRID * GRID, 8, 8)
        yield from (cell.tobytes() for cell in cells)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_shows_its_own_scans_only(split: str) -> None:
    own = {scan.tobytes() for scan in load_scans(split).pixels}
    others = {scan.tobytes() for other in SPLITS if other != split for scan in load_scans(other).pixels}
    assert not own & others
    assert set(scans_shown(reference_dataset(split, size=60))) <= own


def test_images_show_the_digits(rows: list[dict[str, Any]]) -> None:
    scans = load_scans("test")
    label = dict(zip((scan.tobytes() for scan in scans.pixels), scans.labels.tolist(), strict=True))
    shown = [label[scan] for scan in scans_shown(rows)]
    assert shown == [digit for row in rows for digit in row["digits"]]


def test_kinds_are_balanced() -> None:
    assert Counter(reference_dataset("train", size=60)["kind"]) == dict.fromkeys(KINDS, 10)
    assert set(reference_dataset("train", size=8, kinds=["sum", "count"])["kind"]) == {"sum", "count"}


def test_same_request_gives_the_same_rows() -> None:
    first = list(reference_dataset("train", size=30, seed=3))
    assert list(reference_dataset("train", size=30, seed=3)) == first
    assert list(reference_dataset("train", size=12, seed=3)) == first[:12]
    digits = [row["digits"] for row in first]
    assert reference_dataset("train", size=30, seed=4)["digits"] != digits
    assert reference_dataset("calibration", size=30, seed=3)["digits"] != digits


def expected_answer(text: str, digits: list[int]) -> str:
    """The answer read off the wording of a question alone."""
    grid = np.array(digits).reshape(GRID, GRID)
    cells = [
        int(grid[ROWS.index(row), COLUMNS.index(column)])
        for row, column in re.findall(rf"({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})", text)
    ]
    line = next((grid[i].tolist() for i, name in enumerate(ROWS) if f"the {name} row" in text), [])
    if text.startswith("which digit"):
        return str(cells[0])
    if text.startswith("is "):
        return "yes" if cells[0] > cells[1] else "no"
    if text.startswith("how many"):
        return str(digits.count(int(re.findall(r"\d", text)[0])))
    if text.startswith("what is the sum"):
        return str(sum(line))
    return " ".join(map(str, line or digits))


def test_answers_are_right(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["answer"] == expected_answer(question(row), row["digits"])
        assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}]


def test_cells_are_those_asked_about(rows: list[dict[str, Any]]) -> None:
    asked = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    for row in asked["cell"] + asked["row"] + asked["grid"]:
        assert " ".join(str(row["digits"][cell]) for cell in row["cells"]) == row["answer"]
    assert all(len(row["cells"]) == int(row["answer"]) for row in asked["count"])
    assert all(sum(row["digits"][cell] for cell in row["cells"]) == int(row["answer"]) for row in asked["sum"])


def test_rows_survive_storage(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = reference_dataset("test", size=120)
    dataset.save_to_disk(tmp_path / "disk")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for stored in (
        Dataset.from_list(rows, features=dataset.features),
        load_from_disk(tmp_path / "disk"),
        Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")),
    ):
        assert stored.features == dataset.features
        assert list(stored) == rows


def test_rows_become_tokens_without_unknown_words(rows: list[dict[str, Any]]) -> None:
    processor = build_processor()
    tokenizer = processor.tokenizer
    for row in rows:
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        whole = processor.apply_chat_template(row["prompt"] + row["completion"])
        ids, whole_ids = (
            processor(text=text, images=row["images"], add_special_tokens=False)["input_ids"][0]
            for text in (prompt, whole)
        )
        assert tokenizer.unk_token_id not in whole_ids
        assert list(whole_ids[: len(ids)]) == list(ids)
        assert tokenizer.convert_ids_to_tokens(list(ids)).count("<image>") == IMAGE_TOKENS == 36
        assert whole_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole_ids[len(ids) : -1]) == row["answer"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"split": "dev"}, "`split`: got 'dev', expected one of train, calibration, test."),
        ({"size": 0}, "`size`: got 0, expected a whole number of rows, at least 1."),
        ({"size": 1.5}, "`size`: got 1.5, expected a whole number of rows, at least 1."),
        ({"seed": -1}, "`seed`: got -1, expected a whole number, at least 0."),
        ({"kinds": []}, f"`kinds`: got [], expected a list of one or more of {', '.join(KINDS)}."),
        ({"kinds": "cell"}, f"`kinds`: got 'cell', expected a list of one or more of {', '.join(KINDS)}."),
        (
            {"kinds": ["cell", "colour"]},
            f"`kinds`: got unknown 'colour', expected a list of one or more of {', '.join(KINDS)}.",
        ),
    ],
)
def test_bad_requests(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reference_dataset(**({"split": "test", "size": 4} | request_))
