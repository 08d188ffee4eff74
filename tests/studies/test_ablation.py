"""Initializations are compared at the same steps, budgets and seeds."""

import json
from pathlib import Path

import pytest

from studies.ablation import main, table


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "1", "--samples", "4", "--calibration", "4", "--profiled", "4"]
    arguments = [*sizes, "--budgets", "0.5", "--inits", "theory", "--seeds", "0", "--out", str(tmp_path)]
    main(arguments)
    shown = capsys.readouterr().out.splitlines()[-2:]  # deepspeed, where it is first imported here, speaks before
    assert shown[0].split() == ["budget", "init", "seeds", "0", "steps", "1", "steps"]
    assert shown[1].split()[:3] == ["0.5", "theory", "1"]
    (file,) = (tmp_path / "cells").iterdir()
    cell = json.loads(file.read_text())
    assert (cell["init"], cell["kv"], cell["budget"], cell["steps"], cell["samples"]) == ("theory", "retain", 0.5, 1, 4)
    assert list(cell["at"]) == ["0", "1"]
    assert cell["at"]["0"]["share"] == pytest.approx(0.5, abs=0.05)
    main(arguments)
    assert capsys.readouterr().out.splitlines() == shown


def test_the_table_has_means_relative_to_dense() -> None:
    cells = [
        {"budget": 0.5, "init": "theory", "dense": 0.8, "at": {"0": {"accuracy": right}, "20": {"accuracy": 0.8}}}
        for right in (0.8, 0.4)
    ]
    cells.append({"budget": 0.5, "init": "zero", "dense": 1.0, "at": {"0": {"accuracy": 0.5}}})
    lines = table(cells).splitlines()
    assert lines[0].split() == ["budget", "init", "seeds", "0", "steps", "20", "steps"]
    assert lines[1].split() == ["0.5", "zero", "1", "50.0%", "±", "nan%"]
    assert lines[2].split() == ["0.5", "theory", "2", "75.0%", "±35.4%", "100.0%", "±", "0.0%"]
