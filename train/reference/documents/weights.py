"""What is ours of the model, tower, projector and LoRA, in one file beside the decoder that is fetched."""

from pathlib import Path
from typing import Any

import torch

from skipit.router import CheckpointError
from skipit.router.folders import load_tensors

RANK, SCALE = 24, 2.0  # any file's rank is read: the scale does not depend on it
_PARTS = ("model.vision_tower.", "model.multi_modal_projector.")
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(model: Any) -> None:
    """Put LoRA into every linear map of the decoder's layers, to be trained; in fp32, whatever the decoder is in."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=_LINEAR)
    inject_adapter_in_model(settings, model.model.language_model)
    for name, parameter in model.model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # small steps would be lost in bf16


def our_weights(model: Any) -> dict[str, torch.Tensor]:
    """Tower, projector and LoRA of a trained model, in fp16."""
    return {
        name.replace(".default", ""): value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name.startswith(_PARTS) or ".lora_" in name
    }


def add_weights(model: Any, path: Path, lora: bool = True) -> Any:
    """A new model with our tower and projector, and our LoRA merged into its decoder.

    Args:
        model: it is changed and returned.
        path: as `our_weights` were saved.
        lora: False leaves the decoder as it is, for another LoRA to be trained.

    Raises:
        CheckpointError: the file lacks a tensor or has one of another shape; names it.
    """
    given = {name: value for name, value in load_tensors(path).items() if lora or name.startswith(_PARTS)}
    state = model.state_dict()
    changed = {name.removesuffix(".lora_A.weight") for name in given if name.endswith(".lora_A.weight")}
    wanted = {name for name in state if name.startswith(_PARTS)}
    wanted |= {f"{name}.lora_{part}.weight" for name in changed for part in "AB"}
    if wrong := wanted ^ set(given):
        what = "lacks" if min(wrong) in wanted else "has, without a place for it,"
        raise CheckpointError(f"{path} {what} `{min(wrong)}`.")
    with torch.no_grad():
        for name, value in state.items():
            change = given.get(name)
            if (weight := name.removesuffix(".weight")) in changed:
                # In double precision every machine rounds to the same weights, and so to the same fingerprint.
                up, down = (given[f"{weight}.lora_{part}.weight"].double() for part in "BA")
                change = value.double() + SCALE * up @ down
            if change is None:
                continue
            if change.shape != value.shape:
                raise CheckpointError(f"{path}: `{name}` has shape {list(change.shape)}, expected {list(value.shape)}.")
            value.copy_(change)
    return model.eval()
