"""What the documents model says is scored by kind."""

import json
from pathlib import Path

import pytest
from tiny_decoder import tiny_documents_model

from studies import reading


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reading, "load_model", lambda source: tiny_documents_model())
    out = tmp_path / "made" / "reading.json"
    reading.main(["--samples", "9", "--batch-size", "4", "--max-new-tokens", "2", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows[:3]] == ["lookup", "copy", "compare"]
    last = capsys.readouterr().out.splitlines()[-1].split("|")
    assert last[1:3] == [" all ", " 9 "]
    assert last[4].strip() == f"{sum(row['anls'] for row in rows) / 9:.1%}"


def test_an_interval_holds_the_mean_and_is_a_point_where_all_are_equal() -> None:
    import numpy as np

    low, high = reading.interval(np.array([0.0, 1.0] * 20))
    assert 0.3 < low < 0.5 < high < 0.7
    assert reading.interval(np.ones(5)) == (1.0, 1.0)
