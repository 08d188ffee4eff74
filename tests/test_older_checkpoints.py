"""Checkpoints of older formats are read as they lie, keep their format, and are copied into today's."""

import json
from pathlib import Path

import pytest
import torch
from command_line import skipit as command
from older_checkpoints import pair
from tiny_models import inputs
from transformers import AutoModelForImageTextToText

import skipit
from skipit.eval.operating_points import store_point
from skipit.router import find_router
from skipit.router.checkpoint import GATES_FILE, OLD_GATES_FILE, ROUTER_FILE
from skipit.router.config import FORMAT_VERSION
from skipit.router.folders import provenance, save_json
from skipit.router.standalone import CODE


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_checkpoint_answers_as_its_copy_in_todays_format(version: int, tmp_path: Path) -> None:
    new, old = pair(tmp_path, version)
    save_json(old / "provenance.json", {"base": "llava", "init": "theory", "budget": 0.5, "exported_by": provenance()})
    (old / CODE / "of_an_older_skipit.py").touch()
    before = contents(old)
    assert command("export", old, "--out", tmp_path / "copy").code == 0
    assert contents(old) == before
    copied, fresh = contents(tmp_path / "copy"), contents(new)
    assert copied.keys() - fresh.keys() == {"README.md", "provenance.json"}
    assert fresh.items() <= copied.items()
    assert json.loads(copied[ROUTER_FILE])["format_version"] == FORMAT_VERSION

    batch = inputs("llava", [[5, 6, "image", 7, 8, 9]])
    expected, _ = skipit.load(new)
    assert find_router(expected)[1].config.decide_at == (None if version == 1 else (0,))
    wanted = expected(**batch).logits
    with skipit.running(mode="dense"):
        assert not torch.equal(expected(**batch).logits, wanted)  # the gates are at work
    trusted = AutoModelForImageTextToText.from_pretrained(old, trust_remote_code=True)
    for model in (skipit.load(old)[0], skipit.load(tmp_path / "copy")[0], trusted):
        assert torch.equal(model(**batch).logits, wanted)


def test_an_operating_point_does_not_change_the_format_that_the_code_inside_reads(version: int, tmp_path: Path) -> None:
    _, old = pair(tmp_path, version)
    before = json.loads((old / ROUTER_FILE).read_text())
    store_point(old, "0.25", 1.5, None)
    store_point(old, "0.25", 2.5, None)
    after = json.loads((old / ROUTER_FILE).read_text())
    assert after == before | {"operating_points": before["operating_points"] | {"0.25": 2.5}}
    assert not (old / GATES_FILE).exists()
    assert (old / OLD_GATES_FILE).is_file()
    model, _ = skipit.load(old, budget=0.25)
    assert find_router(model)[1].config.threshold == 2.5
