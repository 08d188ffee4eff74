"""Peers' ways of choosing who runs a layer, as policies of our engine, re-implemented from the formulas.

None keeps state on a module. What one layer finds out for later ones is kept with the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import VISION, Decision, LayerByLayer, SkipItError, gated_layers
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.call import KWARG, Call, Policy
from skipit.router.gates import TokenGate

_MASS = "vision_attention"  # where FastV keeps what its layer saw, among the attributes of a call


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
class FastV(LayerByLayer):
    """After layer `layer`, the share `keep` of a row's vision tokens that its last prompt token attends to most.

    The rest leave, for all later layers: `kv="evict"`. The attention is what the layer itself computes, mean over
    heads; `watch_attention` must have been called for that layer.
    """

    layer: int
    keep: float
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a token is text or attended to."""
        vision = (call.modality == VISION) & call.real
        if layer <= self.layer or not bool(vision.any()):
            return Decision(torch.ones_like(call.real))
        if _MASS not in vars(call):
            raise SkipItError(
                f"FastV: nobody watched layer {self.layer} in this call. Call `watch_attention(model, {self.layer})` "
                "first, and keep the decoder on one device."
            )
        return Decision(top_vision(vars(call)[_MASS], vision, self.keep))


def watch_attention(model: nn.Module, layer: int) -> Any:
    """Let a layer write down, with each call, how much the last prompt token attends to every token.

    Returns:
        A handle whose `remove()` ends it.
    """

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        call = kwargs.get(KWARG)
        if not isinstance(call, Call) or not bool((call.modality == VISION).any()):
            return None
        return args, {**kwargs, OBSERVER_KWARG: _observer(call)}

    return gated_layers(model)[layer].register_forward_pre_hook(watch, with_kwargs=True)


def _observer(call: Call) -> Any:
    """What packed attention calls with a layer's queries and keys, [batch, heads, tokens, head_dim]."""

    @torch.no_grad()
    def observe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        batch, tokens = call.real.shape
        rows = torch.arange(batch, device=query.device)
        last = torch.arange(tokens, device=query.device).expand(batch, -1).masked_fill(~call.prompt, -1).amax(-1)
        last = last.clamp(min=0)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        asked = query[rows, :, last][:, :, None]
        scores = (asked @ key.transpose(-1, -2)).float()[:, :, 0] * (
            query.shape[-1] ** -0.5 if scaling is None else scaling
        )
        allowed = torch.arange(key.shape[2], device=key.device) <= (key.shape[2] - tokens + last)[:, None]
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        if mask is not None:
            seen = mask.expand(batch, -1, -1, -1)[rows, 0, last][:, None]
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        vars(call)[_MASS] = torch.softmax(scores, dim=-1).mean(1)[:, -tokens:]
        return mask

    return observe


@dataclass(frozen=True)
class TopVision(LayerByLayer):
    """p-MoD's choice: of each layer's vision tokens the share `keep` [layers] that its gate scores highest."""

    keep: Tensor
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a token is text or among the best."""
        vision = (call.modality == VISION) & call.real
        if not bool(vision.any()) or self.keep[layer] >= 1:
            return Decision(torch.ones_like(call.real))
        return Decision(top_vision(gate(hidden, call.modality).detach(), vision, float(self.keep[layer])))


@dataclass(frozen=True)
class SequenceRouter(LayerByLayer):
    """Router-Tuning's choice: one decision per row and layer, from the mean over the row's real prompt tokens.

    g = 1[sigmoid(w . mean n(x) + b) > sigmoid(threshold)], straight-through; held for what is generated. Only the last
    half of the layers have a router, and of these not the final one.
    """

    layers: int
    threshold: float = 0.0
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where the row's mean logit exceeds the threshold."""
        if not self.layers // 2 <= layer < self.layers - 1:
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
