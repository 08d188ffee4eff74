"""Writing folders that are whole or not there, and reading JSON and safetensors with errors that name the file.

A folder is written beside its place and renamed, so a killed run leaves nothing half-made under its name and never
destroys what was there; what it leaves beside it, the next one clears. Nothing is ever pickled.
"""

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError
from .lock import beside, locked
from .strict_json import parse_json, read_json, regular_size

_T = TypeVar("_T")
_RECORDED = ("skipit", "torch", "transformers", "peft", "datasets", "accelerate", "deepspeed")


def check_out(
    out: Path, overwrite: bool, made: Sequence[str] = (), foreign: str = "holds nothing that skipit made"
) -> None:
    """Refuse to make a folder where something would be lost, or where none can be made.

    Args:
        out: the folder.
        overwrite: whether one that is there may be replaced.
        made: files of which a folder that may be replaced holds one, if it holds anything; without them it may be any.
        foreign: what is said of a folder that holds none of them.

    Raises:
        CheckpointError: it exists and is not to be overwritten, is a file, is not ours, or cannot be written.
    """
    if out.exists():
        if not overwrite:
            raise CheckpointError(f"{out} exists. Choose another --out, or pass --overwrite to replace it.")
        if not out.is_dir():
            raise CheckpointError(f"{out} is a file, expected a folder or nothing.")
        if made and any(out.iterdir()) and not any((out / name).exists() for name in made):
            raise CheckpointError(f"{out} {foreign}. Delete it yourself or choose another --out.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: no permission to make a folder in {parent}.")


class Stored(NamedTuple):
    """A tensor in a safetensors file, as its header has it: a dtype such as `BF16`, and a shape."""

    dtype: str
    shape: tuple[int, ...]


@contextmanager
def claimed(out: str | Path, check: Callable[[], None]) -> Iterator[None]:
    """Keep a folder for this process from before the work until it is written; clear what killed ones left beside it.

    Args:
        out: the folder; its parents are made.
        check: refuses it. Asked before anything is made, and again when no other process can write it any more.

    Raises:
        CheckpointError: `check` raises it, or another process writes the folder.
    """
    out = Path(out)
    if not beside(out, "old").exists():  # else it may be put back first
        check()
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out) as first:
            if first:
                with writing(out):
                    _recover(out)
                check()
            yield
    finally:
        with suppress(OSError):  # in which something lies by now
            for parent in missing:
                parent.rmdir()


@contextmanager
def new_directory(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends without an error.

    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or cannot be made, or not in full, or another
            process writes it.
    """
    out = Path(out)
    new, old = beside(out, "new"), beside(out, "old")
    with claimed(out, lambda: check_out(out, overwrite)):
        try:
            with writing(out), _naming(new, out):
                new.mkdir()
                yield new
                _to_disk(new)
            check_out(out, overwrite)
            with writing(out):
                if out.exists():
                    os.replace(out, old)
                os.replace(new, out)
                _sync(out.parent)
        finally:
            _recover(out)


def _recover(out: Path) -> None:
    """Put back a folder that was to be replaced and was not, and remove what is left of one that was not finished."""
    new, old = beside(out, "new"), beside(out, "old")
    if old.exists() and not out.exists():
        os.replace(old, out)
    for left in (old, new):
        if left.is_symlink():
            left.unlink()
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a missing permission raises into an error that names what was to be written.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


@contextmanager
def _naming(new: Path, out: Path) -> Iterator[None]:
    """Let errors about a folder that is being made call it what it will be called."""
    try:
        yield
    except CheckpointError as error:
        if str(new) not in str(error):
            raise
        raise CheckpointError(str(error).replace(str(new), str(out))) from error


def _to_disk(folder: Path) -> None:
    """Give a folder's files the usual permissions and have them on the disk before it gets its name."""
    for path in (*folder.rglob("*"), folder):
        if path.suffix == ".safetensors":
            path.chmod(0o644)  # safetensors makes them private
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends: a killed process leaves the old file or the new one.

    Raises:
        CheckpointError: it cannot be written; the old one is as it was.
    """
    beside_it = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            yield beside_it
            _sync(beside_it)
            os.replace(beside_it, path)
        finally:
            beside_it.unlink(missing_ok=True)


def save_json(path: Path, values: Any) -> None:
    """Write JSON, readable and with NaN as null, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    with new_file(path) as beside_it:
        beside_it.write_text(json.dumps(_plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: as of `read_json`, or another kind of value.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: got a JSON {type(values).__name__}, expected an object.")
    return values


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save_file

    with new_file(path) as beside_it:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside_it)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    from safetensors.torch import load_file

    read_header(path)
    return _read(path, load_file)


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, from its header, which must fit its size.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    from safetensors import safe_open

    def header(path: Path) -> dict[str, Stored]:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        with path.open("rb") as stream:  # safetensors lets the last of two equal names count
            parse_json(stream.read(int.from_bytes(stream.read(8), "little")).decode())
        return found

    return _read(path, header)


def _read(path: Path, reader: Callable[[Path], _T]) -> _T:
    regular_size(path)
    try:
        return reader(path)
    except Exception as error:  # a damaged header comes out as almost anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{path} is not a readable safetensors file: {reason}") from error


def command() -> str:
    """The line that started this program, as one types it into a shell."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`, whose argv names a file
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """What made an artefact: command, time, versions, machine."""
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": command(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Path):
        return str(value)
    return value
