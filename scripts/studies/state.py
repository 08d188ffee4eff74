"""A training that may be stopped at any time: its weights and optimizers in one file, replaced whole."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from skipit.router import CheckpointError

FILE = "state.safetensors"


def save_state(folder: Path, step: int, modules: Mapping[str, nn.Module], *optimizers: torch.optim.Optimizer) -> None:
    """Write weights and the optimizers' moments beside the last checkpoint, then rename: a killed run keeps that one.

    What does not require a gradient is not written: whoever loads it has it.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}/{key}": value.detach()
        for name, module in modules.items()
        for key, value in module.named_parameters()
        if value.requires_grad
    }
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{key}": value for key, value in state.items()}
    temporary = folder / f"{FILE}.tmp"
    contiguous = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(contiguous, temporary, metadata={"step": str(step)})
    os.replace(temporary, folder / FILE)


def load_state(folder: Path, modules: Mapping[str, nn.Module], *optimizers: torch.optim.Optimizer) -> int:
    """Continue where `save_state` left off; returns the step, 0 where nothing was saved.

    Raises:
        CheckpointError: what was saved is of another model.
    """
    from safetensors import safe_open

    path = folder / FILE
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        step = int(file.metadata()["step"])
    with torch.no_grad():
        for name, module in modules.items():
            for key, value in module.named_parameters():
                if value.requires_grad:
                    saved = tensors.get(f"{name}/{key}")
                    if saved is None or saved.shape != value.shape:
                        had = "none" if saved is None else list(saved.shape)
                        raise CheckpointError(
                            f"{path}: `{name}/{key}`: got {had}, expected {list(value.shape)}: it is of another model. "
                            "Train into another folder."
                        )
                    value.copy_(saved)
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{number}/"):
                _, _, index, field = key.split("/")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
