"""Folders are whole or not there; files that cannot be read are named."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import skipit.router
from skipit.router import CheckpointError
from skipit.router.folders import check_out, load_json, load_tensors, new_directory, provenance, save_json, save_tensors


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as folder:
        (folder / "a.txt").write_text("new")
        assert not out.exists()
    assert contents(out) == {"a.txt": "new"}
    assert out.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_inside_leaves_everything_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("old")

    def fail(target: Path) -> None:
        with new_directory(target, overwrite=True) as folder:
            (folder / "a.txt").write_text("half")
            raise error

    for target in (out, tmp_path / "other"):
        with pytest.raises(error):
            fail(target)
    assert contents(tmp_path) == {"out/a.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with new_directory(out, overwrite=True) as folder:
        (folder / "a.txt").write_text("new")
    assert contents(tmp_path) == {"out/a.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_refusing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"out exists. Choose another --out, or pass --overwrite to replace it"):
        new_directory(out).__enter__()
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match="file is a file, expected a folder or nothing"):
        new_directory(file, overwrite=True).__enter__()
    with pytest.raises(CheckpointError, match=r"out cannot be written: "):
        new_directory(file / "out").__enter__()
    assert contents(tmp_path) == {"file": "kept"}


def test_json(tmp_path: Path) -> None:
    values = {
        "nan": float("nan"),
        "tensor": torch.tensor([[1.0, math.nan], [0.5, 2.0]]),
        "path": tmp_path,
        3: (1, "x", None, True),
    }
    save_json(tmp_path / "a.json", values)
    assert load_json(tmp_path / "a.json") == {
        "nan": None,
        "tensor": [[1.0, None], [0.5, 2.0]],
        "path": str(tmp_path),
        "3": [1, "x", None, True],
    }


def test_json_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    save_json(file, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float values"):
        save_json(file, {"a": float("inf")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # killed while writing
    with pytest.raises(KeyboardInterrupt):
        save_json(file, {"a": 2})
    assert load_json(file) == {"a": 1}


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    check_out(tmp_path, True, ("run.json",))  # empty
    (tmp_path / "thesis.tex").write_text("years of work")
    check_out(tmp_path, True)
    with pytest.raises(CheckpointError, match=r"holds nothing that skipit made\. Delete it yourself or choose another"):
        check_out(tmp_path, True, ("run.json", "plan.json"))
    (tmp_path / "plan.json").write_text("{}")
    check_out(tmp_path, True, ("run.json", "plan.json"))
    with pytest.raises(CheckpointError, match=r"exists\. Choose another --out, or pass --overwrite to replace it"):
        check_out(tmp_path, False, ("run.json", "plan.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist."),
        (b"{", "is not readable JSON: "),
        (b"\xff", "is not readable JSON: "),
        (b"[1]", ": got a JSON list, expected an object."),
    ],
)
def test_json_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))} ?{re.escape(message)}"):
        load_json(file)


def test_tensors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(3, 2, requires_grad=True).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(file, tensors)
    loaded = load_tensors(file)
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items()
    )


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist."), (b"", "is not a readable"), (b"x" * 99, "is not a readable")]
)
def test_tensors_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))} {message}"):
        load_tensors(file)


def test_provenance_can_be_written(tmp_path: Path) -> None:
    save_json(tmp_path / "a.json", provenance())
    about: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
    assert set(about) == {"command", "created", "python", "platform", "versions"}
    assert {"skipit", "torch", "transformers"} <= set(about["versions"])


@pytest.mark.parametrize("how", [["-m", "told"], ["told.py"]], ids=["module", "file"])
def test_a_command_is_recorded_as_one_types_it(how: list[str], tmp_path: Path) -> None:
    program = f"""
import sys, types
router = sys.modules["skipit.router"] = types.ModuleType("skipit.router")  # without transformers, which takes seconds
router.__path__ = [{str(Path(skipit.router.__file__).parent)!r}]
from skipit.router.folders import command
print(command())
"""
    (tmp_path / "told.py").write_text(program)
    line = [sys.executable, *how, "--prompt", "what is it ?"]
    said = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    started = "python -m told" if how[0] == "-m" else "told.py"
    assert said.splitlines()[-1] == f"{started} --prompt 'what is it ?'"
