"""Summaries of baselines and of transfer are read as they are, and what is not one is refused by file and key."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipit.eval.report.sweeps import load_baselines, load_transfer
from skipit.router.errors import CheckpointError, InputError

ENTRY = {
    "system": "bi",
    "budget": 0.5,
    "trained": False,
    "runs": 1,
    "seeds": 1,
    "floor": None,
    "failed": 0,
    "accuracy": 0.9,
    "spread": None,
    "compute": 0.5,
    "same_answer": 0.9,
    "prefill_ms": None,
    "prefill_speed_up": None,
}
UNREACHED = {"system": "vtw", "budget": 0.1, "trained": False, "runs": 0, "seeds": 0, "floor": 0.3, "failed": 0}
FIGURES = {"types": {"cell": {"dense": {"accuracy": 1.0, "same": 1.0, "compute": 1.0}}}, "shifts": {}}


def written(folder: Path, values: Any) -> Path:
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def test_baselines(tmp_path: Path) -> None:
    found = load_baselines(written(tmp_path, {"entries": [ENTRY, UNREACHED], "made_by": {"command": "x"}}))
    assert found == {"entries": [ENTRY, UNREACHED], "made_by": {"command": "x"}}


def test_what_the_sweep_writes_is_read(tmp_path: Path) -> None:
    from studies.peers import summary

    cell = {"method": "bi", "budget": 0.5, "seed": 0, "dense": 1.0, "results": {"bi": [dict.fromkeys(ENTRY, 0.5)]}}
    late = {"method": "vtw", "budget": 0.5, "seed": 0, "dense": 1.0, "results": {}, "floor": 0.7}
    written(tmp_path, {"entries": summary([cell, late])})
    assert [entry["system"] for entry in load_baselines(tmp_path)["entries"]] == ["bi", "vtw"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"figures": {}},
            "no `entries`; found: figures. Give a folder that `scripts/study peers --out DIR`",
        ),
        ({"entries": 3}, "`entries`: got no list of objects"),
        ({"entries": [ENTRY, {"system": "bi"}]}, "entry 1 has no budget, trained, runs, seeds, floor, failed"),
        ({"entries": [{k: v for k, v in ENTRY.items() if k != "compute"}]}, "entry 0 has no compute"),
        ({"entries": [{**ENTRY, "accuracy": "x"}]}, "entry 0: `accuracy`: got 'x', expected a number"),
        ({"entries": [{**ENTRY, "system": 1}]}, "entry 0: `system`: got 1, expected a name"),
        ({"entries": [{**ENTRY, "trained": 1}]}, "entry 0: `trained`: got 1, expected true or false"),
    ],
)
def test_other_baselines_are_refused(tmp_path: Path, values: Any, says: str) -> None:
    with pytest.raises((InputError, CheckpointError)) as error:
        load_baselines(written(tmp_path, values))
    assert says in str(error.value)
    assert str(tmp_path / "summary.json") in str(error.value)


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no summary.json. Give a folder that `scripts/study peers --out DIR`"):
        load_baselines(tmp_path)
    with pytest.raises(InputError, match=r"no summary.json. Give a folder that `scripts/study transfer --out DIR`"):
        load_transfer(tmp_path)


def test_transfer(tmp_path: Path) -> None:
    found = load_transfer(written(tmp_path, {"figures": FIGURES, "kinds": ["cell"]}))
    assert found == {"figures": FIGURES, "kinds": ["cell"], "made_by": {}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"entries": []},
            "no `figures`; found: entries. Give a folder that `scripts/study transfer --out DIR`",
        ),
        ({"figures": FIGURES}, "expected `figures`, an object, and `kinds`, a list of names"),
        ({"figures": {"types": {"cell": {}}}, "kinds": []}, "types 'cell' has no figures of the dense model"),
        ({"figures": {"shifts": {"a": {"dense": {}}}}, "kinds": []}, "shifts 'a', 'dense': no number 'accuracy'"),
    ],
)
def test_other_studies_are_refused(tmp_path: Path, values: Any, says: str) -> None:
    with pytest.raises((InputError, CheckpointError)) as error:
        load_transfer(written(tmp_path, values))
    assert says in str(error.value)


def cell(system: str, seed: int, right: list[bool]) -> dict[str, Any]:
    return {"system": system, "seed": seed, "results": {"types": {"cell": {"right": right}}, "shifts": {}}}


def test_rows_of_transfer_give_paired_differences(tmp_path: Path) -> None:
    figures = {"types": {"cell": {**FIGURES["types"]["cell"], "ours": {"accuracy": 0.5, "same": 0.5, "compute": 0.5}}}}
    written(tmp_path, {"figures": {**figures, "shifts": {}}, "kinds": []})
    (tmp_path / "cells").mkdir()
    for name, values in (
        ("dense_0", cell("dense", 0, [True, True])),
        ("dense_1", cell("dense", 1, [True, False])),
        ("ours_0", cell("ours", 0, [True, False])),
        ("ours_1", cell("ours", 1, [False, True])),
        ("ours_2", cell("ours", 2, [False, False])),  # of a seed without a dense model
    ):
        (tmp_path / "cells" / f"{name}.json").write_text(json.dumps(values))
    found = load_transfer(tmp_path)["figures"]["types"]["cell"]
    assert "difference" not in found["dense"]
    told = found["ours"]["difference"]
    assert (told["lost"], told["gained"], told["rows"]) == (2, 1, 4)
    (tmp_path / "cells" / "ours_3.json").write_text('{"system": "ours"}')
    with pytest.raises(CheckpointError, match=r"cells: not what `scripts/study transfer` writes \(KeyError: 'seed'\)"):
        load_transfer(tmp_path)
