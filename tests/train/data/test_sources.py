"""What MODEL and DATA may be, and what is said when they are something else."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets.utils import logging

from skipit.router.errors import CheckpointError, InputError
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Broken, RowStream
from skipit.train.data.sources import load_data, load_held_out, load_model, name_model, on_gpu, resolve_model
from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset
from studies.architecture import build_processor


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("train", 6)


def test_reference() -> None:
    assert load_data("reference", "test", 3, seed=2)[:] == reference_dataset("test", 3, 2)[:]
    assert resolve_model("reference") == str(WEIGHTS)
    assert name_model("reference") == "reference"
    model, processor = load_model("reference")
    assert not model.training
    assert processor.chat_template


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_used_where_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(model, "to", lambda place: placed.append(place) or model)
    assert on_gpu(model) is model
    assert placed == (["cuda"] if there else [])


def test_a_folder_is_named_so_that_it_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_model("model") == str(tmp_path / "model")
    assert name_model("llava-hf/llava-1.5-7b-hf") == resolve_model("llava-hf/llava-1.5-7b-hf")


def test_folders_of_one_split_and_of_several(rows: Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows.select([4, 5])}).save_to_disk(tmp_path / "two")
    assert load_data(str(tmp_path / "one"), "whatever")[:] == rows[:]
    assert load_data(str(tmp_path / "two"), "dev")[:] == rows[4:6]
    assert load_data(str(tmp_path / "two"), "train", samples=2)[:] == rows[:2]
    assert len(load_data(str(tmp_path / "two"), "train", samples=200)) == 6
    with pytest.raises(InputError, match=r"two' has no split 'test'; found: train, dev\."):
        load_data(str(tmp_path / "two"), "test")


def test_files(rows: Dataset, tmp_path: Path) -> None:
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_data(str(tmp_path / "rows.parquet"), "train", samples=4)[:] == rows[:4]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            row["images"][0].save(tmp_path / f"{number}.png")
            text = row["prompt"][0]["content"][1]["text"]
            line = {"images": [str(tmp_path / f"{number}.png")], "prompt": text, "completion": row["answer"]}
            file.write(json.dumps(line) + "\n")
    loaded = load_data(str(tmp_path / "rows.jsonl"), "train")
    collate = Collator(build_processor())
    ours, theirs = collate(list(loaded)), collate(list(rows))
    assert all(ours[name].equal(theirs[name]) for name in theirs), "paths and texts stand for pictures and messages"


COLUMNS = {"images": "photo", "prompt": "question"}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_by_other_names(rows: Dataset, tmp_path: Path, streaming: bool) -> None:
    rows.rename_columns({"images": "photo", "prompt": "question"}).to_parquet(tmp_path / "rows.parquet")
    source = str(tmp_path / "rows.parquet")
    loaded = load_data(source, "train", columns={**COLUMNS, "completion": "completion"}, streaming=streaming)
    collate = Collator(build_processor())
    ours, theirs = collate(list(loaded)), collate(list(rows))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    with pytest.raises(InputError, match=r"has no column 'picture' for `images`; found: photo, question, completion"):
        load_data(source, "train", columns={"images": "picture"}, streaming=streaming)
    with pytest.raises(InputError, match="`completion` is to be 'answer', but it has a column 'completion' already"):
        load_data(source, "train", columns={"completion": "answer"}, streaming=streaming)
    assert len(load_held_out(source, "reference", "any", 4, 0, COLUMNS)) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_pictures(rows: Dataset, tmp_path: Path, streaming: bool) -> None:
    """As `datasets` knows it: splits are folders, a metadata.jsonl in each names the files."""
    for split, numbers in {"train": range(4), "validation": range(4, 6)}.items():
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        lines = []
        for number in numbers:
            rows[number]["images"][0].save(folder / f"{number}.png")
            text = rows[number]["prompt"][0]["content"][1]["text"]
            lines.append({"file_name": f"{number}.png", "prompt": text, "completion": rows[number]["answer"]})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, columns = str(tmp_path / "photos"), {"images": "image"}
    loaded = load_data(source, "train", columns=columns, streaming=streaming)
    collate = Collator(build_processor())
    ours, theirs = collate(list(loaded)), collate(list(rows.select(range(4))))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert len(load_held_out(None, source, "validation", 9, 0, columns)) == 2


def test_held_out_rows_are_never_those_trained_on(rows: Dataset, tmp_path: Path) -> None:
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows.select([4, 5])}).save_to_disk(tmp_path / "two")
    for source in ("rows.parquet", "one"):
        with pytest.raises(InputError, match="has one split, which is trained on. Name held-out rows"):  # noqa: RUF043
            load_held_out(None, str(tmp_path / source), "calibration", 4, 0)
    assert len(load_held_out(None, str(tmp_path / "two"), "dev", 4, 0)) == 2
    assert len(load_held_out(str(tmp_path / "one"), str(tmp_path / "rows.parquet"), "any", 4, 0)) == 4
    assert len(load_held_out("reference", str(tmp_path / "rows.parquet"), "calibration", 3, 0)) == 3
    assert len(load_held_out(None, "reference", "calibration", 3, 0)) == 3


def test_datasets_is_silent_and_hears_nothing_of_it(rows: Dataset, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    (tmp_path / "bad.jsonl").write_text("not json")
    rows.select_columns("answer").to_parquet(tmp_path / "rows.parquet")
    before = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    capfd.readouterr()
    load_data(str(tmp_path / "rows.parquet"), "train")
    with pytest.raises(InputError):
        load_data(str(tmp_path / "bad.jsonl"), "train")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert (logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


def test_what_cannot_be_read(rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("not json")
    with pytest.raises(
        InputError,
        match=r"rows\.jsonl', split 'train', cannot be read: .*\nGive `reference`, `documents`, `conversations`, a f",
    ):
        load_data(str(tmp_path / "rows.jsonl"), "train")
    with pytest.raises(InputError, match="data 'no/such-data', split 'train', cannot be read"):
        load_data("no/such-data", "train")
    rows.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"empty\.parquet', split 'train': no rows\."):
        load_data(str(tmp_path / "empty.parquet"), "train")
    with pytest.raises(InputError, match="`split`: got 'dev'"):
        load_data("reference", "dev")
    with pytest.raises(CheckpointError, match="model 'no/such-model' cannot be loaded"):
        load_model("no/such-model")


def lines(folder: Path, rows: Dataset) -> Path:
    """A JSONL that names its pictures as they are beside it."""
    folder.mkdir()
    text = ""
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
        line = {"photo": [f"{number}.png"], "prompt": row["prompt"][0]["content"][1]["text"], "reply": row["answer"]}
        text += json.dumps(line) + "\n"
    (folder / "rows.jsonl").write_text(text)
    return folder / "rows.jsonl"


NAMES = {"images": "photo", "completion": "reply"}


@pytest.mark.parametrize("streaming", [False, True])
def test_names_are_looked_for_beside_the_data(rows: Dataset, tmp_path: Path, streaming: bool) -> None:
    source = str(lines(tmp_path / "data", rows))
    collate = Collator(build_processor())
    theirs = collate(list(rows))
    read = load_data(source, "train", 4, columns=NAMES, streaming=streaming)
    if not streaming:
        read = read.select(range(4))
    ours = collate(list(read))
    assert all(ours[name].equal(theirs[name][:4]) for name in ("pixel_values", "labels"))
    (tmp_path / "data" / "2.png").unlink()
    with pytest.raises(InputError, match=r"row 2 .*: No such file: neither 2\.png nor .*/data/2\.png\. Did you mean"):
        collate(list(read))


@pytest.mark.parametrize("line", ['{"photo": ["1.p', "[1, 2]", "3", '{"photo": NaN,}', "\xff"])
def test_a_damaged_line_is_named(rows: Dataset, tmp_path: Path, line: str) -> None:
    path = lines(tmp_path / "data", rows)
    whole = path.read_text().splitlines()
    path.write_bytes("\n".join([*whole[:3], line, "", *whole[4:]]).encode("latin-1"))
    with pytest.raises(InputError, match=r"rows\.jsonl', split 'train', cannot be read: .*rows\.jsonl, line 4: "):
        load_data(str(path), "train", columns=NAMES)
    stream = load_data(str(path), "train", columns=NAMES, streaming=True)
    said: list[str] = []
    read = RowStream(stream, Collator(build_processor()).checked, Broken(1, said.append))
    assert [row["completion"] for row in read] == [row["answer"] for number, row in enumerate(rows) if number != 3]
    assert len(said) == 1
    assert re.match(r"skipped: row 3 cannot be read: .*rows\.jsonl, line 4: ", said[0])


def test_lines_of_a_stream_need_not_all_have_every_column(rows: Dataset, tmp_path: Path) -> None:
    path = lines(tmp_path / "data", rows)
    path.write_text('{"photo": null, "prompt": "?", "reply": "1", "more": 2}\n' + path.read_text())
    for streaming in (False, True):
        read = list(load_data(str(path), "train", columns=NAMES, streaming=streaming))
        assert len(read) == len(rows) + 1
        assert read[0]["images"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_that_is_not_there(rows: Dataset, tmp_path: Path, monkeypatch: Any, streaming: bool) -> None:
    lines(tmp_path / "my_data", rows)
    monkeypatch.chdir(tmp_path)
    for typed, meant in {
        "my_data/row.jsonl": "my_data/rows.jsonl",
        "my_dat/rows.jsonl": "my_data",
        "my_dta": "my_data",
        str(tmp_path / "my_dta"): str(tmp_path / "my_data"),
    }.items():
        expected = rf"^data '{typed}', split 'train', cannot be read: no such file or folder. Did you mean {meant}\?"
        with pytest.raises(InputError, match=expected):
            load_data(typed, "train", streaming=streaming)
