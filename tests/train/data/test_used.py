"""Whether rows are held out, told by what a checkpoint recorded of the rows it was made from."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from skipit.train.data import used
from skipit.train.data.rows import Row, Rows
from skipit.train.data.used import RECORD, HeldOut, Noted, also_used, fingerprint_of, fingerprints, held_out
from skipit.train.reference.data import reference_dataset


def row(number: int, **changes: Any) -> Row:
    return Row({"images": [Image.new("RGB", (4, 4), (number, 0, 0))], "prompt": "what?", **changes}, f"row {number}")


def test_a_row_is_the_same_however_it_comes(tmp_path: Path) -> None:
    given = row(1, completion="red")
    (picture,) = given["images"]
    picture.save(tmp_path / "one.png")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    forms = [
        given,
        row(1, answer="red"),
        row(1, images=[str(tmp_path / "one.png")]),
        row(1, images=[{"bytes": (tmp_path / "one.png").read_bytes(), "path": None}]),
        row(1, prompt=[{"role": "user", "content": parts}]),
        Row(Dataset.from_list([{"images": [picture], "prompt": "what?"}])[0], "a data set"),
    ]
    assert len({fingerprint_of(form, form.where) for form in forms}) == 1
    others = [row(2), row(1, prompt="who?"), row(1, images=[]), row(1, images=[picture, picture])]
    others.append(row(1, images=[picture.resize((8, 2))]))
    assert len({fingerprint_of(form, form.where) for form in (given, *others)}) == 6


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "not known whether held out: there is no record of the rows that were trained on"),
        (
            {RECORD: {"trained": None}},
            "not known whether held out: there is no record of the rows that were trained on",
        ),
        ({RECORD: {"trained": "not base64!"}}, "not known whether held out: there is no record of the rows that were"),
        ({RECORD: {"trained": fingerprints([row(7)])}}, "held out: none of 3 rows was trained on"),
        ({RECORD: {"trained": fingerprints([row(1), row(2)])}}, "not held out: 2 of 3 rows were trained on"),
        (
            {RECORD: {"profiled": fingerprints([row(0)]), "trained": fingerprints([row(1), row(9)])}},
            "not held out: 1 of 3 rows were profiled, 1 of 3 rows were trained on",
        ),
        (
            {RECORD: {"profiled": None, "trained": fingerprints([row(9)])}},
            "not known whether held out: there is no record of the rows that were profiled",
        ),
    ],
)
def test_what_is_known_is_said(record: dict[str, Any], said: str) -> None:
    known, which = held_out(record, [row(number) for number in range(3)])
    assert said in known.sentence()
    assert known.known == said.startswith("held out")
    assert sum(which) <= 2
    assert HeldOut(**known.to_json()) == known


def test_rows_that_pass_are_noted_once_and_outlive_a_kill(tmp_path: Path) -> None:
    (tmp_path / "rows-0").write_bytes(b"")
    for _ in range(2):  # the second goes on where the first was killed
        noted = Noted(tmp_path / "rows-0")
        assert len(list(Rows([row(1), row(2), row(1)], noted.noting(lambda row: row)))) == 3
    held = used.pack((tmp_path / "rows-0").read_bytes() + b"tor")  # the last write was torn
    assert held == fingerprints([row(1), row(2)]) == noted.packed()


def test_too_many_rows_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(used, "MOST", 1)
    assert fingerprints([row(1), row(2)]) is None
    assert also_used({RECORD: {"trained": None}}, "trained", fingerprints([row(1)])) == {"trained": None}


def test_splits_of_the_reference_are_told_apart() -> None:
    record = {RECORD: {"trained": fingerprints(Rows(reference_dataset("train", 20)))}}
    assert held_out(record, Rows(reference_dataset("test", 20)))[0].known
    assert held_out(record, Rows(reference_dataset("train", 10)))[0].used == {"trained": 10}
