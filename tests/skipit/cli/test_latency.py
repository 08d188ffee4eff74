"""A budget in time is planned, trained, calibrated and run from the command line, by what `skipit bench` measured."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import refused, skipit

from skipit.router.checkpoint import load_router
from skipit.theory.artefact import load_plan
from skipit.theory.plan import LEFT_OUT


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache of a machine that was measured."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPIT_CACHE", cache)
        assert skipit("bench", "reference", "--tokens", 45, "--seconds", 0.1).code == 0
    return cache


@pytest.fixture
def measured(bench: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", bench)


def test_calibrate(measured: None, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shutil.copytree(chain / "checkpoint", tmp_path / "checkpoint")
    line = ("calibrate", made, "reference", "--samples", 16)
    assert "`latency`: got 0.001, expected at least 0." in refused(*line, "--latency", 0.001)
    done = skipit(*line, "--latency", 0.6)
    assert done.code == 0, done.err
    assert f"{made}: --budget latency-0.6 takes " in done.out
    assert "of the dense layers' time for a prompt by `skipit bench` on" in done.out
    took = json.loads((made / "provenance.json").read_text())["latencies"]["latency-0.6"]
    assert took["asked"] == 0.6
    assert f"{took['share']:.1%}" in done.out
    assert (
        f"At `latency-0.6` it takes {took['share']:.1%} of the dense layers' time" in (made / "README.md").read_text()
    )
    assert "latency-0.6" in load_router(made)[0].operating_points
    assert "has an operating point 'latency-0.6' already" in refused(*line, "--latency", 0.6)
    answer = skipit(
        "generate", made, "--budget", "latency-0.6", "--prompt", "what is it", "--image", chain / "grid.png"
    )
    assert answer.code == 0, answer.err
    assert skipit(*line, "--budget", 0.7).code == 0
    assert set(json.loads((made / "provenance.json").read_text())["latencies"]) == {"latency-0.6"}
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "another machine"))
    assert "`latency`: nothing was measured of layers 128 wide" in refused(*line, "--latency", 0.5)


def test_a_plan_in_time_trains_in_time(measured: None, chain: Path, tmp_path: Path) -> None:
    assert skipit("plan", chain / "profile", "--latency", 0.6, "--out", tmp_path / "plan").code == 0
    sizes = ("--steps", 2, "--batch-size", 2, "--calibration-samples", 8, "--out", tmp_path / "run")
    line = ("train", "reference", "reference", "--plan", tmp_path / "plan", *sizes)
    done = skipit(*line)
    assert done.code == 0, done.err
    assert f"{tmp_path / 'run'}: trained; at latency-0.6 takes " in done.out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["latency"] == 0.6
    assert skipit("export", tmp_path / "run", "--out", tmp_path / "checkpoint").code == 0
    assert "to spend 60% of the dense layers' time for a prompt." in (tmp_path / "checkpoint" / "README.md").read_text()
    # A budget that is typed is one of FLOPs.
    assert skipit(*line, "--overwrite", "--budget", 0.7).code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["latency"] is None
    plan = skipit("export", tmp_path / "plan", "--model", "reference", "--out", tmp_path / "untrained")
    assert "takes " in plan.out
    assert "There it takes" in (tmp_path / "untrained" / "README.md").read_text()


def test_a_plan_for_an_answer_trains_for_what_its_prompt_takes(measured: None, chain: Path, tmp_path: Path) -> None:
    line = ("plan", chain / "profile", "--answer-tokens", 20, "--out", tmp_path / "plan")
    assert "--answer-tokens says of what --latency is a share" in refused(*line)
    assert "got '-1', expected a whole number, at least 0" in refused(*line, "--answer-tokens", -1, code=2)
    done = skipit(*line, "--latency", 0.6)
    assert done.code == 0, done.err
    plan = load_plan(tmp_path / "plan")
    answer = plan.about["answer"]
    assert (answer["tokens"], answer["latency"]) == (20, 0.6)
    assert f", and {answer['expected_latency']:.0%} for it and 20 tokens after it." in done.out
    out = plan.left_out
    assert out
    assert f"Left out for all tokens: layers {', '.join(map(str, out))}." in done.out
    sizes = ("--steps", 2, "--batch-size", 2, "--calibration-samples", 8, "--out", tmp_path / "run")
    done = skipit("train", "reference", "reference", "--plan", tmp_path / "plan", *sizes)
    assert done.code == 0, done.err
    assert f"trained; at latency-{plan.latency:g} takes " in done.out
    # A run that has learned which tokens skip goes on without the plan's layers, for any latency of prompts.
    further = ("--from-run", chain / "run", "--plan", tmp_path / "plan", "--latency", 0.9, *sizes, "--overwrite")
    done = skipit("train", "reference", "reference", *further)
    assert done.code == 0, done.err
    assert "trained; at latency-0.9 takes " in done.out
    closed = (load_router(tmp_path / "run")[1]["bias"] == LEFT_OUT).all(-1)
    assert closed.nonzero().flatten().tolist() == out


def test_a_profile_in_time(measured: None, chain: Path, tmp_path: Path) -> None:
    sizes = ("--steps", 2, "--batch-size", 2, "--calibration-samples", 8, "--out", tmp_path / "run")
    line = ("train", "reference", "reference", "--profile", chain / "profile", *sizes)
    assert "give either --budget or --latency" in refused(*line, "--latency", 0.6, "--budget", 0.5)
    assert "got it with `more_budgets`" in refused(*line, "--latency", 0.6, "--more-budgets", "0.25")
    assert "`latency`: got 0.001, expected at least 0." in refused(*line, "--latency", 0.001)
    done = skipit(*line, "--latency", 0.5)
    assert done.code == 0, done.err
    assert "trained; at latency-0.5 takes " in done.out
