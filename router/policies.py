"""Who decides which token runs which layer: the learned gates, or a fixed set of units.

Baselines are policies of the same engine, so a comparison never compares two implementations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .call import Call, Decision
from .gates import TokenGate


@dataclass(frozen=True)
class Gated:
    """The learned gates: run where the logit exceeds `threshold`."""

    threshold: float = 0.0

    def decide(self, layer: int, hidden: Float[Tensor, "batch seq dim"], call: Call, gate: TokenGate) -> Decision:
        """Run where the gate's logit exceeds the threshold."""
        logits = gate(hidden, call.modality) - self.threshold
        if call.granularity == "sequence":
            logits = call.pooled(layer, logits)
        wanted = call.step is not None or logits.requires_grad  # for a trace, or to learn
        return Decision(logits > 0, torch.sigmoid(logits) if wanted else None)


@dataclass(frozen=True)
class FixedUnits:
    """A fixed set of (layer, modality) units, the same for every input."""

    run: Bool[Tensor, "layers modalities"]

    def decide(self, layer: int, hidden: Float[Tensor, "batch seq dim"], call: Call, gate: TokenGate) -> Decision:
        """Run where the table says so for the token's modality."""
        return Decision(self.run.to(hidden.device)[layer][call.modality])
