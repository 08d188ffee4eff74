"""A tiny documents demo leaves every artefact behind, and says what it skipped."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_decoder import tiny_documents_model

import skipit
from skipit import documents_demo
from skipit.cli.main import main
from skipit.eval.compare import compare
from skipit.router import RouterConfig, attach, find_router
from skipit.router.config import EVERYTHING
from skipit.router.folders import load_json


def trained() -> tuple[Any, Any]:
    """A model with gates, as a shipped run gives it: at one budget tokens skip all, at one nothing."""
    model, processor = tiny_documents_model()
    config = RouterConfig(kv="evict", operating_points={"0.4": 1e9, "1": EVERYTHING})
    attach(model, config)
    return model, processor


def test_it_measures_gates_asks_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents_demo, "load_model", lambda source: tiny_documents_model())
    monkeypatch.setattr(documents_demo, "merge_run", lambda run: trained())
    monkeypatch.setattr(documents_demo, "PROFILE_ROWS", 8)
    monkeypatch.setattr(documents_demo, "CALIBRATION_ROWS", 4)
    monkeypatch.setattr(documents_demo, "compare", partial(compare, repeats=2, max_new_tokens=2))
    out = tmp_path / "made"
    assert main(["demo", "--model", "documents", "--samples", "4", "--budget", "0.6", "--out", str(out)]) == 0
    said, summary = capsys.readouterr().out, load_json(out / "summary.json")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "profile",
        "plan",
        "theory",
        "trained",
        "summary.json",
        "redundancy.png",
        "depth.png",
        "example.png",
    }
    assert summary["results"]["theory only"]["compute"] == pytest.approx(0.6, abs=0.15)
    assert summary["results"]["trained 40%"]["compute"] < summary["results"]["trained 100%"]["compute"] == 1
    assert summary["results"]["dense"]["scored_by"] == "ANLS"
    assert "theory only: gates made of the profile for 60% of the decoder's FLOPs" in said
    config = find_router(skipit.load(out / "theory")[0])[1].config
    assert config.threshold_at(0.6) == config.threshold


@pytest.mark.parametrize(("name", "value"), [("latency", "0.5"), ("steps", "3")])
def test_what_it_does_not_do_is_refused(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", "documents", f"--{name}", value, "--out", str(tmp_path / "made")]) != 0
    assert f"--{name}: got {value}, but the demo of documents trains nothing. Leave it out." in capsys.readouterr().err
