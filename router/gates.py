"""The gate of one layer: a linear score per token, with weights of its own for each modality."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .modality import MODALITIES


def normalize(hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Scale each state to root mean square 1, in fp32: what the gates read, whatever a layer's own norm does."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)


class TokenGate(nn.Module):
    """Scores tokens: z = w[m] . n(x) + b[m] for a token x of modality m, always in fp32.

    A token runs the layer when z exceeds the threshold. A new gate lets everything run: w = 0, b = `OPEN`.
    """

    OPEN = 4.0

    def __init__(self, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(torch.zeros(len(MODALITIES), hidden_size))
        self.bias = nn.Parameter(torch.full((len(MODALITIES),), self.OPEN))

    def forward(
        self, hidden: Float[Tensor, "batch seq dim"], modality: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Gate logits of every token."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(normalize(hidden), self.weight.float(), self.bias.float())
        return scores.gather(-1, modality[..., None]).squeeze(-1)


class Stacked(NamedTuple):
    """Parameters of several gates, one below the other, in fp32."""

    weight: Float[Tensor, "rows dim"]
    bias: Float[Tensor, " rows"]


def _plain(gate: nn.Module) -> bool:
    """Whether nothing waits for the gate to be called, as hooks of ZeRO-3 and of offloading do."""
    hooked = gate._forward_pre_hooks or gate._forward_hooks or "forward" in vars(gate)
    return type(gate) is TokenGate and not hooked


def logits_of(
    gates: Sequence[TokenGate],
    hidden: Float[Tensor, "batch seq dim"],
    modality: Int[Tensor, "batch seq"],
    held: dict[nn.Module, Stacked] | None = None,
) -> Float[Tensor, "layers batch seq"]:
    """Logits of gates that read the same states: one linear map, where nothing waits for each to be called.

    Args:
        gates: of consecutive layers.
        hidden: what they read.
        modality: 0 text, 1 vision.
        held: keeps their parameters together while none changes, by the first gate; None keeps nothing.
    """
    stacked = None if held is None else held.get(gates[0])
    if stacked is None:
        if not all(map(_plain, gates)):
            return torch.stack([gate(hidden, modality).to(hidden.device) for gate in gates])
        every = ([getattr(gate, name).to(hidden.device) for gate in gates] for name in ("weight", "bias"))
        stacked = Stacked(*(torch.cat(parameters).float() for parameters in every))
        if held is not None and not torch.is_grad_enabled():
            held[gates[0]] = stacked
    # Entering the context takes longer than scoring a token.
    device = hidden.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        scores = F.linear(normalize(hidden), *stacked).unflatten(-1, (len(gates), -1))
    chosen = modality[..., None, None].expand(*scores.shape[:-1], 1)
    return scores.gather(-1, chosen).squeeze(-1).permute(2, 0, 1)
