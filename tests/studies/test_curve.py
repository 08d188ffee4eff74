"""One checkpoint at every budget: the command at its smallest, and the table."""

from pathlib import Path

import pytest

from skipit.router.folders import load_json
from studies.curve import main, table

SMALLEST = [
    *("--budgets", "0.5", "0.3", "--at", "0.4", "1", "--seeds", "0"),
    *("--steps", "2", "--samples", "8", "--calibration", "8", "--profiled", "8"),
]


def test_one_checkpoint_answers_at_budgets_between_those_it_was_trained_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--out", str(tmp_path), *SMALLEST])
    table_of = capsys.readouterr().out
    cells = [load_json(path) for path in sorted((tmp_path / "cells").iterdir())]
    assert sorted(len(cell["trained_for"]) for cell in cells) == [1, 1, 2]
    (every,) = (cell for cell in cells if len(cell["trained_for"]) == 2)
    assert list(every["points"]) == ["0.3", "0.4", "0.5", "1"]
    shares = [point["share"] for point in every["points"].values()]
    assert shares == sorted(shares)
    assert all(abs(point["share"] - float(budget)) < 0.1 for budget, point in every["points"].items())
    assert "| 40% |" in table_of
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    main(["--out", str(tmp_path), *SMALLEST])  # nothing is measured twice
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}


def test_the_table_has_a_column_for_each_training_and_the_spread_over_seeds() -> None:
    def cell(trained_for: list[float], points: dict[str, float]) -> dict[str, object]:
        figures = {budget: {"accuracy": accuracy, "share": 0.5} for budget, accuracy in points.items()}
        return {"kv": "retain", "trained_for": trained_for, "dense": 0.5, "points": figures}

    first, second = cell([0.5, 0.25], {"0.25": 0.4, "0.5": 0.5}), cell([0.5, 0.25], {"0.25": 0.3, "0.5": 0.5})
    lines = table([first, second, cell([0.5], {"0.5": 0.45})]).splitlines()
    assert lines[0] == "| budget | retain, trained for 50%, 25% | retain, trained for 50% |"
    assert lines[2:] == ["| 25% | 70.0 ± 14.1 | |", "| 50% | 100.0 ± 0.0 | 90.0 |"]
