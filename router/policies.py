"""Who decides which token runs which layer: the learned gates, or a fixed set of units.

Baselines are policies of the same engine, so a comparison never compares two implementations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .call import Call
from .gates import TokenGate, logits_of
from .stretch import Decision


@dataclass(frozen=True)
class Gated:
    """The learned gates: run where the logit exceeds `threshold`."""

    threshold: float = 0.0

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where a gate's logit exceeds the threshold."""
        logits = logits_of(gates, hidden, call.modality)
        if call.granularity == "sequence":
            logits = call.pooled(layers, logits)
        wanted = call.step is not None or logits.requires_grad  # for a trace, or to learn
        return Decision(logits > self.threshold, torch.sigmoid(logits - self.threshold) if wanted else None)


class LayerByLayer:
    """Base of policies that are written for one layer: those of a stretch are decided one after the other."""

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Decide for each layer; either all or none have a probability."""
        every = [self.decide_layer(layer, hidden, call, gate) for layer, gate in zip(layers, gates, strict=True)]
        run, probability = zip(*every, strict=True)
        return Decision(torch.stack(run), None if probability[0] is None else torch.stack(probability))

    def decide_layer(self, layer: int, hidden: Float[Tensor, "batch seq dim"], call: Call, gate: TokenGate) -> Decision:
        """Decide for one layer, from the states at its decision point."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedUnits:
    """A fixed set of (layer, modality) units, the same for every input."""

    run: Bool[Tensor, "layers modalities"]
    decide_at: ClassVar = (0,)

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where the table says so for the token's modality."""
        return Decision(self.run.to(hidden.device)[layers.start : layers.stop][:, call.modality])
