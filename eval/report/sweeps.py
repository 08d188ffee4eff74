"""Reading what `scripts/study peers` and `scripts/study transfer` wrote, for a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipit.eval.statistics import paired_difference
from skipit.router import InputError
from skipit.router.errors import CheckpointError, short
from skipit.router.folders import load_json
from skipit.router.paths import check_there

SUMMARY = "summary.json"
# What an entry of a sweep of baselines must hold; the rest only if something was measured.
ENTRY = ("system", "budget", "trained", "runs", "seeds", "floor", "failed")
MEASURED = ("accuracy", "spread", "compute", "same_answer", "prefill_ms", "prefill_speed_up")
SYSTEM = ("accuracy", "same", "compute")


def load_baselines(folder: Path) -> dict[str, Any]:
    """The summary of a sweep of baselines: `entries`, and what made it.

    Raises:
        InputError: the folder holds none.
        CheckpointError: its summary is damaged.
    """
    path, values = _summary(folder, "entries", "peers")
    entries = values["entries"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: `entries`: got no list of objects. Run `scripts/study peers` again.")
    for number, entry in enumerate(entries):
        needed = (*ENTRY, *(MEASURED if entry.get("runs") else ()))
        if lacking := [key for key in needed if key not in entry]:
            raise CheckpointError(
                f"{path}: entry {number} has no {', '.join(lacking)}. Run `scripts/study peers` again."
            )
        if wrong := [key for key in needed if not _plain(key, entry[key])]:
            value = entry[wrong[0]]
            raise CheckpointError(
                f"{path}: entry {number}: `{wrong[0]}`: got {short(value)}, expected {_kind(wrong[0])}."
            )
    return {"entries": entries, "made_by": values.get("made_by") or {}}


def load_transfer(folder: Path) -> dict[str, Any]:
    """The summary of a study of transfer: `figures`, `kinds` trained on, and what made it.

    Raises:
        InputError: the folder holds none.
        CheckpointError: its summary is damaged.
    """
    path, values = _summary(folder, "figures", "transfer")
    figures, kinds = values["figures"], values.get("kinds")
    again = "Run `scripts/study transfer` again."
    if not isinstance(figures, dict) or not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        raise CheckpointError(f"{path}: expected `figures`, an object, and `kinds`, a list of names. {again}")
    for part in ("types", "shifts"):
        for name, systems in _object(figures.get(part)).items():
            if "dense" not in _object(systems):
                raise CheckpointError(f"{path}: {part} {name!r} has no figures of the dense model. {again}")
            for system, outcome in systems.items():
                if bad := [key for key in SYSTEM if not isinstance(_object(outcome).get(key), int | float)]:
                    raise CheckpointError(
                        f"{path}: {part} {short(name)}, {short(system)}: no number {short(bad[0])}. {again}"
                    )
    _add_differences(folder, figures, values.get("cells"))
    return {"figures": figures, "kinds": kinds, "made_by": values.get("made_by") or {}}


def _add_differences(folder: Path, figures: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Give every system its paired `difference` from the dense model over the rows of all seeds, if they are known.

    Cells of other settings may lie beside those that were summarized: `names` are theirs, None (of old) is all.
    """
    try:
        found = sorted((folder / "cells").glob("*.json"))
        paths = [path for path in found if names is None or path.name in names]
        cells = [load_json(path) for path in paths]
        dense = {cell["seed"]: cell["results"] for cell in cells if cell["system"] == "dense"}
        for part, by_name in figures.items():
            for name, systems in by_name.items():
                for system, outcome in systems.items():
                    mine = [cell for cell in cells if cell["system"] == system and cell["seed"] in dense]
                    mine = [cell for cell in mine if name in cell["results"][part]]
                    after = [right for cell in mine for right in cell["results"][part][name]["right"]]
                    before = [right for cell in mine for right in dense[cell["seed"]][part][name]["right"]]
                    if system != "dense" and after:
                        outcome["difference"] = paired_difference(before, after).to_json()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'cells'}: not what `scripts/study transfer` writes ({type(error).__name__}: {error}). "
            "Run it again, or give a folder that holds summary.json alone."
        ) from error


def _summary(folder: Path, key: str, study: str) -> tuple[Path, dict[str, Any]]:
    path, give = folder / SUMMARY, f"Give a folder that `scripts/study {study} --out DIR` made."
    check_there(folder)
    if not path.is_file():
        raise InputError(f"{folder}: no {SUMMARY}. {give}")
    values = load_json(path)
    if key not in values:
        raise InputError(f"{path}: no `{key}`; found: {', '.join(values)}. {give}")
    return path, values


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(key: str, value: Any) -> bool:
    if key == "system":
        return isinstance(value, str)
    if key == "trained":
        return isinstance(value, bool)
    optional = key in ("spread", "floor", "prefill_ms", "prefill_speed_up")
    return (value is None and optional) or (isinstance(value, int | float) and not isinstance(value, bool))


def _kind(key: str) -> str:
    return {"system": "a name", "trained": "true or false"}.get(key, "a number")
