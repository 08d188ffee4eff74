"""`skipit eval`: the report of a checkpoint, and what it cannot be compared with."""

import json
import re
from pathlib import Path

from command_line import EVAL, refused, skipit

from skipit.router.folders import load_json, save_json


def test_eval(evaluated: Path) -> None:
    figures = load_json(evaluated / "eval" / "eval.json")
    assert {"dense", "gated", "also", "theory", "units", "growing", "settings", "made", "made_by"} <= set(figures)
    assert figures["units"]["rows"] == figures["growing"]["rows"] == 2
    assert figures["dense"]["compute"] == 1
    assert figures["gated"]["tracking"]["tables"].keys() == {"damage", "geometric", "cross-attention"}
    out = (evaluated / "eval.out").read_text()
    assert "12 held-out rows" in out
    assert out.endswith(f"{evaluated / 'eval'}: report.html, eval.json\n")
    page = (evaluated / "eval" / "report.html").read_text()
    assert f"{figures['gated']['compute']:.1%}" in page
    assert f"skipit eval {evaluated}/checkpoint reference --baselines BASELINES --out DIR" in page
    # Bars for what takes long, each filled to its end.
    assert re.search(r"^units +25/25  \d+ s$", (evaluated / "eval.err").read_text(), re.MULTILINE)
    for what in ("eval", "sets", "2x2"):
        done, total = re.search(rf"^{what} +(\d+)/(\d+)  \d+ s$", (evaluated / "eval.err").read_text(), re.M).groups()
        assert done == total


def test_a_profile_is_optional_for_eval(chain: Path, tmp_path: Path) -> None:
    result = skipit("eval", chain / "checkpoint", "reference", *EVAL, "--out", tmp_path / "eval")
    assert result.code == 0, result.err
    assert "rank corr." not in result.out
    assert load_json(tmp_path / "eval" / "eval.json")["gated"]["tracking"] is None


def test_a_further_router_that_is_none(chain: Path, tmp_path: Path) -> None:
    line = ("eval", chain / "checkpoint", "reference", "--out", tmp_path / "x")
    said = refused(*line, "--also", f"neutral={tmp_path}")
    assert said == (
        f"skipit: {tmp_path} has no router_config.json: it is no gated checkpoint. Make one with `skipit export`.\n"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "router_config.json").write_text("{}")
    save_json(other / "provenance.json", {"model": "0123456789abcdef"})
    said = refused(*line, "--also", f"neutral={other}")
    assert f"{other} was made from a model with fingerprint 0123456789abcdef, {chain / 'checkpoint'} from" in said
    assert "leave it out of --also" in said


def test_folders_of_studies_that_are_none(chain: Path, tmp_path: Path) -> None:
    line = ("eval", chain / "checkpoint", "reference", "--out", tmp_path / "x")
    assert f"{tmp_path}: no summary.json. Give a folder" in refused(*line, "--baselines", tmp_path)
    assert f"{tmp_path}: no summary.json. Give a folder" in refused(*line, "--transfer", tmp_path)
    assert not (tmp_path / "x").exists()


def test_results_are_json(evaluated: Path) -> None:
    for path in evaluated.rglob("*.json"):
        json.loads(path.read_text())
