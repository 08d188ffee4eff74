"""The budget experiment measures what it says on rows of its own, and goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipit import __version__
from skipit.train.config import TrainConfig
from studies import budget
from studies.budget import main, one_cell, summary, table
from studies.study import Study


def cell(seed: int, measured: float, asked: float = 0.5) -> dict[str, Any]:
    shared = {"kv": "evict", "granularity": "token", "budget": asked, "calibrated": asked + 0.001}
    return {**shared, "seed": seed, "measured": measured}


def test_table_and_summary() -> None:
    cells = [cell(1, 0.512), cell(0, 0.493), cell(0, 0.3, asked=0.3)]
    assert table(cells).splitlines()[2:] == [
        "| evict | token | 50% | 49.30%, 51.20% | 1.20 |",
        "| evict | token | 30% | 30.00% | 0.00 |",
    ]
    assert summary(cells) == (
        "2 of 3 runs are within 1 point of their budget on test rows; off by 0.63 points on average, 1.20 at most "
        "(0.10 on calibration rows)."
    )


def test_what_is_finished_is_measured_again_only_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trained: list[tuple[float, int, int, int]] = []

    def measure(study: Study, config: TrainConfig) -> dict[str, Any]:
        trained.append((config.budget, config.seed, config.steps, study.samples))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return cell(config.seed, config.budget + config.steps / 1e4, config.budget)

    monkeypatch.setattr(budget, "one_cell", measure)
    line = ["--budgets", "0.5", "--kv", "evict", "--granularity", "token", "--seeds", "0", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(line)
    main(line)
    assert trained == [(0.5, 0, 40, 384), (0.5, 1, 40, 384), (0.5, 1, 40, 384)]
    assert "2 of 2 runs are within 1 point" in capsys.readouterr().out
    (file,) = (tmp_path / "cells").glob("evict-token-0.5-1_*.json")
    record = json.loads(file.read_text())
    assert (record["steps"], record["samples"], record["skipit"]) == (40, 384, __version__)
    assert record["made_by"]["versions"]["torch"]
    main([*line, "--steps", "20"])
    assert trained[3:] == [(0.5, 0, 20, 384), (0.5, 1, 20, 384)]
    assert "| evict | token | 50% | 50.20%, 50.20% | 0.20 |" in capsys.readouterr().out
    main([*line, "--samples", "100"])
    assert trained[5:] == [(0.5, 0, 40, 100), (0.5, 1, 40, 100)]
    main([*line, "--steps", "20"])
    assert len(trained) == 7
    assert "| evict | token | 50% | 50.20%, 50.20% | 0.20 |" in capsys.readouterr().out


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_cell(granularity: Any) -> None:
    study = Study(steps=2, batch_size=4, profiled=16, calibration=16, samples=16)
    found = one_cell(study, study.config(0.5, "evict", granularity=granularity))
    assert found["config"]["steps"] == 2
    assert found["calibrated"] == pytest.approx(0.5, abs=0.05)
    assert found["measured"] == pytest.approx(0.5, abs=0.1)
    assert found["measured"] != found["calibrated"]
