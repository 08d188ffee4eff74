"""Peers' ways of choosing who runs a layer, as policies of our engine, re-implemented from the formulas.

None keeps state on a module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.router import VISION, Decision, LayerByLayer, Step
from skipit.router.call import Call, Policy
from skipit.router.gates import TokenGate


@dataclass(frozen=True)
class UnitRates(LayerByLayer):
    """Units that run for a share of their tokens: `rate` [layers, modalities], 0 none, 1 all; else Bernoulli.

    The draw of a token is a hash of its place in the row, the layer and the seed: the same in a batch, padded, cached,
    and when it is asked again.
    """

    rate: Tensor
    seed: int = 0

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where the token's draw lies below its unit's rate."""
        return Decision(self.runs(layer, call.position, call.modality))

    def runs(self, layer: int, position: Tensor, modality: Tensor) -> Tensor:
        """Who runs a layer, bool, of the shape of `position`: places among the row's real tokens."""
        return uniform(position, layer, self.seed) < self.rate.to(position.device)[layer][modality]

    def planned(self, step: Step, **how: Any) -> Step:
        """A step of the same tokens as if this policy had decided in it; `how` are its `kv` and `unit`.

        Who runs depends on no state, so nothing need be executed to find out.
        """
        place = step.real.cumsum(-1) - 1
        run = {layer: Decision(self.runs(layer, place, step.modality)) for layer in range(len(self.rate))}
        return replace(step, decisions=run, **how)


def uniform(position: Tensor, layer: int, seed: int) -> Tensor:
    """A number in [0, 1) for every place in a row, fp64, of the shape of `position`: an integer hash, no state."""
    mask = 0xFFFFFFFF
    x = ((position + 1) * 0x9E3779B1 + (layer + 1) * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x ^ (x >> 16)).double() / 2**32


@dataclass(frozen=True)
class FixedMask(LayerByLayer):
    """What one call runs, written down: `run` bool [layers, batch, seq]. For a whole input without a cache."""

    run: Tensor

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where the mask says so."""
        return Decision(self.run[layer].to(hidden.device))


def over_tokens(
    run: Bool[Tensor, "layers batch seq"], real: Bool[Tensor, "batch seq"], seed: int
) -> Bool[Tensor, "layers batch seq"]:
    """Shuffle every row's decisions over its real tokens, layer by layer: as many run, but not the same ones."""
    noise = torch.rand(run.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    places = (~real).to(torch.uint8).argsort(dim=-1, stable=True).expand_as(run)  # the real ones first, in order
    shuffled = noise.masked_fill(~real, 2.0).argsort(-1)  # the real ones first, in any order
    return torch.zeros_like(run).scatter(-1, places, run.gather(-1, shuffled)) & real


def over_rows(run: Bool[Tensor, "layers batch seq"], real: Bool[Tensor, "batch seq"], seed: int) -> Tensor:
    """Shuffle every layer's decisions, one per row, over the rows: as many rows run, but not the same ones."""
    rows = run.any(-1)
    noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return rows.gather(1, noise.argsort(1))[..., None] & real


def over_layers(run: Bool[Tensor, "layers batch seq"], seed: int) -> Bool[Tensor, "layers batch seq"]:
    """Shuffle every token's decisions over the layers: it runs as many, but not the same ones."""
    noise = torch.rand(run.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return run.gather(0, noise.argsort(0))


def top_vision(
    scores: Float[Tensor, "batch seq"], vision: Bool[Tensor, "batch seq"], keep: float
) -> Bool[Tensor, "batch seq"]:
    """The floor(keep |V|) vision tokens of largest score of every row (the first among equals), and all others."""
    order = scores.masked_fill(~vision, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    # The small number: 0.3 * 10 is a little below 3 in binary.
    kept = (keep * vision.sum(-1, keepdim=True) + 1e-6).floor()
    return (rank < kept) | ~vision


@dataclass(frozen=True)
class TopVision(LayerByLayer):
    """p-MoD's choice: of each layer's vision tokens the share `keep` [layers] that its gate scores highest.

    With a `seed` they are random ones, other ones in each layer: the control.
    """

    keep: Tensor
    seed: int | None = None
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a token is text or among the best."""
        vision = (call.modality == VISION) & call.real
        if not bool(vision.any()) or self.keep[layer] >= 1:
            return Decision(torch.ones_like(call.real))
        random = self.seed is not None
        scores = (
            uniform(call.position, layer, self.seed or 0).float() if random else gate(hidden, call.modality).detach()
        )
        return Decision(top_vision(scores, vision, float(self.keep[layer])))


@dataclass(frozen=True)
class SequenceRouter(LayerByLayer):
    """One decision per row and layer, from the mean over the row's real prompt tokens: Router-Tuning's, LayerRoute's.

    g = 1[sigmoid(w . mean n(x) + b) > sigmoid(threshold)], straight-through; held for what is generated. Layers before
    `first` and from `end` on have no router and run.
    """

    first: int
    end: int
    threshold: float = 0.0
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where the row's mean logit exceeds the threshold."""
        if not self.first <= layer < self.end:
            return Decision(torch.ones_like(call.real))
        alike = torch.zeros_like(call.modality)  # one decision: the modalities share a gate, and are pooled together
        alone = range(layer, layer + 1)
        logits = replace(call, modality=alike).pooled(alone, gate(hidden, alike)[None])[0] - self.threshold
        return Decision(logits > 0, torch.sigmoid(logits))


@dataclass(frozen=True)
class Watched:
    """A policy whose decisions are also collected, with their gradients: what a loss on the gates needs.

    Attributes:
        policy: that decides.
        seen: receives one entry per layer, [batch, seq]: 1 where a token runs, 0 where it skips, straight-through.
        soft: receive the probabilities instead, and let the decisions have no gradient: what runs is scaled by them.
    """

    policy: Policy
    seen: list[Tensor]
    soft: bool = False

    def decide(self, layers: range, hidden: Tensor, call: Call, gates: Sequence[TokenGate]) -> Decision:
        """Decide as the policy does."""
        decision = self.policy.decide(layers, hidden, call, gates)
        if self.soft and decision.probability is not None:
            self.seen.extend(decision.probability)
            return Decision(decision.run)
        weight = decision.straight_through()
        self.seen.extend(decision.run.float() if weight is None else weight)
        return decision

    def __getattr__(self, name: str) -> Any:
        """What else the policy has: its decision points."""
        return getattr(self.policy, name)


def unwatched(policy: Policy) -> Policy:
    """The policy itself, for those who ask it a second time."""
    return policy.policy if isinstance(policy, Watched) else policy
