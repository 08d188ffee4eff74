"""What a profile and a plan hold, checked where they are read back: a damaged number must not become a plan."""

from pathlib import Path
from sys import float_info
from typing import Any, get_args

import torch
from torch import Tensor

from skipit.router.checkpoint import check_gates
from skipit.router.config import KVPolicy
from skipit.router.errors import CheckpointError, short
from skipit.router.modality import MODALITIES

from .plan import Init, Plan, SpanMode

_COUNTED = ("histogram", "count")


def check_profile(path: Path, values: dict[str, Any], tables: dict[str, Tensor]) -> None:
    """Refuse tables that are not of as many layers as the costs, or not of their types.

    Args:
        path: the folder, for the message.
        values: of profile.json.
        tables: of profile.safetensors.

    Raises:
        CheckpointError: names what is wrong.
    """
    costs, about = values["costs"], values["about"]
    if not (isinstance(costs, list) and costs and all(isinstance(layer, dict) for layer in costs)):
        raise CheckpointError(f"{path}: `costs`: got {short(costs)}, expected one object per layer.")
    for layer in costs:
        for key, value in layer.items():
            if not (type(value) in (int, float) and 0 <= value <= float_info.max):
                raise CheckpointError(f"{path}: `costs`: `{key}`: got {short(value)}, expected a number of FLOPs.")
    _check_about(path, values["model"], about)
    measured = tables.get("count")
    for name, table in tables.items():
        if table.is_floating_point() is (name in _COUNTED) or table.dtype == torch.bool:
            raise CheckpointError(f"{path}: table `{name}` has dtype {table.dtype}.")
        if tuple(table.shape[:2]) not in ((len(costs), len(MODALITIES)), (len(costs),)):
            raise CheckpointError(f"{path}: table `{name}` has shape {tuple(table.shape)} for {len(costs)} layers.")
        # A unit without tokens has no measure, and some fits have none.
        missing = table.double().isnan()
        wrong = missing & (measured > 0) if measured is not None and table.shape == measured.shape else missing
        if bool(table.double().isinf().any()) or (not name.startswith("ridge_") and bool(wrong.any())):
            raise CheckpointError(f"{path}: table `{name}` has values that are not finite.")


def check_plan(path: Path, plan: Plan, tensors: set[str]) -> None:
    """Refuse a plan whose gates are no gates, or whose settings are none.

    Args:
        path: the folder, for the message.
        plan: as it was read.
        tensors: the names in its safetensors.

    Raises:
        CheckpointError: names what is wrong.
    """
    if tensors != {"weight", "bias", "run_rate"}:
        raise CheckpointError(f"{path}: got tensors {sorted(tensors)}, expected bias, run_rate and weight.")
    check_gates(path, {"weight": plan.weight, "bias": plan.bias, "run_rate": plan.run_rate})
    shapes = tuple(plan.weight.shape[:2]), tuple(plan.bias.shape), tuple(plan.run_rate.shape)
    if plan.weight.dim() != 3 or len(set(shapes)) != 1 or plan.bias.shape[-1] != len(MODALITIES):
        raise CheckpointError(f"{path}: its gates have shapes {tuple(plan.weight.shape)}, {shapes[1]} and {shapes[2]}.")
    if not (type(plan.budget) in (int, float) and 0 < plan.budget <= 1):
        raise CheckpointError(f"{path}: `budget`: got {short(plan.budget)}, expected a number in (0, 1].")
    inits = (*get_args(Init), *get_args(SpanMode))
    for name, value, known in (("kv", plan.kv, get_args(KVPolicy)), ("init", plan.init, inits)):
        if value not in known:
            raise CheckpointError(f"{path}: `{name}`: got {short(value)}, expected one of {', '.join(known)}.")
    _check_about(path, plan.model, plan.about)


def _check_about(path: Path, model: Any, about: Any) -> None:
    for name, value, kind in (("model", model, str), ("about", about, dict)):
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: `{name}`: got {short(value)}, expected a {kind.__name__}.")
