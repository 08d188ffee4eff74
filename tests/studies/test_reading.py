"""What the documents model says is scored by kind."""

import json
from pathlib import Path

import pytest
from tiny_decoder import tiny_documents_model

from skipit.router import attach, running
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


def test_gates_of_a_run_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_documents_model()
    attach(model)
    monkeypatch.setattr(reading, "merge_run", lambda run: (model, processor))
    budgets = []
    monkeypatch.setattr(reading, "running", lambda budget: budgets.append(budget) or running(mode="gathered"))
    out = tmp_path / "reading.json"
    told = ["--run", "a-run", "--budget", "0.25"]
    reading.main([*told, "--samples", "2", "--batch-size", "2", "--max-new-tokens", "2", "--out", str(out)])
    made = json.loads(out.read_text())
    assert (budgets, made["settings"]["run"], len(made["rows"])) == ([0.25], "a-run", 2)


def test_a_budget_of_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reading.main(["--budget", "0.25"])
    assert "--budget is one of a run's: give its folder, too (--run)." in capsys.readouterr().err


def test_an_interval_holds_the_mean_and_is_a_point_where_all_are_equal() -> None:
    import numpy as np

    low, high = reading.interval(np.array([0.0, 1.0] * 20))
    assert 0.3 < low < 0.5 < high < 0.7
    assert reading.interval(np.ones(5)) == (1.0, 1.0)
