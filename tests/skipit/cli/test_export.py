"""`skipit export`: a checkpoint that transformers loads, nothing half-made, and runs that have changed."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, skipit
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import PreTrainedModel

from skipit.router.folders import load_json, save_json
from skipit.theory.artefact import load_plan


def test_export_loads_without_skipit_as_the_dense_model(chain: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(chain / "checkpoint", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    provenance = load_json(chain / "checkpoint" / "provenance.json")
    assert provenance["model"] == load_plan(chain / "plan").model
    assert {"made_by", "exported_by", "config"} <= set(provenance)
    assert "skipit.load" in (chain / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_killed_export_leaves_what_was_there(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def save_half(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "config.json").write_text("{")
        raise stop

    def export(*flags: str) -> None:
        if stop is KeyboardInterrupt:
            said = refused("export", chain / "run", "--out", tmp_path / "x", *flags, code=130)
            assert said == "skipit: interrupted; nothing was written.\n"
        else:
            with pytest.raises(stop):
                skipit("export", chain / "run", "--out", tmp_path / "x", *flags)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save_half)
        export()
        assert not list(tmp_path.iterdir())
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "router_config.json").write_text("of an older export")
        export("--overwrite")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "router_config.json"]
    assert (tmp_path / "x" / "router_config.json").read_text() == "of an older export"


def test_a_run_whose_base_has_changed(chain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in (chain / "run").iterdir():
        (run / path.name).symlink_to(path)
    (run / "run.json").unlink()
    save_json(run / "run.json", {**load_json(chain / "run" / "run.json"), "model": "0123456789abcdef"})
    said = refused("export", run, "--out", tmp_path / "x")
    assert re.search(r"was trained from a model with fingerprint 0123456789abcdef; reference now has \w{16}\.", said)
    (run / "run.json").write_text((chain / "run" / "run.json").read_text())
    (run / "adapter").unlink()
    assert f"{run}/adapter cannot be loaded: " in refused("export", run, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
