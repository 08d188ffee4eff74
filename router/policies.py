"""Who decides which token runs which layer: the learned gates, or a fixed set of units.

Baselines are policies of the same engine, so a comparison never compares two implementations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .gates import TokenGate

if TYPE_CHECKING:
    from .call import Call


class Decision(NamedTuple):
    """What a policy decides about the tokens of one layer.

    Attributes:
        run: bool [batch, seq], True where the token runs the layer.
        probability: fp32 [batch, seq] with gradient, for straight-through training; None for fixed decisions.
    """

    run: Tensor
    probability: Tensor | None = None

    def straight_through(self) -> Tensor | None:
        """1 where a token runs, 0 where it skips, with the probability's gradient; None where there is no gradient."""
        if self.probability is None or not (torch.is_grad_enabled() and self.probability.requires_grad):
            return None
        return self.run + (self.probability - self.probability.detach())


class Policy(Protocol):
    """Decides, before a layer runs, which tokens run it. Deterministic, and causal: a token's own past only."""

    def decide(self, layer: int, hidden: Tensor, call: "Call", gate: TokenGate) -> Decision:
        """Decide for the states `hidden` [batch, seq, dim] that enter `layer`."""
        ...


@dataclass(frozen=True)
class Gated:
    """The learned gates: run where the logit exceeds `threshold`."""

    threshold: float = 0.0

    def decide(self, layer: int, hidden: Tensor, call: "Call", gate: TokenGate) -> Decision:
        """Run where the gate's logit exceeds the threshold."""
        logits = gate(hidden, call.modality) - self.threshold
        if call.granularity == "sequence":
            logits = call.pooled(layer, logits)
        wanted = call.step is not None or logits.requires_grad  # for a trace, or to learn
        return Decision(logits > 0, torch.sigmoid(logits) if wanted else None)


@dataclass(frozen=True)
class FixedUnits:
    """A fixed set of (layer, modality) units: `run` is bool [layers, modalities], the same for every input."""

    run: Tensor

    def decide(self, layer: int, hidden: Tensor, call: "Call", gate: TokenGate) -> Decision:
        """Run where the table says so for the token's modality."""
        return Decision(self.run.to(hidden.device)[layer][call.modality])
