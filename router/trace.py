"""A record of what ran: for every call of the model, every layer and every token."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .config import KVPolicy, Unit
from .policies import Decision


class ImageStates(NamedTuple):
    """What a cross-attention layer attends to, per row: states of images, which are no tokens.

    Attributes:
        held: all there are in this call; 0 where there is no image, and the model leaves such layers out.
        new: those among them whose keys and values were made in this call.
    """

    held: int = 0
    new: int = 0


NO_IMAGES = ImageStates()


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
        layers: of the model; those without a decision were left out by the model itself, and no token ran them. 0
            stands for as many as have one.
        images: what cross-attention layers attend to.
    """

    modality: Tensor
    real: Tensor
    past: int
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    decisions: dict[int, Decision] = field(default_factory=dict)
    layers: int = 0
    images: ImageStates = NO_IMAGES

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
        absent = Decision(torch.zeros_like(self.real))
        return [self.decisions.get(layer, absent) for layer in range(self.layers or len(self.decisions))]


@dataclass
class Trace:
    """The steps of the calls made while the trace was active, in order."""

    steps: list[Step] = field(default_factory=list)
