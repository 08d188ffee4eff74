"""Rows that cannot be read are named, counted and left out up to a limit; streams are trained on as they come."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from shallow import shallow_reference
from transformers import TrainerCallback

from skipit.router import InputError
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, tried
from skipit.train.data.rows import DAMAGE, Broken, Check, Rows, RowStream, numbered, readable, training_rows
from skipit.train.reference.data import reference_dataset
from skipit.train.run import train
from studies.architecture import build_processor

LAYERS = 2


@pytest.fixture(scope="module")
def check() -> Check:
    return Collator(build_processor()).checked


@pytest.fixture
def rows() -> Dataset:
    """Six rows; the picture of the third and the prompt of the fifth are broken."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, format="png")
    values = [
        {
            "images": [{"bytes": b"no picture" if number == 2 else buffer.getvalue(), "path": None}],
            "prompt": "an <image> ?" if number == 4 else "read the top row .",
            "completion": str(number),
        }
        for number in range(6)
    ]
    return Dataset.from_list(values, features=None)


def completions(rows: Any) -> list[str]:
    return [row["completion"] for row in rows]


class TestRows:
    def test_the_next_good_row_stands_in(self, rows: Dataset, check: Check) -> None:
        said: list[str] = []
        broken = Broken(2, said.append)
        read = Rows(rows, check, broken)
        assert len(read) == 6
        assert completions(read) == ["0", "1", "3", "3", "5", "5"]
        assert completions(read) == ["0", "1", "3", "3", "5", "5"]
        assert broken.count == 2
        assert len(said) == 2, "each is named once"
        assert said[0].startswith("skipped: row 2: image 0 cannot be read: cannot identify image file")
        assert said[1].startswith("skipped: row 4: 2 image tokens, 1 images.")

    def test_the_last_row_is_followed_by_the_first(self, rows: Dataset, check: Check) -> None:
        assert completions([Rows(rows.select([0, 2]), check, Broken(1))[1]]) == ["0"]

    def test_one_too_many(self, rows: Dataset, check: Check) -> None:
        message = r"more than 1 rows cannot be read \(`max_broken_rows`\); the last: row 4: 2 image tokens, 1 images"
        with pytest.raises(InputError, match=message):
            list(Rows(rows, check, Broken(1)))

    def test_none_is_allowed_unasked(self, rows: Dataset, check: Check) -> None:
        with pytest.raises(InputError, match=r"^row 2: image 0 cannot be read"):
            list(Rows(rows, check))

    def test_no_good_row(self, rows: Dataset, check: Check) -> None:
        with pytest.raises(InputError, match="no row of the data can be read"):
            Rows(rows.select([2, 4]), check, Broken(9))[0]


class TestStream:
    def test_broken_rows_are_left_out(self, rows: Dataset, check: Check) -> None:
        broken = Broken(2)
        stream = training_rows(rows.to_iterable_dataset(), check, broken)
        assert isinstance(stream, RowStream)
        assert completions(stream) == completions(stream) == ["0", "1", "3", "5"]
        assert broken.count == 2

    def test_a_shuffle_moves_a_row_and_does_not_make_it_another(self, rows: Dataset, check: Check) -> None:
        said: list[str] = []
        broken = Broken(2, said.append)
        stream = RowStream(rows.to_iterable_dataset().shuffle(seed=0, buffer_size=6), check, broken)
        orders = []
        for epoch in range(4):
            stream.set_epoch(epoch)
            orders.append(completions(stream))
        assert len(set(map(tuple, orders))) > 1
        assert broken.count == len(said) == 2

    def test_a_picture_that_cannot_be_decoded_does_not_end_it(self, check: Check) -> None:
        whole = reference_dataset("train", 3)
        values = whole.with_format("arrow")[:].to_pylist()
        values[1]["images"][0]["bytes"] = b"no picture"
        stream = Dataset.from_list(values, features=whole.features).to_iterable_dataset()
        assert completions(RowStream(stream, check, Broken(1))) == [whole[0]["completion"], whole[2]["completion"]]

    def test_one_too_many(self, rows: Dataset, check: Check) -> None:
        with pytest.raises(InputError, match=r"more than 1 rows cannot be read .*; the last: row 4"):
            list(RowStream(rows.to_iterable_dataset(), check, Broken(1)))


class TestReadable:
    """Rows that are not trained on: a broken one is left out, and no other counts twice."""

    @pytest.mark.parametrize("streaming", [False, True])
    def test_broken_rows_are_left_out(self, rows: Dataset, streaming: bool) -> None:
        said: list[str] = []
        check = tried(Collator(build_processor()))
        for data in [rows.to_iterable_dataset()] if streaming else [rows, list(rows)]:
            said.clear()
            found = readable(data, check, Broken(2, said.append), "held-out row")
            assert completions(found) == ["0", "1", "3", "5"]
            assert [text.partition(": ")[2][:14] for text in said] == ["held-out row 2", "held-out row 4"]
            with pytest.raises(InputError, match=r"more than 1 rows cannot be read .*; the last: held-out row 4: 2"):
                list(readable(data, check, Broken(1), "held-out row"))

    def test_all_good_rows_are_the_data_itself(self, rows: Dataset) -> None:
        good = rows.select([0, 1])
        assert readable(good, tried(Collator(build_processor())), Broken()) is good

    def test_no_good_row(self, rows: Dataset, check: Check) -> None:
        with pytest.raises(InputError, match="no held-out row of the data can be read"):
            readable(rows.select([2, 4]), check, Broken(9), "held-out row")

    def test_what_only_a_processor_refuses_is_found_too(self) -> None:
        def narrow(rows: Any) -> None:
            if rows[0]["images"][0].width < 4:
                raise InputError(f"{rows[0].where}: the processor cannot take it")

        data = [{"images": [Image.new("RGB", (width, 9))]} for width in (9, 1, 8)]
        assert len(readable(data, tried(narrow), Broken(1))) == 2


def test_a_row_that_stands_for_damage(check: Check) -> None:
    lines = [{"images": [], "prompt": "read it .", "completion": "1"}, {DAMAGE: "a.jsonl, line 2: cut"}]
    with pytest.raises(InputError, match=r"^row 1 cannot be read: a\.jsonl, line 2: cut"):
        list(RowStream(lines, check, Broken()))
    assert len(list(RowStream(lines, check, Broken(1)))) == 1


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("image", "question", "answer"), "images=image,prompt=question,completion=answer"),
        (("photo", "query", "caption"), "images=photo,prompt=query,completion=caption"),
        (("Image", "promt", "compltion"), "images=Image,prompt=promt,completion=compltion"),
        (("images", "question", "completion"), "prompt=question"),
        (("x", "y", "z"), ""),
    ],
)
def test_columns_by_other_names_are_guessed(check: Check, columns: tuple[str, ...], hint: str) -> None:
    (row,) = numbered([dict.fromkeys(columns, "1")])
    with pytest.raises(InputError, match=r"^row 0: no column .*; found: .*vision format") as found:
        check(row)
    assert str(found.value).endswith(f" If they have other names: --columns {hint}" if hint else "for completion.")


@pytest.fixture(scope="module")
def model() -> Any:
    return shallow_reference(LAYERS)


def run(model: Any, data: Any, out: Path, callbacks: Any = None, **options: Any) -> list[dict[str, float]]:
    """Train on some rows; the history."""
    units, width = (LAYERS, 2), model.config.text_config.hidden_size
    plan = Plan(
        torch.zeros(*units, width), torch.zeros(units), 0.5, "retain", "zero", fingerprint(model), torch.ones(units)
    )
    settings = {"steps": 4, "batch_size": 2, "lora_rank": 2, "learning_rate": 1e-3, "save_steps": 1}
    more = {name: options.pop(name) for name in ("resume", "note") if name in options}
    config = TrainConfig(**{**settings, **options})
    train(copy.deepcopy(model), build_processor(), data, plan, config, out, callbacks=callbacks, **more)
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_counts_the_rows_it_left_out(model: Any, rows: Dataset, tmp_path: Path, streaming: bool) -> None:
    said: list[str] = []
    data = rows.to_iterable_dataset() if streaming else rows
    assert len(run(model, data, tmp_path / "run", max_broken_rows=2, note=said.append)) == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["skipped_rows"] == len(said) == 2
    with pytest.raises(InputError, match=r"more than 1 rows cannot be read \(`max_broken_rows`\)"):
        run(model, data, tmp_path / "other", max_broken_rows=1)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_stream_begins_again_and_is_resumed_where_it_was(model: Any, tmp_path: Path) -> None:
    """Five rows, twelve are needed: a stopped run goes on in the middle of the second round, bit for bit."""
    stream = reference_dataset("train", 5).to_iterable_dataset()
    whole = run(model, stream, tmp_path / "whole", steps=6)
    assert len(whole) == 6
    with pytest.raises(KeyboardInterrupt):
        run(model, stream, tmp_path / "stopped", callbacks=[Stop()], steps=6)
    assert run(model, stream, tmp_path / "stopped", steps=6, resume=True) == whole
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
