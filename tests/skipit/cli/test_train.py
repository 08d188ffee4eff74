"""`skipit train`: a run, one that stops, and what it refuses."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TRAIN, refused, skipit
from safetensors.torch import load_file

from skipit.cli import train
from skipit.cli.main import build_parser
from skipit.cli.options import Parser
from skipit.router.checkpoint import GATES_FILE
from skipit.router.folders import load_json, save_json
from skipit.train.config import TrainConfig
from skipit.train.display import _TrainingBar
from skipit.train.reference.data import reference_dataset


def test_train(chain: Path, recwarn: pytest.WarningsRecorder) -> None:
    record = load_json(chain / "run" / "run.json")
    assert (record["base"], record["config"]["steps"], record["config"]["budget"]) == ("reference", 4, 0.6)
    assert f"{record['calibrated_share']:.1%} of the dense decoder's FLOPs" in (chain / "train.out").read_text()
    assert re.fullmatch(r"train +4/4  \d+ s  .*\n", (chain / "train.err").read_text())


def test_help_prints_the_defaults_that_hold() -> None:
    verb = Parser()
    train.add_arguments(verb)
    helps = {action.dest: str(action.help) for action in verb._actions}
    words = {"False": "off", "None": "none"}
    for name, default in vars(TrainConfig()).items():
        if name not in (
            "more_budgets",
            "batch_size",
            "seed",
        ):  # argparse knows
            shown = words.get(str(default), str(default))
            assert helps[name].endswith((f"(default {shown})", f"(default: the plan's, else {shown})")), helps[name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_training_is_resumed_as_if_nothing_had_happened(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    line = ("train", "reference", "reference", "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")

    def press_ctrl_c(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(_TrainingBar, "on_step_end", press_ctrl_c)
        said = refused(*line, code=code)
    assert said.endswith("skipit: interrupted. The same command with --resume goes on from the last save.\n")
    said = refused("export", tmp_path / "run", "--out", tmp_path / "x")
    assert "it has no run.json. Finish it with `skipit train ... --resume`." in said
    assert "continue with --resume" in refused(*line)
    result = skipit(*line, "--resume")
    assert result.code == 0, result.err
    for name in ("adapter/adapter_model.safetensors", GATES_FILE):
        ours, theirs = load_file(tmp_path / "run" / name), load_file(chain / "run" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_loss_that_is_not_finite(chain: Path, tmp_path: Path) -> None:
    line = ("train", "reference", "reference", "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
    said = refused(*line, "--learning-rate", 1e30)
    assert re.search(r"skipit: (the loss is nan|a gradient is not finite) at step \d", said)
    assert "No checkpoint was written yet: lower the learning rates and start again." in said
    assert skipit(*line).code == 0, "what is left does not stand in the way"


def test_artefacts_of_another_model(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "plan"
    other.mkdir()
    (other / "plan.safetensors").symlink_to(chain / "plan" / "plan.safetensors")
    save_json(other / "plan.json", {**load_json(chain / "plan" / "plan.json"), "model": "0123456789abcdef"})
    said = refused("train", "reference", "reference", "--plan", other, *TRAIN, "--out", tmp_path / "run")
    assert said.startswith("skipit: the plan was made for a model with fingerprint 0123456789abcdef, this model has ")
    assert not (tmp_path / "run").exists()
    other = tmp_path / "profile"
    other.mkdir()
    (other / "profile.safetensors").symlink_to(chain / "profile" / "profile.safetensors")
    save_json(other / "profile.json", {**load_json(chain / "profile" / "profile.json"), "model": "0123456789abcdef"})
    line = ("eval", chain / "checkpoint", "reference", "--samples", 2, "--profile", other, "--out", tmp_path / "x")
    assert "the profile was made for a model with fingerprint 0123456789abcdef" in refused(*line)


def test_training_data_without_held_out_rows(chain: Path, tmp_path: Path) -> None:
    reference_dataset("train", 8).to_parquet(tmp_path / "rows.parquet")
    line = ("--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
    said = refused("train", "reference", tmp_path / "rows.parquet", *line)
    assert "has one split, which is trained on. Name held-out rows: --calibration-data." in said


def test_a_run_to_go_on_from(chain: Path, tmp_path: Path) -> None:
    line = ("train", "reference", "reference", *TRAIN, "--from-run", chain / "run", "--out", tmp_path / "run")
    said = refused(*line, "--profile", chain / "profile")
    assert said == "skipit: --from-run: a run has gates already. Leave --profile out.\n"
    assert "this one leaves out none" in refused(*line, "--plan", chain / "plan")
    assert "holds its latency. Leave --budget out." in refused(*line, "--plan", chain / "plan", "--budget", 0.5)
    assert "the run of --from-run was trained for another budget" in refused(*line, "--latency", 0.7)
    assert "`lora_rank` is" in refused(*line, "--lora-rank", 3)
    assert "is not a finished run: it has no run.json" in refused(*line[:-3], tmp_path, "--out", tmp_path / "run")


def test_a_budget_that_is_typed_stands_for_all_of_a_run_that_is_gone_on_from() -> None:
    settings = {"budget": 0.5, "more_budgets": [0.25, 0.15], "latency": None, "kv": "evict"}
    for typed, wanted in (
        ("", ["0.5", "0.25", "0.15"]),
        ("--budget 0.25", ["0.25"]),
        ("--more-budgets 0.7", ["0.5", "0.7"]),
    ):
        parsed = build_parser().parse_args(f"train m d --from-run r --out x {typed}".split())
        assert list(train._config(parsed, settings).points) == wanted


def test_a_training_that_made_it_worse_is_told() -> None:
    before = {"accuracy": 0.996, "kl": 0.001}
    said = train._answered(before, {"accuracy": 0.906, "kl": 0.6})
    assert said == (
        "Of their answers' tokens 90.6% are right (99.6% before training), with a KL to the dense model of 0.600 "
        "(0.001). Training made it worse: try a lower --learning-rate."
    )
    for after in ({"accuracy": 0.99, "kl": 0.01}, {"accuracy": 0.95, "kl": 0.0}, {"accuracy": 1.0, "kl": 0.1}):
        assert "worse" not in train._answered(before, after)
