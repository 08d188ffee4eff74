"""`skipit plan`: gates of a profile, and what is none."""

from pathlib import Path

from command_line import refused, skipit

from skipit.router import RouterConfig
from skipit.theory.artefact import load_plan


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


def test_not_an_artefact(tmp_path: Path) -> None:
    assert refused("plan", tmp_path, "--out", "x") == f"skipit: {tmp_path} is not a profile: it has no profile.json.\n"
    train = ("train", "reference", "reference", "--plan", tmp_path, "--out", tmp_path / "x")
    assert refused(*train) == f"skipit: {tmp_path} is not a plan: it has no plan.json.\n"
    assert "is not a finished run: it has no run.json." in refused("export", tmp_path, "--out", tmp_path / "x")
