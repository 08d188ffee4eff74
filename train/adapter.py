"""An adapter checkpoint: gates and LoRA in PEFT's own format, a few megabytes on top of any copy of the base."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from skipit.router import RouterConfig, attach
from skipit.router import checkpoint as gated
from skipit.router.checkpoint import ROUTER_FILE
from skipit.router.errors import CheckpointError, InputError, RouterConfigError, short
from skipit.router.files import CONFIG
from skipit.router.folders import load_json, new_directory, provenance, save_json
from skipit.theory.identity import fingerprint
from skipit.train.data.sources import resolve_model

from .card import ADAPTER_CONFIG, PROVENANCE_FILE, write_card
from .export import check_exported, open_run
from .lora import ADAPTER_WEIGHTS, merge_lora, read_settings
from .run_folder import ADAPTER

# What is ours in router_config.json beside the router's own settings.
OURS = ("base", "skipit_version")


def shape_hash(model: nn.Module) -> str:
    """A hash of the names and shapes of a dense model's tensors: the same for every copy, in any dtype."""
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def revision_of(source: str) -> str | None:
    """The commit of a Hub model as it lies on this machine; a folder has none.

    transformers 5 does not note it on the model it loads.
    """
    if Path(source).is_dir():
        return None
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(source, CONFIG), None)


def export_adapter(run: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Turn a run into an adapter checkpoint.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: not a finished run, or `out` exists.
    """
    finished = open_run(run)
    made_by = provenance()
    base = {
        "model": finished.record["base"],
        "revision": revision_of(resolve_model(finished.record["base"])),
        "shapes": shape_hash(finished.model),
        "fingerprint": finished.record["model"],
    }
    settings = load_json(Path(run) / ADAPTER / ADAPTER_CONFIG)
    settings |= {"base_model_name_or_path": base["model"], "revision": base["revision"], "auto_mapping": None}
    with new_directory(out, overwrite) as folder:
        save_json(folder / ADAPTER_CONFIG, settings)
        (folder / ADAPTER_WEIGHTS).write_bytes((Path(run) / ADAPTER / ADAPTER_WEIGHTS).read_bytes())
        router = {**finished.config.to_dict(), "skipit_version": made_by["versions"].get("skipit"), "base": base}
        save_json(folder / ROUTER_FILE, router)
        save_json(folder / PROVENANCE_FILE, {**finished.record, "exported_by": made_by})
        write_card(folder)
        return sum(file.stat().st_size for file in folder.iterdir())


def load(
    folder: str | Path, base: str | Path | None = None, *, budget: float | str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Load a gated checkpoint or an adapter checkpoint: the model with its gates, in eval mode, and its processor.

    Args:
        folder: made by `skipit export`, with or without `--adapter`.
        base: of an adapter: a copy of the model it was trained from, when it is not where the record says.
        budget: a calibrated operating point, which becomes the model's default one: what runs where a call names none,
            and what is saved as the default.
        **options: passed to transformers' `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        CheckpointError: neither of the two, damaged, not exported yet, or the base is another model.
        RouterConfigError: not a calibrated budget.
        InputError: `base` for a checkpoint that holds its own weights.
    """
    folder = Path(folder)
    check_exported(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, base, budget, options)
    if base is not None:
        raise InputError(f"`base`: got {str(base)!r}, but {folder} holds all weights itself. Leave it out.")
    return gated.load(folder, budget=budget, **options)


def load_with_dense(
    folder: str | Path, base: str | Path | None = None, *, budget: float | str | None = None
) -> tuple[Any, Any, Any]:
    """Load a gated checkpoint or an adapter, and the dense model to compare it with.

    Args:
        folder: made by `skipit export`, with or without `--adapter`.
        base: the dense model; None is the checkpoint's own weights without gates, or what the adapter was trained from.
            An adapter is loaded on it, too.
        budget: as of `load`.

    Returns:
        The gated model, its processor, and the dense model.

    Raises:
        CheckpointError: one of them cannot be loaded, or they do not belong together.
        RouterConfigError: not a calibrated budget.
    """
    folder = Path(folder)
    check_exported(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        source, options = _base_of(read_router(folder)[1], base)
        return *load(folder, base, budget=budget), gated.load_dense(source, **options)[0]
    source = str(folder) if base is None else resolve_model(str(base))
    return *load(folder, budget=budget), gated.load_dense(source)[0]


def _base_of(record: dict[str, Any], base: str | Path | None) -> tuple[str, dict[str, Any]]:
    """Where an adapter's base is, and the revision of it, if it is the recorded one."""
    revision = {"revision": record["revision"]} if base is None and record["revision"] else {}
    return resolve_model(str(base or record["model"])), revision


def _load_adapter(
    folder: Path, base: str | Path | None, budget: float | str | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    config, record = read_router(folder)
    config = config.at(budget)
    read_settings(folder)  # before the base: what is wrong is found in milliseconds
    source, revision = _base_of(record, base)
    model, processor = gated.load_dense(source, **{**revision, **options})
    _check_base(model, record, folder, str(base or record["model"]))
    attach(model, config)
    return merge_lora(model, folder), processor


def read_router(folder: Path) -> tuple[RouterConfig, dict[str, Any]]:
    """The router's settings of an adapter checkpoint, and what its base must be.

    Raises:
        CheckpointError: there are none, or the record of the base is not one.
        RouterConfigError: the settings are malformed.
    """
    path = folder / ROUTER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is an adapter without {ROUTER_FILE}: it has no gates. Make one with "
            "`skipit export RUN --adapter --out DIR`, or load it with PEFT alone."
        )
    values = load_json(path)
    base = values.get("base")
    names = ("model", "revision", "shapes", "fingerprint")
    if not isinstance(base, dict) or sorted(base) != sorted(names) or not isinstance(base["model"], str):
        raise CheckpointError(f"{path}: `base`: got {short(base)}, expected an object with {', '.join(names)}.")
    try:
        return RouterConfig.from_dict({name: value for name, value in values.items() if name not in OURS}), base
    except RouterConfigError as error:
        raise RouterConfigError(f"{path}: {error}") from error


def _check_base(model: nn.Module, record: dict[str, Any], folder: Path, source: str) -> None:
    if (shapes := shape_hash(model)) != record["shapes"]:
        raise CheckpointError(
            f"{folder} was trained on {record['model']!r}, whose tensors' names and shapes have hash "
            f"{record['shapes']}; {source!r} has {shapes}. Name a copy of that model: skipit.load(..., base=...)."
        )
    if fingerprint(model) != record["fingerprint"]:
        warnings.warn(
            f"{source!r} has the shapes of {record['model']!r} but other weights, or another dtype: "
            "answers may differ from those of the model the adapter was trained on.",
            stacklevel=4,
        )
