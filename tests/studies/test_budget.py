"""The budget experiment measures what it says on rows of its own, and goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipit.train.config import TrainConfig
from studies import budget as bench_budget
from studies.budget import main, one_cell, profile_of, summary, table


def cell(seed: int, measured: float, budget: float = 0.5) -> dict[str, Any]:
    shared = {"kv": "evict", "granularity": "token", "budget": budget, "calibrated": budget + 0.001}
    return {**shared, "seed": seed, "measured": measured}


def test_table_and_summary() -> None:
    cells = [cell(1, 0.512), cell(0, 0.493), cell(0, 0.3, budget=0.3)]
    assert table(cells).splitlines()[2:] == [
        "| evict | token | 50% | 49.30%, 51.20% | 1.20 |",
        "| evict | token | 30% | 30.00% | 0.00 |",
    ]
    assert summary(cells) == (
        "2 of 3 runs are within 1 point of their budget on test rows; off by 0.63 points on average, 1.20 at most "
        "(0.10 on calibration rows)."
    )


def test_finished_cells_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    trained: list[tuple[float, int]] = []

    def measure(measured: Any, config: TrainConfig, held: int, test: int) -> dict[str, Any]:
        trained.append((config.budget, config.seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return cell(config.seed, config.budget, config.budget)

    monkeypatch.setattr(bench_budget, "profile_of", lambda *_: None)
    monkeypatch.setattr(bench_budget, "one_cell", measure)
    line = "bench_budget --budgets 0.5 --kv evict --granularity token --seeds 0 1 --out"
    monkeypatch.setattr("sys.argv", [*line.split(), str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        main()
    main()
    assert trained == [(0.5, 0), (0.5, 1), (0.5, 1)]
    assert "2 of 2 runs are within 1 point" in capsys.readouterr().out
    record = json.loads((tmp_path / "evict-token-0.5-1.json").read_text())
    assert record["config"]["steps"] == 40
    assert record["made_by"]["versions"]["torch"]


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_cell(tmp_path: Path, granularity: Any) -> None:
    profile = profile_of(0, tmp_path, 16)
    assert profile_of(0, tmp_path, 0).model == profile.model, "kept, not measured again"
    config = TrainConfig(kv="evict", granularity=granularity, steps=2, batch_size=4)
    found = one_cell(profile, config, held=16, test=16)
    assert found["calibrated"] == pytest.approx(0.5, abs=0.05)
    assert found["measured"] == pytest.approx(0.5, abs=0.1)
    assert found["measured"] != found["calibrated"]
