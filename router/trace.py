"""A record of what ran: for every call of the model, every layer and every token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import KVPolicy, Unit
from .policies import Decision


@dataclass
class Step:
    """One call of the model (a prefill, or one decoding step).

    Attributes:
        modality: int64 [batch, seq], 0 text, 1 vision.
        real: bool [batch, seq], False at padding.
        past: tokens per row already in the cache, padding counted.
        kv: what became of the keys and values of skipped tokens.
        unit: what they skipped.
        decisions: by layer index; the first one counts when gradient checkpointing replays a layer.
    """

    modality: Tensor
    real: Tensor
    past: int
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    decisions: dict[int, Decision] = field(default_factory=dict)

    @property
    def run(self) -> Tensor:
        """Bool [layers, batch, seq]: which token ran which layer; False at padding."""
        return torch.stack([decision.run.to(self.real.device) for decision in self._ordered()]) & self.real

    @property
    def probability(self) -> Tensor:
        """fp32 [layers, batch, seq] with gradient: the gates' run probabilities; a fixed decision counts as 0 or 1."""
        every = [d.run.float() if d.probability is None else d.probability for d in self._ordered()]
        return torch.stack([probability.to(self.real.device) for probability in every])

    def _ordered(self) -> list[Decision]:
        return [self.decisions[layer] for layer in sorted(self.decisions)]


@dataclass
class Trace:
    """The steps of the calls made while the trace was active, in order."""

    steps: list[Step] = field(default_factory=list)
