"""Whether an artefact belongs to a model: a fingerprint of its decoder."""

import hashlib

import torch
from torch import nn

from skipit.router.decoder import find_decoder

from .sharded import whole


@torch.no_grad()
def fingerprint(model: nn.Module, layers: str | None = None) -> str:
    """A hash of the decoder layers' parameter names, shapes and a few values of each; gates and LoRA do not count.

    Sixteen values of every tensor, in fp32 rounded to three digits, tell two checkpoints apart without reading
    gigabytes, and survive a change of dtype in most cases only: profile in the dtype you run.
    """
    digest = hashlib.sha256()
    _, _, found = find_decoder(model, layers)
    for name, parameter in sorted(found.named_parameters()):
        if "layer_gate" in name or "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        with whole([parameter]):
            values = ["meta"] if parameter.is_meta else [f"{v:.3g}" for v in parameter.flatten()[:16].float().tolist()]
            digest.update(f"{name}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()[:16]
