"""Both kinds of budget are measured on the same rows, and one per input is spent by each."""

import json
from pathlib import Path

import pytest

from studies.per_input import main


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "1", "--samples", "6", "--calibration", "6", "--profiled", "16"]
    main([*sizes, "--budgets", "0.5", "--kv", "evict", "--seeds", "0", "--out", str(tmp_path)])
    (cell,) = map(json.loads, (path.read_text() for path in (tmp_path / "cells").iterdir()))
    assert list(cell["after"]) == ["0", "1"]
    for found in cell["after"].values():
        assert len(found["input"]["prompt"]) == len(found["data"]["prompt"]) == 6
        assert all(0.495 < share <= 0.5 for share in found["input"]["prompt"])
        assert max(found["data"]["prompt"]) - min(found["data"]["prompt"]) > 0.001
        assert min(found["input"]["whole"]) > 0.5  # most text runs most layers
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split("|")[1:5] for line in lines][1] == [" evict ", " 50% ", " 0 ", " input "]
