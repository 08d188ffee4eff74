"""What a checkpoint is made of: the size and hash of every file, so that what is missing or changed is found."""

import hashlib
from pathlib import Path

from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, save_json

MANIFEST = "manifest.json"


def save_manifest(folder: Path, names: dict[str, str] | None = None) -> None:
    """Write down the files that are in a folder.

    Args:
        folder: of a checkpoint.
        names: that files will have, by those that they have.

    Raises:
        CheckpointError: it cannot be written.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    save_json(folder / MANIFEST, {"files": {(names or {}).get(name, name): _of(path) for name, path in files.items()}})


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has a manifest, by the file's name; None if nothing is."""
    try:
        files = load_json(folder / MANIFEST).get("files")
    except CheckpointError:
        files = None
    if not isinstance(files, dict):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _of(folder / name) != expected:
            return f"{name} has changed"
    return None


def _of(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
