"""Studies that have no test of their own run from their command to their last line, on tiny settings."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skipit.eval.claims.prediction import SCOPES, rank_correlation
from skipit.train.reference.questions import KINDS
from studies import prediction, pretrain, profile_cost, reference
from studies.pretrain import training
from studies.shapes import bench_small, labelled


def test_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "1", "--samples", "4", "--calibration", "4", "--profiled", "4"]
    reference.main([*sizes, "--budgets", "0.5", "--kv", "evict", "--out", str(tmp_path / "out.json")])
    assert "of the decoder's FLOPs" in capsys.readouterr().out.splitlines()[-1]
    assert set(json.loads((tmp_path / "out.json").read_text())["results"]) >= {"dense", "evict 0.5"}


def test_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "LC_ROWS", 2)
    monkeypatch.setattr(prediction, "KINDS", ("retain",))
    some = rank_correlation([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.3])  # intervals are resampled, which takes long
    monkeypatch.setattr(prediction, "by_scope", lambda *_: dict.fromkeys(SCOPES, some))
    prediction.main(["--samples", "2", "--set-samples", "1", "--pairs", "2", "--draws", "1", "--out", str(tmp_path)])
    assert "growing sets" in capsys.readouterr().out
    assert (tmp_path / "damage_retain.png").stat().st_size > 1000
    found = json.loads((tmp_path / "prediction.json").read_text())["results"]["retain"]
    assert set(found) == {"truth", "predicted", "spearman", "sets"}
    assert set(found["truth"]) == {"same rows", "new rows"}


def test_profile_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> tuple[Any, list[Any]]:
        return bench_small(hidden=64, layers=2, image_tokens=4), [labelled(4, 12, 2, answer=2)]

    monkeypatch.setattr(profile_cost, "CASES", {"tiny": tiny})
    monkeypatch.setattr(profile_cost, "peak", profile_cost.peak_here)
    profile_cost.main(["--repeats", "1", "--out", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.splitlines()[1].startswith("tiny ")
    found = json.loads((tmp_path / "out.json").read_text())["results"]["tiny"]
    assert found["per_row"] > 0
    assert found["dense_mb"] >= 0


def test_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(pretrain.PretrainConfig(), tower_steps=1, tower_batch=2, batch=2, warmup=1, checkpoint_every=5)
    monkeypatch.setattr(pretrain, "PretrainConfig", type("Few", (), {"steps": 1, "__new__": lambda cls: few}))
    monkeypatch.setattr(pretrain, "pretrain", partial(pretrain.pretrain, compile_decoder=False))
    monkeypatch.setattr(pretrain, "layer_dropping", lambda model: {"1": dict.fromkeys(KINDS, 0.5)})
    monkeypatch.setattr(pretrain, "IMAGES", 32)
    monkeypatch.setattr(training, "exact_match", partial(training.exact_match, images=32))
    pretrain.main(["--steps", "1", "--out", str(tmp_path / "run"), "--weights", str(tmp_path / "weights")])
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| layers dropped | cell |" in card
    assert "| 1 | 50.0% |" in card
    assert (tmp_path / "weights" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["step"] == 1
