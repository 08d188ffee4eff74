"""`skipit eval`: the report of a checkpoint, and what it cannot be compared with."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import EVAL, refused, skipit
from datasets import Dataset

from skipit.eval.measure.parts import Parts
from skipit.router.folders import load_json, save_json
from skipit.train.reference.data import reference_dataset


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


def same_figures(one: Path, other: Path) -> None:
    """But for what a clock says, two evaluations are one."""

    def figures(folder: Path) -> dict[str, Any]:
        values = load_json(folder / "eval.json")
        for name in ("dense", "gated"):
            values[name].pop("latency")
        return {name: value for name, value in values.items() if name not in ("made", "made_by")}

    assert figures(one) == figures(other)


def test_stopped_after_any_part_it_goes_on(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, done = tmp_path / "eval", []
    line = ("eval", evaluated / "checkpoint", "reference", *EVAL, "--profile", evaluated / "profile", "--out", out)
    save = Parts._save

    def save_and_stop(self: Parts, name: str, *made: Any) -> None:
        save(self, name, *made)
        done.append(name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "_save", save_and_stop)
        for resume in ((), *[("--resume",)] * 4):
            said = refused(*line, *resume, code=130)
            assert said.endswith("interrupted. The same command with --resume goes on from the last save.\n")
    assert done == ["dense", "gated", "spending", "units", "growing"]
    assert "eval.partial holds an unfinished evaluation. Go on with --resume, or pass" in refused(*line)
    said = refused(*line, "--resume", "--samples", 11)
    assert "cannot be resumed, what is measured differs: rows was" in said
    assert "samples was 12, is 11." in said
    assert skipit(*line, "--resume").code == 0
    same_figures(out, evaluated / "eval")
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]


def test_other_gates_are_not_resumed(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "checkpoint", tmp_path / "ck")
    line = ("eval", tmp_path / "ck", "reference", *EVAL, "--out", tmp_path / "eval")
    parts = Parts(tmp_path / "eval.partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipit.eval.evaluate._values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        refused(*line, code=130)
    assert parts.holds("gated")
    values = load_json(tmp_path / "ck" / "router_config.json")
    save_json(tmp_path / "ck" / "router_config.json", {**values, "threshold": values["threshold"] + 1})
    assert "what is measured differs: routers was" in refused(*line, "--resume")
    assert skipit(*line, "--overwrite").code == 0


FORMS = {
    "a list of names": lambda path, image: [str(path)],
    "one name": lambda path, image: str(path),
    "bytes": lambda path, image: [{"bytes": path.read_bytes(), "path": None}],
    "one picture": lambda path, image: image,
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_with_columns_of_their_own_names(form: str, chain: Path, tmp_path: Path) -> None:
    rows = []
    for number, row in enumerate(reference_dataset("test", 4)):
        path = tmp_path / f"{number}.png"
        row["images"][0].save(path)
        question = row["prompt"][0]["content"][1]["text"]
        rows.append({"photo": FORMS[form](path, row["images"][0]), "question": question, "reply": row["answer"]})
    if form.endswith("name") or form.endswith("names"):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = tmp_path / "rows"
        Dataset.from_list(rows).save_to_disk(data)
    line = ("--columns", "images=photo,prompt=question,completion=reply", "--profile", chain / "profile")
    result = skipit("eval", chain / "checkpoint", data, *EVAL, *line, "--out", tmp_path / "eval")
    assert result.code == 0, result.err
    figures = load_json(tmp_path / "eval" / "eval.json")
    assert {"units", "growing", "adaptivity"} <= set(figures)
    assert len(figures["examples"]) == 3


def test_a_row_that_cannot_be_read_is_found_before_anything_is_measured(chain: Path, tmp_path: Path) -> None:
    rows = [{"images": [str(tmp_path / "none.png")], "prompt": "what", "completion": "1"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    said = refused("eval", chain / "checkpoint", tmp_path / "rows.jsonl", *EVAL, "--out", tmp_path / "x")
    assert re.search("row 0: image 0 cannot be read", said)
    assert "eval " not in said


@pytest.mark.parametrize("verb", ["eval", "calibrate", "generate"])
def test_what_is_not_exported_yet_is_told(verb: str, chain: Path, tmp_path: Path) -> None:
    more = {
        "eval": ("reference", "--out", tmp_path / "x"),
        "calibrate": ("reference", "--budget", 0.5),
        "generate": ("--image", chain / "grid.png", "--prompt", "what"),
    }
    assert refused(verb, chain / "run", *more[verb]) == (
        f"skipit: {chain}/run is a training run, not a checkpoint. Export it first: "
        f"`skipit export {chain}/run --out DIR`.\n"
    )
    said = refused(verb, chain / "plan", *more[verb])
    assert f"{chain}/plan is a plan, not a checkpoint. Export it first: `skipit export {chain}/plan --model" in said


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
