"""Uploading a checkpoint, and running one by its Hub id; the Hub is a folder here."""

import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import processor
from huggingface_hub.utils import filter_repo_objects
from older_checkpoints import pair
from tiny_models import build, inputs
from transformers import AutoModelForImageTextToText

import skipit
from skipit.cli.main import main
from skipit.router import CheckpointError, InputError, RouterConfig, attach, gate_state, set_gates
from skipit.router.checkpoint import GATES_FILE, OLD_GATES_FILE, save_gated
from skipit.train.hub import check_repository, push

REPOSITORY = "someone/gated"
COMMIT = secrets.token_hex(20)  # transformers keeps a commit's code for good, also that of another version of ours


class LocalHub:
    """The two calls of `HfApi` that an upload makes; what it receives lies as the Hub's own cache would hold it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.created: dict[str, Any] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.created[repo_id] = {"private": private, "exist_ok": exist_ok}
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: Any) -> None:
        assert repo_id in self.created
        assert commit_message
        root = self.cache / f"models--{repo_id.replace('/', '--')}"
        there = root / "snapshots" / COMMIT
        held = [str(path.relative_to(there)) for path in there.rglob("*")]
        for path in filter_repo_objects(held, allow_patterns=delete_patterns):
            (there / path).unlink()
        shutil.copytree(folder_path, there, dirs_exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    local = LocalHub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: local)
    return local


def test_what_is_pushed_runs_by_its_name(tmp_path: Path, hub: LocalHub) -> None:
    gated: Any = build("llava")
    attach(gated, RouterConfig(kv="evict"))
    set_gates(gated, **{name: torch.randn_like(value) for name, value in gate_state(gated).items()})
    save_gated(gated, processor("llava"), tmp_path / "out")
    assert push(tmp_path / "out", REPOSITORY) == f"https://hub.example/{REPOSITORY}"
    assert hub.created == {REPOSITORY: {"private": True, "exist_ok": True}}

    batch = inputs("llava", [[5, "image", 6, 7]])
    expected = gated.generate(**batch, max_new_tokens=4, do_sample=False)
    loaded, _ = skipit.load(REPOSITORY, cache_dir=hub.cache)
    own = AutoModelForImageTextToText.from_pretrained(REPOSITORY, cache_dir=hub.cache, trust_remote_code=True)
    dense = AutoModelForImageTextToText.from_pretrained(REPOSITORY, cache_dir=hub.cache)
    for model in (loaded, own):
        assert model._forward_pre_hooks
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)
    assert not dense._forward_pre_hooks


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_checkpoint_runs_by_its_name_until_a_copy_takes_its_place(
    version: int, tmp_path: Path, hub: LocalHub
) -> None:
    new, old = pair(tmp_path, version)
    batch = inputs("llava", [[5, "image", 6, 7]])
    expected = skipit.load(new)[0](**batch).logits
    for folder, place in ((old, OLD_GATES_FILE), (new, GATES_FILE)):
        push(folder, REPOSITORY)
        (snapshot,) = hub.cache.glob("*/snapshots/*")
        gates = [str(path.relative_to(snapshot)) for path in snapshot.rglob("gates.safetensors")]
        assert gates == [place]
        assert torch.equal(skipit.load(REPOSITORY, cache_dir=hub.cache)[0](**batch).logits, expected)


def test_a_hub_that_refuses(tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("401 Client Error: log in")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(
        CheckpointError, match=r"out is written, but not uploaded to someone/gated: 401 Client"
    ) as error:
        push(tmp_path / "out", REPOSITORY)
    assert "Log in with `hf auth login`" in str(error.value)


@pytest.mark.parametrize("name", ["a/b/c", "", "a b", "../x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match=r"`--push-to-hub`: got .*, expected owner/name"):
        check_repository(name)
    check_repository(REPOSITORY)


def test_the_name_is_checked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x"), "--push-to-hub", "a/b/c"]) == 1
    assert "`--push-to-hub`: got 'a/b/c', expected owner/name" in capsys.readouterr().err


def test_the_verb_uploads(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("skipit.train.export.export", lambda run, out, overwrite: out.mkdir())
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x"), "--push-to-hub", REPOSITORY]) == 0
    assert f"Uploaded to https://hub.example/{REPOSITORY}" in capsys.readouterr().out
    assert (hub.cache / "models--someone--gated" / "snapshots" / COMMIT).is_dir()
