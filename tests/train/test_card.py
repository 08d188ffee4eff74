"""A model card says what was measured, and nothing about the machine it was written on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build, processor
from families.family import picture

import skipit
from skipit.cli.main import main
from skipit.eval.compare import compare
from skipit.eval.operating_points import budget_checkpoint
from skipit.router import CheckpointError, RouterConfig
from skipit.router.checkpoint import load_dense
from skipit.router.folders import provenance, save_json
from skipit.theory.artefact import save_plan
from skipit.theory.plan import make_plan
from skipit.train.card import CARD, PROVENANCE_FILE, card, measured_table
from skipit.train.export import export_again, export_plan, is_checkpoint
from skipit.train.profiling import profile_model

RUN = {
    "base": "someone/llava",
    "init": "theory",
    "config": {"budget": 0.5, "steps": 250, "batch_size": 4, "accumulation": 2, "lora_rank": 8, "seed": 3},
    "calibrated_shares": {"0.5": 0.493, "0.25": None},
    "made_by": {"command": "skipit train someone/llava data", "versions": {"skipit": "0.1.0", "torch": "2.15.0"}},
}
CONFIG = RouterConfig(kv="evict", decide_at=(0, 2), threshold=0.5, operating_points={"0.5": 0.5, "0.25": 1.25})
LATENCY = {"prefill_ms": 20.0, "prefill_speed_up": 1.5, "decode_ms": 4.0, "decode_speed_up": 1.25, "repeats": 15}
MODEL = {"accuracy": 0.9, "same_answer": 0.8, "compute": 0.5, "rows": 60, "latency": LATENCY}
EVALUATION = {
    "dense": {**MODEL, "accuracy": 1.0},
    "gated": MODEL,
    "held_out": {"rows": 60, "used": {"trained": 0}},
    "made_by": {"command": "skipit eval x y", "created": "2026-01-02T03:04:05", "platform": "Linux"},
}


def row(number: int) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    return {
        "images": [picture(number, 0)],
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"a cat t{number + 5}"}]}],
    }


ROWS = [row(number) for number in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a plan with a calibrated budget, in a folder with its evaluation."""
    folder = tmp_path_factory.mktemp("card")
    build("llava").save_pretrained(folder / "base")
    processor("llava").save_pretrained(folder / "base")
    model, words = load_dense(folder / "base")
    save_plan(make_plan(profile_model(model, words, ROWS, draws=1), budget=0.6), folder / "plan")
    export_plan(folder / "plan", str(folder / "base"), folder / "checkpoint")
    budget_checkpoint(folder / "checkpoint", ROWS, 0.7)
    gated, _ = skipit.load(folder / "checkpoint")
    found = compare(model, {"gated": gated}, words, ROWS, None, repeats=1)
    (folder / "eval").mkdir()
    settings = {"checkpoint": str(folder / "checkpoint")}
    save_json(folder / "eval" / "eval.json", {**found.to_json(), "settings": settings, "made_by": provenance()})
    return folder


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def test_of_a_run() -> None:
    text = card(RUN, CONFIG, evaluation=EVALUATION)
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "someone/llava",
        "base_model_relation": "finetune",
        "tags": ["skipit", "layer-skipping"],
    }
    for line in (
        "| accuracy | 100.0% | 90.0% |",
        "| decoder FLOPs executed | 50.0% | 50.0% |",
        "| prefill, ms (speed-up) | 20.00 (1.50x) | 20.00 (1.50x) |",
        "60 held-out rows",
        "Measured by `skipit eval x y`, 2026-01-02, on Linux.",
        "| 0.5 (default) | 0.5 | 49.3% |",
        "| 0.25 | 1.25 | - |",
        "(`evict`)",
        "Gates decide by the states that enter layers 0, 2.",
        "250 steps of 8 rows, LoRA rank 8",
        "with skipit 0.1.0, torch 2.15.0.",
        "trust_remote_code=True",
    ):
        assert line in text, line
    assert "were not measured" in card(RUN, CONFIG)


def test_of_an_adapter() -> None:
    text = card(RUN, CONFIG, "adapter")
    assert (front(text)["library_name"], front(text)["base_model_relation"]) == ("peft", "adapter")
    assert "PeftModel.from_pretrained" in text
    assert "trust_remote_code" not in text


@pytest.mark.parametrize("base", ["/home/me/models/llava", "reference", "models"])
def test_a_base_that_is_not_on_the_hub_is_not_named_as_if_it_were(base: str) -> None:
    text = card({**RUN, "base": base}, CONFIG)
    assert "base_model" not in front(text)
    assert "/home/me" not in text


def test_an_uncalibrated_router() -> None:
    assert "None is calibrated: the gates run at their default threshold." in card(RUN, RouterConfig())
    text = card(RUN, RouterConfig(operating_points={"0.5": 1.0}))
    assert "| - (default) | 0 | - |" in text


@pytest.mark.parametrize("change", [{"gated": {}}, {"dense": None}, {"made_by": {}}])
def test_what_is_no_evaluation(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"not what `skipit eval` writes into eval\.json"):
        measured_table({**EVALUATION, **change})


def test_calibrating_keeps_the_card_true(made: Path) -> None:
    text = (made / "checkpoint" / CARD).read_text()
    share = json.loads((made / "checkpoint" / PROVENANCE_FILE).read_text())["calibrated_shares"]["0.7"]
    threshold = json.loads((made / "checkpoint" / "router_config.json").read_text())["operating_points"]["0.7"]
    assert f"| 0.7 | {threshold:.4g} | {share:.1%} |" in text
    assert 0 < share < 1
    assert "for 60% of the dense decoder's FLOPs; nothing was trained." in text


def test_what_others_wrote_into_a_card_stays(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made / "checkpoint", tmp_path / "copy"))
    text = (copy / CARD).read_text()
    (copy / CARD).write_text(text.replace("## Use", "## My words\n\n## Use"))
    budget_checkpoint(copy, ROWS, 0.8)
    assert "## My words" in (copy / CARD).read_text()
    assert "| 0.8 |" in (copy / CARD).read_text()
    (copy / CARD).write_text("all mine")
    budget_checkpoint(copy, ROWS, 0.9)
    assert (copy / CARD).read_text() == "all mine"


def test_a_copy_with_its_evaluation(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(made / "checkpoint"), "--eval", str(made / "eval"), "--out", str(out)]) == 0
    assert f"{out}: a copy, with the figures of {made / 'eval'} in its model card." in capsys.readouterr().out
    text = (out / CARD).read_text()
    gated = json.loads((made / "eval" / "eval.json").read_text())["gated"]
    assert f"| decoder FLOPs executed | 100.0% | {gated['compute']:.1%} |" in text
    assert gated["compute"] < 1
    assert "| 0.7 |" in text
    assert {path.name for path in out.iterdir()} == {path.name for path in (made / "checkpoint").iterdir()}
    skipit.load(out, budget=0.7)
    # Its own folder may be replaced, and a copy needs no evaluation.
    export_again(out, out, overwrite=True)
    assert "were not measured" in (out / CARD).read_text()


def test_an_evaluation_of_another_checkpoint(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_plan(made / "plan", str(made / "base"), tmp_path / "other")
    values = json.loads((tmp_path / "other" / PROVENANCE_FILE).read_text())
    save_json(tmp_path / "other" / PROVENANCE_FILE, {**values, "budget": 0.1})
    line = ["export", str(tmp_path / "other"), "--eval", str(made / "eval"), "--out", str(tmp_path / "x")]
    assert main(line) == 1
    assert f"eval.json is of {made / 'checkpoint'}, not of {tmp_path / 'other'}" in capsys.readouterr().err
    save_json(tmp_path / "eval.json", {"dense": 1})
    line = ["export", str(made / "checkpoint"), "--eval", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(line) == 1
    assert "eval.json: not what `skipit eval` writes into eval.json (KeyError: 'gated')" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_options_that_do_not_go_together(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "x")]
    assert is_checkpoint(made / "checkpoint")
    assert not is_checkpoint(made / "plan")
    assert main(["export", str(made / "checkpoint"), "--model", "reference", *out]) == 1
    assert "is a checkpoint already: leave out --adapter and --model" in capsys.readouterr().err
    assert main(["export", str(made / "plan"), "--model", "reference", "--eval", str(made / "eval"), *out]) == 1
    assert "--eval is of a checkpoint: skipit export CHECKPOINT --eval DIR" in capsys.readouterr().err
    assert main(["export", str(made / "plan"), *out]) == 1
    assert "is a plan, which has no weights: name its model, --model MODEL." in capsys.readouterr().err


def test_files_of_a_checkpoint_are_for_all_to_read(made: Path) -> None:
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (made / "checkpoint").rglob("*") if file.is_file())
