"""A gated checkpoint: a normal Hugging Face folder with the gates and the router's settings beside the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artefact import load_tensors, new_directory, save_json, save_tensors
from .attach import attach, detach, find_router, gate_state, set_gates
from .config import RouterConfig
from .errors import CheckpointError, SkipItError

ROUTER_FILE = "router_config.json"
GATES_FILE = "gates.safetensors"


def save_router(folder: Path, config: RouterConfig, gates: dict[str, Tensor]) -> None:
    """Write the router's settings and gates into a folder."""
    save_json(folder / ROUTER_FILE, config.to_dict())
    save_tensors(folder / GATES_FILE, gates)


def load_router(folder: Path) -> tuple[RouterConfig, dict[str, Tensor]]:
    """Read the router's settings and gates.

    Raises:
        CheckpointError: a file is missing, damaged, or has other tensors than `weight` and `bias`, or NaN in them.
        RouterConfigError: the settings are malformed.
    """
    if not (folder / ROUTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {ROUTER_FILE}: it is not a gated checkpoint. Make one with `skipit export RUN --out DIR`."
        )
    config = RouterConfig.from_file(folder / ROUTER_FILE)
    gates = load_tensors(folder / GATES_FILE)
    if set(gates) != {"weight", "bias"}:
        raise CheckpointError(f"{folder / GATES_FILE}: got tensors {sorted(gates)}, expected bias and weight.")
    for name, tensor in gates.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / GATES_FILE}: `{name}` has values that are not finite.")
    return config, gates


def attach_from(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach the gates stored in a folder to a loaded model.

    Raises:
        CheckpointError: the files are damaged or the gates are another model's.
    """
    config, gates = load_router(Path(folder))
    attach(model, config)
    try:
        set_gates(model, **gates)
    except SkipItError as error:
        detach(model)  # nothing half-loaded
        raise CheckpointError(f"{Path(folder) / GATES_FILE}: {error}") from error
    return model


def save_gated(
    model: Any, processor: Any, out: str | Path, *, card: str | None = None, overwrite: bool = False
) -> None:
    """Write a gated model as a folder that transformers loads as the dense model and `load` as the gated one.

    The weights are saved by the model itself, without its gates, so the folder holds what any tool expects.

    Args:
        model: a gated transformers model, LoRA merged.
        processor: its processor, or None.
        out: folder to make.
        card: text of the README.md inside.
        overwrite: replace an existing folder.
    """
    config, gates = find_router(model)[1].config, gate_state(model)
    with new_directory(out, overwrite) as folder:
        detach(model)
        try:
            model.save_pretrained(folder)
        finally:
            attach(model, config)
            set_gates(model, **gates)
        if processor is not None:
            processor.save_pretrained(folder)
        save_router(folder, config, gates)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")


def load(folder: str | Path, **options: Any) -> tuple[Any, Any]:
    """Load a gated checkpoint: the model with its gates, in eval mode, and its processor.

    Args:
        folder: made by `save_gated` or `skipit export`.
        **options: passed to transformers' `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        CheckpointError: not a gated checkpoint, or damaged.
    """
    load_router(Path(folder))  # before the weights: a broken router is found in milliseconds
    model, processor = load_dense(folder, **options)
    return attach_from(model, folder), processor


def load_dense(source: str | Path, **options: Any) -> tuple[Any, Any]:
    """Load any vision-language model and its processor, from a folder or a Hub id.

    Raises:
        CheckpointError: transformers cannot load it; the message says why.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(source, **options)
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"model {str(source)!r} cannot be loaded: {error}\n"
            "Give a folder with config.json and safetensors weights, a Hub id, or `reference` for the embedded model."
        ) from error
    return model.eval(), processor
