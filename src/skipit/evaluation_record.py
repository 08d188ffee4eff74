"""How everything in an evaluation was made: commands, versions, seeds, hardware, by the names that sections link to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipit.router.artefact import load_json, provenance
from skipit.theory.profile import Profile

from .card import PROVENANCE_FILE
from .hardware import hardware

SWEEPS = {"baselines": "the comparison with baselines", "transfer": "the study of transfer"}


def checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of how it was made; empty if it says nothing."""
    path = checkpoint / PROVENANCE_FILE
    return load_json(path) if path.is_file() else {}


def made_now(seed: int) -> dict[str, Any]:
    """This evaluation itself.

    Args:
        seed: of its rows.
    """
    note = "Seed of the rows; intervals and p-values have seed 0."
    return {"title": "this evaluation", **provenance(), "seed": seed, "hardware": hardware(), "note": note}


def made_checkpoint(path: Path, title: str) -> dict[str, Any]:
    """A gated checkpoint, from its record."""
    record = checkpoint_record(path)
    config = record.get("config") or {}
    made = record.get("made_by") or record.get("exported_by") or {}
    steps = f"{config['steps']} steps, " if config.get("steps") else ""
    began = f"gates began as {record['init']!r}" if record.get("init") else "no record of how its gates began"
    return {"title": title, **made, "seed": config.get("seed"), "note": f"{path}: {steps}{began}."}


def made_profile(path: Path, profile: Profile) -> dict[str, Any]:
    """The theory's measurements, from their record."""
    about = profile.about
    record = load_json(path / "profile.json").get("made_by") or {}
    note = f"{path}: {about.get('rows')} rows, {about.get('draws')} draws of answers per row."
    return {"title": "the theory's profile", **record, "seed": about.get("seed"), "note": note}


def made_sweeps(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Studies that were read, not measured."""
    note = "Read from its folder, not measured again."
    return {name: {"title": SWEEPS[name], **found["made_by"], "note": note} for name, found in sweeps.items()}
