"""LoRA and gates in PEFT's format: checked by settings, names, shapes and numbers, then merged into the weights.

PEFT does much of what a file asks for: it computes new base weights, imports by name, runs any regular expression and
makes matrices of any rank. Here a file is held against the one thing that `skipit train` writes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sys import float_info
from typing import Any

from torch import nn

from skipit.router.checkpoint import check_finite, check_gates
from skipit.router.errors import CheckpointError, short
from skipit.router.files import FLOATING
from skipit.router.folders import load_json, load_tensors, read_header
from skipit.router.gates import TokenGate

from .card import ADAPTER_CONFIG

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_GATE = "layer_gate"
# What says where an adapter is from; nothing is done with it.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"}
# The shape of what `lora_targets` writes, whose matching takes time in proportion to a name's length.
_TARGETS = re.compile(r"\(\.\*\\\.\)\?(?:[\w-]|\\[.-])+\\\.\\d\+\\\.\((?:[\w-]|\\[.-]|\|)+\)")


def merge_lora(model: Any, folder: Path) -> Any:
    """A gated model with an adapter's LoRA merged into its weights and the adapter's gates.

    Args:
        model: the base, with gates attached; it is changed.
        folder: of the adapter.

    Raises:
        CheckpointError: as of `load_lora`.
    """
    with _needed(folder):
        merged = load_lora(model, folder).merge_and_unload()
    check_finite(str(folder), merged)
    return merged.eval()


def load_lora(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """A gated model as PEFT's, with an adapter's LoRA beside its weights and the adapter's gates.

    Args:
        model: the base, with gates attached; it is changed.
        folder: of the adapter.
        trainable: whether LoRA and gates are to learn.

    Raises:
        CheckpointError: the adapter is damaged, not of this model, or asks for more than LoRA; names file and key.
    """
    from peft import LoraConfig, PeftModel

    if not folder.is_dir():
        raise CheckpointError(f"{folder} cannot be loaded: there is no such folder.")
    settings, path = read_settings(folder), folder / ADAPTER_WEIGHTS
    _check_places(path, _places(model, settings))
    check_gates(path, load_tensors(path))
    config = LoraConfig(**settings, modules_to_save=[_GATE], bias="none")
    with _needed(folder):
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)


@contextmanager
def _needed(folder: Path) -> Iterator[None]:
    """Whatever goes wrong within, the file is not what the model needs."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason[:300]}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Rank, scale and targets of an adapter; everything else must be what it is where nothing is set.

    Raises:
        CheckpointError: names the first setting that is not known, or whose value is not, or that the weights belie.
    """
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    values, defaults = load_json(path), LoraConfig().to_dict()
    known = {
        "peft_type": (lambda value: value == "LORA", "'LORA'"),
        "r": (lambda value: type(value) is int and value > 0, "a positive whole number"),
        "lora_alpha": (lambda value: type(value) in (int, float) and 0 < value <= float_info.max, "a positive number"),
        "target_modules": (_linear_time, "the pattern that `skipit train` writes"),
        "modules_to_save": (lambda value: value == [_GATE], repr([_GATE])),
        "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to 1"),
        "init_lora_weights": (lambda value: value in (True, False), "true: weights are read, not made"),
    }
    for key in ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save"):
        if key not in values:
            raise CheckpointError(f"{path}: `{key}` is missing, expected {known[key][1]}.")
    for key, value in values.items():
        if key in known:
            fits, expected = known[key]
            if not fits(value):
                raise CheckpointError(f"{path}: `{key}`: got {short(value)}, expected {expected}.")
        elif key not in _ABOUT and value and value != defaults.get(key):
            raise CheckpointError(f"{path}: `{key}`: got {short(value)}, which skipit does not load: leave it out.")
    for name, (dtype, shape) in read_header(folder / ADAPTER_WEIGHTS).items():
        if dtype not in FLOATING:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: `{name}` is stored as {dtype}, expected floating-point numbers."
            )
        if name.endswith(".lora_A.weight") and shape[:1] != (values["r"],):
            raise CheckpointError(f"{path}: `r`: got {short(values['r'])}, but `{name}` has shape {shape}.")
    return {key: values[key] for key in ("r", "lora_alpha", "target_modules")}


def _linear_time(targets: Any) -> bool:
    return isinstance(targets, str) and _TARGETS.fullmatch(targets) is not None


def _places(model: nn.Module, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors an adapter must hold for a model, by name, with their shapes."""
    rank, targets = settings["r"], re.compile(settings["target_modules"])
    places: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TokenGate):
            places |= {f"{name}.{key}": tuple(value.shape) for key, value in module.named_parameters()}
        elif isinstance(module, nn.Linear) and targets.fullmatch(name):
            places[f"{name}.lora_A.weight"] = (rank, module.in_features)
            places[f"{name}.lora_B.weight"] = (module.out_features, rank)
    return {f"base_model.model.{name}": shape for name, shape in places.items()}


def _check_places(path: Path, places: dict[str, tuple[int, ...]]) -> None:
    header = read_header(path)
    if wrong := set(header) ^ set(places):
        what = "lacks" if min(wrong) in places else "has, without a place for it,"
        raise CheckpointError(f"{path} {what} `{min(wrong)}`.")
    for name, stored in header.items():
        if stored.shape != places[name]:
            raise CheckpointError(f"{path}: `{name}` has shape {stored.shape}, but the model makes it {places[name]}.")
