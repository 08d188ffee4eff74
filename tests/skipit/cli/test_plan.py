"""`skipit plan`: gates of a profile, and what is none."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refused, skipit
from PIL import Image

from skipit.router import RouterConfig, find_router
from skipit.router.checkpoint import load
from skipit.theory.artefact import load_plan, load_profile, save_plan
from skipit.theory.calibrate import measured_share
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator, batches
from skipit.train.reference.data import reference_dataset

GONE = {"source": "gone.jsonl", "split": "train", "seed": 0, "streaming": False, "shuffle_buffer": 0, "columns": None}


def test_plan(chain: Path) -> None:
    assert "theory gates for 60% of the FLOPs; expected to run" in (chain / "plan.out").read_text()
    plan = load_plan(chain / "plan")
    assert (plan.budget, plan.decide_at) == (0.6, RouterConfig.decide_at)


def test_overwrite_replaces_what_skipit_made(chain: Path, tmp_path: Path) -> None:
    line = ("plan", chain / "profile", "--out", tmp_path / "plan")
    assert skipit(*line).code == 0
    assert skipit(*line, "--overwrite", "--budget", 0.3).code == 0
    assert load_plan(tmp_path / "plan").budget == 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_plan_is_shown(chain: Path) -> None:
    rates, out = load_plan(chain / "plan").run_rate, (chain / "plan.out").read_text()
    for layer, (text, vision) in enumerate(rates.tolist()):
        assert re.search(rf"^│ +{layer} │ +{text:.1%} │ +{vision:.1%} │$", out, re.MULTILINE)
    with Image.open(chain / "plan" / "units.png") as picture:
        picture.verify()


def test_not_an_artefact(tmp_path: Path) -> None:
    assert refused("plan", tmp_path, "--out", "x") == f"skipit: {tmp_path} is not a profile: it has no profile.json.\n"
    train = ("train", "reference", "reference", "--plan", tmp_path, "--out", tmp_path / "x")
    assert refused(*train) == f"skipit: {tmp_path} is not a plan: it has no plan.json.\n"
    assert "is not a finished run: it has no run.json." in refused("export", tmp_path, "--out", tmp_path / "x")


def test_a_budget_below_what_is_always_spent_is_refused_with_that_figure(chain: Path, tmp_path: Path) -> None:
    least = load_profile(chain / "profile").least("retain")
    said = refused("plan", chain / "profile", "--budget", 0.02, "--out", tmp_path / "x")
    assert f"`budget`: got 0.02, expected more than {least:.3f}: so much is spent when every token skips" in said
    assert skipit("plan", chain / "profile", "--budget", 0.02, "--kv", "evict", "--out", tmp_path / "evict").code == 0


def test_a_plan_in_time(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    line = ("plan", chain / "profile", "--latency", 0.6, "--out", tmp_path / "plan")
    assert "nothing was measured of layers 128 wide on this machine" in refused(*line)
    assert skipit("bench", "reference", "--tokens", 32, "--seconds", 0.1).code == 0
    done = skipit(*line)
    assert done.code == 0, done.err
    plan = load_plan(tmp_path / "plan")
    assert plan.about["latency"] == 0.6
    assert f"is expected to take {plan.about['expected_latency']:.0%} of the dense layers' time" in done.out
    assert "--latency is for gates made from the profile" in refused(*line, "--overwrite", "--mode", "both")


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_a_plan_of_evicting_gates_spends_what_was_asked(chain: Path, tmp_path: Path, budget: float) -> None:
    plan = ("plan", chain / "profile", "--kv", "evict", "--budget", budget, "--out", tmp_path / "plan")
    assert skipit(*plan).code == 0
    made = skipit("export", tmp_path / "plan", "--model", "reference", "--out", tmp_path / "checkpoint")
    assert "of the dense decoder's FLOPs, as measured on rows that were profiled" in made.out
    model, processor = load(tmp_path / "checkpoint")
    rows = list(batches(reference_dataset("test", 32), Collator(processor), 16))
    threshold = find_router(model)[1].config.threshold
    share = measured_share(model, rows, CostModel.of(model), "evict", threshold)
    assert share == pytest.approx(budget, abs=0.01)
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "the gates run at their default threshold, which executes" in card
    assert "budget=" not in card, "there is no operating point to name"
    # Rows are as they were, so a budget can still be set under its name.
    line = ("calibrate", tmp_path / "checkpoint", "reference", "--budget", budget, "--samples", 16)
    done = skipit(*line)
    assert done.code == 0, done.err
    assert "held out: none of 16 rows was profiled" in done.out.lower()
    assert f"budget={budget:g})` chooses one" in (tmp_path / "checkpoint" / "README.md").read_text()


def test_a_point_at_which_nothing_is_right_is_warned_of(chain: Path, tmp_path: Path) -> None:
    assert skipit("plan", chain / "profile", "--kv", "evict", "--out", tmp_path / "plan").code == 0
    assert skipit("export", tmp_path / "plan", "--model", "reference", "--out", tmp_path / "checkpoint").code == 0
    line = ("calibrate", tmp_path / "checkpoint", "reference", "--budget", 0.02, "--samples", 16)
    done = skipit(*line)
    assert done.code == 0
    assert "warning: at this point none of 16 rows is answered right; without skipping 16 are." in done.err


def test_a_plan_whose_rows_are_gone_says_that_nothing_was_measured(chain: Path, tmp_path: Path) -> None:
    plan = load_plan(chain / "plan")
    for about, why in (({}, "does not say which rows it measured"), ({"data": GONE}, "gone.jsonl")):
        save_plan(replace(plan, about=about), tmp_path / "plan", overwrite=True)
        line = ("export", tmp_path / "plan", "--model", "reference", "--out", tmp_path / "checkpoint", "--overwrite")
        done = skipit(*line)
        assert done.code == 0, done.err
        assert why in done.out
        assert "`skipit calibrate` sets a budget as measured" in done.out
