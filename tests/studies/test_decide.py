"""Decision points are compared at equal budgets, and one point meets the states that its gates were fitted on."""

import json
from pathlib import Path

import pytest

from studies.decide import main, predictions


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "1", "--samples", "4", "--calibration", "4", "--profiled", "16"]
    arguments = [*sizes, "--budgets", "0.3", "--decide", "each", "0", "--kv", "retain", "--seeds", "0"]
    main([*arguments, "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "    0.3 each " in shown
    cells = {cell["decide"]: cell for cell in map(json.loads, (p.read_text() for p in (tmp_path / "cells").iterdir()))}
    assert cells["0"]["decide_at"] == [0]
    assert cells["each"]["decide_at"] is None
    for cell in cells.values():
        assert list(cell["at"]) == ["0", "1"]
        assert cell["at"]["0"]["share"] == pytest.approx(0.3, abs=0.05)
    once, each = (cells[name]["r2"] for name in ("0", "each"))
    assert once["skips"] == pytest.approx(once["dense"], abs=1e-5)  # nothing was skipped before
    assert each["skips"]["vision"] != pytest.approx(each["dense"]["vision"], abs=1e-3)
    main([*arguments, "--out", str(tmp_path)])
    assert capsys.readouterr().out == shown[shown.index("retain:") :]  # an import may have said something before


def test_predictions_are_means_over_seeds() -> None:
    cells = [
        {"budget": 0.5, "decide": "0", "r2": {s: {"text": r2, "vision": 0.0} for s in ("dense", "skips")}}
        for r2 in (0.1, 0.3)
    ]
    assert predictions(cells).splitlines()[1].split() == ["0.5", "0", "0.200", "0.200", "0.000", "0.000"]
