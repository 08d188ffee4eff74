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
from .config import EVERYTHING
from .costs import LayerCost
from .errors import InputError
from .gates import TokenGate, logits_of
from .spending import least_share, row_thresholds
from .stretch import Decision


@dataclass(frozen=True)
class Gated:
    """The learned gates: run where the logit exceeds `threshold`."""

    threshold: float = 0.0

    @property
    def skips_nothing(self) -> bool:
        """Whether no logit can be so low."""
        return self.threshold <= EVERYTHING

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where a gate's logit exceeds the threshold."""
        return _above(self.logits(layers, hidden, call, gates), self.threshold, call)

    def logits(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Float[Tensor, "layers batch seq"]:
        """What is compared with the threshold."""
        logits = logits_of(gates, hidden, call.modality, call.held)
        return call.pooled(layers, logits) if call.granularity == "sequence" else logits


@dataclass(frozen=True)
class GatedPerInput:
    """The learned gates, with a threshold for each row: its prompt spends a share of the dense decoder's FLOPs.

    Tokens after the prompt run where their logits exceed the threshold of their row, which is kept in the cache.
    """

    share: float
    costs: tuple[LayerCost, ...]

    @property
    def skips_nothing(self) -> bool:
        """Whether a prompt spends all there is to spend."""
        return self.share >= 1

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where a gate's logit exceeds the row's threshold.

        Raises:
            InputError: so little can no prompt spend, or no prompt has.
        """
        logits = logits_of(gates, hidden, call.modality, call.held)
        store = None if call.cache is None else call.cache.layers[0]
        if store is not None and call.past > 0:
            if store.threshold is None:
                raise InputError(
                    "`past_key_values`: budget_per='input' goes on with the threshold that the prompt has found, but "
                    "the prompt in this cache was run with budget_per='data'. Start from an empty cache."
                )
            threshold = store.threshold.to(logits.device)
        else:
            threshold = self._found(logits.detach(), call)
            if store is not None:
                store.threshold = threshold
        return _above(logits, threshold[:, None], call)

    def _found(self, logits: Float[Tensor, "layers batch seq"], call: Call) -> Float[Tensor, " batch"]:
        # Rows without padding, which are the longest; a shorter one that cannot spend so little runs nothing.
        least = least_share(self.costs, logits.shape[-1], call.kv, call.unit)
        if self.share <= least:
            raise InputError(
                f"`budget`: got {self.share:g}, expected more than {least:.3f}: so much of its FLOPs does a prompt of "
                f"{logits.shape[-1]} tokens spend when it skips every layer (unit {call.unit!r}, kv {call.kv!r})."
            )
        return row_thresholds(logits, call.prompt, call.position + 1, self.costs, call.kv, call.unit, self.share)


def _above(
    logits: Float[Tensor, "layers batch seq"], threshold: float | Float[Tensor, "batch 1"], call: Call
) -> Decision:
    wanted = call.step is not None or logits.requires_grad  # for a trace, or to learn
    probability = torch.sigmoid(logits - threshold) if wanted else None
    return Decision(logits > threshold, probability, None if call.capacity is None else logits.detach())


class LayerByLayer:
    """Base of policies that are written for one layer: those of a stretch are decided one after the other."""

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Decide for each layer; either all or none have a probability."""
        every = [self.decide_layer(layer, hidden, call, gate) for layer, gate in zip(layers, gates, strict=True)]
        stacked = (None if part[0] is None else torch.stack(part) for part in zip(*every, strict=True))
        return Decision(*stacked)  # type: ignore[arg-type]

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
