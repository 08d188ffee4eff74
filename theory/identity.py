"""Whether an artefact belongs to a model: a fingerprint of its decoder."""

import hashlib

import torch
from torch import nn

from skipit.router.decoder import find_decoder

from .sharded import unsharded


@torch.no_grad()
def fingerprint(model: nn.Module, layers: str | None = None) -> str:
    """A hash of the decoder layers' parameter names, shapes and a few values of each; gates and LoRA do not count.

    Sixteen values of every tensor, rounded to bf16, tell two checkpoints apart without reading gigabytes, and one that
    is loaded in bf16 from itself in fp32 not.
    """
    digest = hashlib.sha256()
    _, _, decoder_layers = find_decoder(model, layers)
    for name, parameter in sorted(decoder_layers.named_parameters()):
        if "layer_gate" in name or "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        with unsharded([parameter]):
            values = ["meta"] if parameter.is_meta else parameter.flatten()[:16].bfloat16().tolist()
            digest.update(f"{name}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()[:16]
