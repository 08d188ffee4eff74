"""Profiles, plans, measured backbones and probes on disk: folders with JSON to read, safetensors with the numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from skipit.router.config import KVPolicy, check_points, decision_points
from skipit.router.errors import CheckpointError, RouterConfigError, short
from skipit.router.folders import load_json, load_tensors, new_directory, provenance, save_json, save_tensors
from skipit.router.paths import check_there

from .backbone import MISSING, Backbone
from .contents import check_plan, check_profile
from .cost import CostModel
from .plan import Plan
from .probes import Probes
from .profile import Damage, Profile
from .profile_sums import POLICIES
from .redundancy import Redundancy
from .ridge import RidgeFit

# Of every artefact, counted up when what is written changes. Profile 2: the cost of an MLP alone; 3: decision points;
# 4: the damage of a typical token.
VERSIONS = {"profile": 4, "plan": 2, "backbone": 1, "probes": 1}
# The first that can still be read: plans without decision points, when every layer decided for itself.
OLDEST = {**VERSIONS, "plan": 1}
# The tables of a profile that no K/V policy changes.
UNIT_TABLES = ("geometric", "update", "histogram", "count", "keys", "tokens_per_row", "var_text", "var_last")
AGAIN = {
    "profile": "Profile again: `skipit profile MODEL DATA --out P`.",
    "plan": "Plan again: `skipit plan P --out PLAN`.",
    "backbone": "Profile that part again: `skipit profile MODEL DATA --part PART --out P`.",
}


def save_profile(
    profile: Profile, out: str | Path, overwrite: bool = False, beside: Callable[[Path], None] | None = None
) -> None:
    """Write a profile as `profile.json` (tables one can read, costs, provenance) and `profile.safetensors`.

    Args:
        profile: to be written.
        out: folder.
        overwrite: replace what is there.
        beside: writes into the folder what else belongs there, before it has its name.
    """
    tables = profile_tables(profile)
    readable = {name: table for name, table in tables.items() if table.dim() <= 2}
    costs = profile.costs.to_json()
    known = {"model": profile.model, "about": profile.about, "decide_at": profile.decide_at}
    _save("profile", out, overwrite, {**known, "costs": costs, "tables": readable}, tables, beside)


def profile_tables(profile: Profile) -> dict[str, Tensor]:
    """Everything that was measured, by the names that it has on disk."""
    tables = {name: getattr(profile, name) for name in UNIT_TABLES}
    for kv, damage in profile.damage.items():
        parts = {"": damage.unit, "_tokens": damage.tokens, "_typical": damage.typical}
        tables |= {f"damage{part}_{kv}": table for part, table in parts.items()}
        tables |= {f"ridge_{name}_{kv}": table for name, table in damage.ridge._asdict().items()}
    return tables


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        CheckpointError: missing, damaged, of another version, or of a part that has no decoder's measures.
    """
    if (Path(path) / "backbone.json").is_file():
        part = load_backbone(path)
        raise CheckpointError(
            f"{path} is the profile of a {part.modality} stack, `{part.layers}`: {MISSING['damage_retain']}, and "
            f"{MISSING['var_text']}. Profile the decoder: `skipit profile MODEL DATA --out P`, without --part."
        )
    values, tables = _load(Path(path), "profile", ("model", "about", "costs", "decide_at"))
    with _naming(Path(path)):
        profile = Profile(
            **{name: tables[name] for name in UNIT_TABLES},
            damage={kv: _damage(tables, kv) for kv in POLICIES},
            costs=CostModel.from_json(values["costs"]),
            model=values["model"],
            about=values["about"],
            decide_at=check_points(values["decide_at"]),
        )
        check_profile(Path(path), values, tables)
        decision_points(profile.decide_at, len(profile.costs.layers))
    return profile


def _damage(tables: dict[str, Tensor], kv: KVPolicy) -> Damage:
    ridge = RidgeFit(**{name: tables[f"ridge_{name}_{kv}"] for name in RidgeFit._fields})
    unit, tokens, typical = (tables[f"damage{part}_{kv}"] for part in ("", "_tokens", "_typical"))
    return Damage(unit, tokens, typical, ridge)


def save_backbone(backbone: Backbone, out: str | Path, overwrite: bool = False) -> None:
    """Write what was measured about a stack of layers as `backbone.json` and `backbone.safetensors`."""
    tables = {f.name: getattr(backbone.redundancy, f.name) for f in fields(backbone.redundancy)}
    rest = {f.name: getattr(backbone, f.name) for f in fields(backbone) if f.name != "redundancy"}
    small = {name: backbone.table(name) for name in tables if name != "histogram"}
    _save("backbone", out, overwrite, {**rest, "tables": small}, tables)


def load_backbone(path: str | Path) -> Backbone:
    """Read what was measured about a stack of layers.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    values, tables = _load(Path(path), "backbone", ("modality", "layers", "rows", "model"))
    with _naming(Path(path)):
        return Backbone(Redundancy(**tables), **values)


def save_plan(
    plan: Plan, out: str | Path, overwrite: bool = False, beside: Callable[[Path], None] | None = None
) -> None:
    """Write a plan as `plan.json` and `plan.safetensors`; `beside` as for a profile."""
    tensors = {"weight": plan.weight, "bias": plan.bias, "run_rate": plan.run_rate}
    rest = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("weight", "bias")}
    _save("plan", out, overwrite, rest, tensors, beside)


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    values, tensors = _load(Path(path), "plan", ("budget", "kv", "init", "model", "about", "decide_at"))
    with _naming(Path(path)):
        plan = Plan(**{**tensors, **values, "decide_at": check_points(values["decide_at"])})
        check_plan(Path(path), plan, set(tensors))
        decision_points(plan.decide_at, len(plan.weight))
    return plan


def save_probes(probes: Probes, out: str | Path, overwrite: bool = False) -> None:
    """Write what probes know about the answer as `probes.json`, which nothing reads back.

    Raises:
        CheckpointError: `out` exists and is not to be overwritten, or cannot be made.
    """
    _save("probes", out, overwrite, probes.to_json(), {})


def check_same_model(artefact: Profile | Plan, model_fingerprint: str) -> None:
    """Refuse an artefact that was made for another model.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    if artefact.model != model_fingerprint:
        kind = type(artefact).__name__.lower()
        raise CheckpointError(
            f"the {kind} was made for a model with fingerprint {artefact.model}, this model has {model_fingerprint}. "
            "Profile this model: `skipit profile MODEL DATA --out P`."
        )


def _save(
    kind: str,
    out: str | Path,
    overwrite: bool,
    values: dict[str, Any],
    tables: dict[str, Tensor],
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder of an artefact: its values with version and provenance, and its tables if it has any."""
    with new_directory(out, overwrite) as folder:
        if tables:
            save_tensors(folder / f"{kind}.safetensors", tables)
        save_json(folder / f"{kind}.json", {"version": VERSIONS[kind], **values, "made_by": provenance()})
        if beside is not None:
            beside(folder)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what constructors and checks say about wrong contents into an error that names the folder."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{folder}: its safetensors have no {error}; the file is incomplete.") from error
    except TypeError as error:
        raise CheckpointError(f"{folder}: its files do not belong together or are damaged: {error}") from error
    except RouterConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _load(folder: Path, kind: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values that the folder of an artefact has under these keys, and its tables."""
    path = folder / f"{kind}.json"
    check_there(folder)
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a {kind}: it has no {path.name}.")
    values = load_json(path)
    oldest, newest = OLDEST[kind], VERSIONS[kind]
    if values.get("version") not in range(oldest, newest + 1):
        read = newest if oldest == newest else f"{oldest} to {newest}"
        raise CheckpointError(
            f"{path}: got version {short(values.get('version'))}, this skipit reads {read}: another version of "
            f"skipit wrote it. {AGAIN[kind]}"
        )
    if values["version"] < newest:
        values = {"decide_at": None, **values}
    if missing := [key for key in keys if key not in values]:
        raise CheckpointError(f"{path}: no {', '.join(missing)}; the file is incomplete.")
    return {key: values[key] for key in keys}, load_tensors(folder / f"{kind}.safetensors")
