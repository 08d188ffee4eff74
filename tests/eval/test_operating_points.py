"""Plans that run untrained, and `skipit calibrate`: what is stored, what is refused, what stays as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from skipit.cli.main import main
from skipit.eval.operating_points import certify_checkpoint, independent_rows, store_point
from skipit.router import InputError
from skipit.router.checkpoint import load, load_router, save_router
from skipit.router.errors import CheckpointError
from skipit.theory.artefact import save_plan
from skipit.theory.identity import fingerprint
from skipit.theory.plan import LOGIT_LIMIT, Plan
from skipit.train.reference.data import reference_dataset

LAYERS, WIDTH = 12, 128


def checkpoint(folder: Path, run: torch.Tensor) -> Path:
    """The reference model with constant gates, exported by the command line."""
    from skipit.train.data.sources import load_model

    model, _ = load_model("reference")
    bias = torch.where(run, LOGIT_LIMIT, -LOGIT_LIMIT)
    plan = Plan(torch.zeros(LAYERS, 2, WIDTH), bias, 0.5, "retain", "early-exit", fingerprint(model), run.float())
    save_plan(plan, folder / "plan")
    assert main(["export", str(folder / "plan"), "--model", "reference", "--out", str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def early_exit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision tokens leave after layer 6, which changes no answer; skipping all text as well changes all."""
    run = torch.ones(LAYERS, 2, dtype=torch.bool)
    run[6:, 1] = False
    return checkpoint(tmp_path_factory.mktemp("exit"), run)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text skips its first three layers: a router that no threshold can save."""
    run = torch.ones(LAYERS, 2, dtype=torch.bool)
    run[:3, 0] = False
    return checkpoint(tmp_path_factory.mktemp("blind"), run)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Held-out questions with one-word answers."""
    folder = tmp_path_factory.mktemp("rows") / "rows"
    reference_dataset("calibration", 56, kinds=["compare"]).save_to_disk(folder)
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RISK = ["--risk", "0.2", "--confidence", "0.9", "--max-new-tokens", "4"]


def test_a_certified_point_is_stored_with_its_record_and_runs(early_exit: Path, rows: str, capsys: Any) -> None:
    before = contents(early_exit)
    assert main(["calibrate", str(early_exit), rows, *RISK]) == 0
    said = capsys.readouterr().out
    assert "With confidence 0.9 at most 0.2 of new answers do" in said
    config, _ = load_router(early_exit)
    record = json.loads((early_exit / "certificates.json").read_text())["certified"]
    assert config.operating_points == {"certified": -LOGIT_LIMIT}
    assert config.threshold == 0.0  # the default stays what it was
    assert record["chosen"]["threshold"] == -LOGIT_LIMIT
    assert (record["risk"], record["confidence"], record["rows"]) == (0.2, 0.9, 24)
    assert record["chosen"]["disagreements"] == 0
    assert 0.6 < record["chosen"]["compute"] < 0.75
    assert record["made_by"]["versions"]["skipit"]
    after = contents(early_exit)
    assert {name for name in after if after[name] != before.get(name)} == {
        "router_config.json",
        "certificates.json",
        "provenance.json",  # the measured share
        "README.md",
    }
    model, processor = load(early_exit)
    row = reference_dataset("test", 1, kinds=["row"])[0]
    from skipit.eval.measure.answer import answer

    reply = answer(model, processor, list(row["images"]), row["prompt"][0]["content"][-1]["text"], budget="certified")
    assert reply.compute is not None
    assert reply.compute < 0.8

    # The name is taken now, and a budget has a name of its own.
    assert main(["calibrate", str(early_exit), rows, *RISK]) == 1
    assert "has an operating point 'certified' already" in capsys.readouterr().err
    assert main(["calibrate", str(early_exit), rows, "--budget", "0.67", "--samples", "16"]) == 0
    assert "--budget 0.67 executes 6" in capsys.readouterr().out
    assert set(load_router(early_exit)[0].operating_points) == {"certified", "0.67"}
    assert set(json.loads((early_exit / "certificates.json").read_text())) == {"certified"}


def test_none_qualifies_and_the_checkpoint_is_untouched(blind: Path, rows: str, capsys: Any) -> None:
    before = contents(blind)
    assert main(["calibrate", str(blind), rows, *RISK]) == 1
    said = capsys.readouterr().err
    assert "skipit: no threshold is certified for a risk of 0.2 with confidence 0.9: at the safest one" in said
    assert "of 24 answers differ from the dense model's, at most 1 may. The checkpoint is unchanged." in said
    assert contents(blind) == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--risk", "1"], 2, "--risk: got '1', expected a number between 0 and 1"),
        (["--risk", "0"], 2, "--risk: got '0', expected"),
        (["--risk", "0.1", "--confidence", "95"], 2, "--confidence: got '95', expected"),
        ([], 1, "give one of --budget, --latency and --risk"),
        (["--risk", "0.1", "--budget", "0.5"], 1, "give one of --budget, --latency and --risk"),
        (["--risk", "0.1", "--name", "0.5"], 1, "`name`: got '0.5', expected a word: numbers are the names of budgets"),
        (
            ["--risk", "0.02"],
            1,
            "24 rows to certify with: a risk of 0.02 with confidence 0.95 needs at least 149 (`samples_to_certify`), "
            "without a single disagreement. Give more rows, or ask for less. Of 56 rows, 0 have images that another "
            "has too, and 32 choose the thresholds to test.",
        ),
    ],
)
def test_bad_requests_change_nothing(
    blind: Path, rows: str, capsys: Any, arguments: list[str], status: int, message: str
) -> None:
    before = contents(blind)
    assert main(["calibrate", str(blind), rows, *arguments]) == status
    assert message in capsys.readouterr().err
    assert contents(blind) == before


def test_not_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    assert main(["calibrate", str(tmp_path), "reference", "--risk", "0.1"]) == 1
    assert "is not a gated checkpoint" in capsys.readouterr().err


def test_rows_about_one_picture_count_once_and_rows_without_any_all_count() -> None:
    one, other = (Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 9))
    rows = [{"images": [one]}, {"images": [one.copy()]}, {"images": [other]}, {"images": [one, other]}]
    rows += [{"images": []}, {"images": None}, {"prompt": "no pictures"}]
    rows += [{"images": [{"bytes": b"x", "path": None}]}, {"images": [{"bytes": b"x", "path": None}]}]
    kept = independent_rows(rows)
    assert len(kept) == 7
    assert {2, 3, 4, 5, 6} <= set(kept)
    assert kept == independent_rows(rows)
    assert kept != sorted(kept)


def test_a_point_that_is_measured_anew_loses_its_certificate(blind: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    save_router(folder, *load_router(blind))
    store_point(folder, "fast", 1.0, {"risk": 0.1})
    store_point(folder, "fast", 2.0, None)
    assert json.loads((folder / "certificates.json").read_text()) == {}
    assert load_router(folder)[0].operating_points == {"fast": 2.0}
    assert not list(folder.glob(".*"))


def test_a_library_call_refuses_as_the_command_does(blind: Path) -> None:
    with pytest.raises(InputError, match="expected a word"):
        certify_checkpoint(blind, [], 0.1, name="")
    with pytest.raises(CheckpointError, match="is not a gated checkpoint"):
        certify_checkpoint(blind.parent, [], 0.1)
