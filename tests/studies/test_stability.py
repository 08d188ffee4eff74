"""The skippable set is followed through fine-tuning."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipit.router.checkpoint import load_dense
from skipit.router.errors import InputError
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile, profile
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset
from skipit.train.run import train
from studies.stability import FILE, Stability, drift, main


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any, list[Any], Profile]:
    model, processor = load_dense(str(WEIGHTS))
    few = list(batches(reference_dataset("calibration", 4, 0), Collator(processor), 4))
    return model, processor, few, profile(model, few, draws=1)


def test_a_run_records_how_the_set_moved(reference: tuple[Any, Any, list[Any], Profile], tmp_path: Path) -> None:
    model, processor, few, measured = reference
    config = TrainConfig(budget=0.5, steps=3, batch_size=2, accumulation=1)
    follow = Stability(few, tmp_path, every=2, draws=1)
    rows = reference_dataset("train", 8, 0)
    train(model, processor, rows, make_plan(measured, 0.5), config, tmp_path / "run", callbacks=[follow])
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines == follow.history
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[0]["jaccard"] == 1
    assert lines[0]["spearman_all"] == pytest.approx(1)
    assert lines[1]["spearman_all"] > 0.5
    assert lines[1]["skipped"] > 0


def _with_damage(profile: Profile, unit: torch.Tensor) -> Profile:
    retain = replace(profile.damage["retain"], unit=unit)
    return replace(profile, damage={**profile.damage, "retain": retain})


def test_drift_of_a_profile_from_itself_and_from_its_opposite(reference: tuple[Any, Any, list[Any], Profile]) -> None:
    start = reference[-1]
    same = drift(start, start, 0.5)
    assert (same["jaccard"], same["entered"], same["left"], same["spearman_vision"]) == (1.0, [], [], 1.0)
    turned = _with_damage(start, 1 / (start.damage["retain"].unit + 1e-9))
    opposite = drift(start, turned, 0.5)
    assert opposite["jaccard"] < 0.5
    assert opposite["entered"]
    assert opposite["left"]
    assert opposite["spearman_all"] == pytest.approx(-1)


def test_drift_without_a_modality_has_no_correlation(reference: tuple[Any, Any, list[Any], Profile]) -> None:
    start = reference[-1]
    damage = start.damage["retain"].unit.clone()
    damage[:, 1] = torch.nan
    assert drift(start, _with_damage(start, damage), 0.5)["spearman_vision"] is None


@pytest.mark.parametrize(("batches", "every"), [([], 1), ([{}], 0)])
def test_refused(batches: list[Any], every: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least 1 of each"):
        Stability(batches, tmp_path, every)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "2", "--every", "1", "--calibration", "4", "--profiled", "4", "--out", str(tmp_path)]
    main(arguments)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [
        "seed 0:",
        "| step | skipped units | Jaccard with step 0 | Spearman of damages: text | vision | all |",
    ]
    assert [line.split(" | ")[0] for line in shown[3:]] == ["| 1", "| 2"]
    assert " of 24 | " in shown[3]
    main(arguments)
    assert capsys.readouterr().out.splitlines() == shown
    assert len(list((tmp_path / "cells").iterdir())) == 1
