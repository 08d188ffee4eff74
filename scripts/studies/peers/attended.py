"""Peers that drop the vision tokens to which a prompt's last token attends least: FastV and PyramidDrop.

Re-implemented from the formulas. The attention is what a layer itself computes, mean over heads. It is kept with the
call, not on a module.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import VISION, Decision, LayerByLayer, SkipItError, Step, gated_layers
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.call import KWARG, Call
from skipit.router.gates import TokenGate
from skipit.router.layout import Layout

from .policies import top_vision, uniform

# What makes `Call.prompt` the prompt also where answers are part of the input, which must not choose for it.
BY_PROMPT = {"granularity": "sequence"}
FASTV_LAYER = 1  # the second layer's attention, as the authors' K = 2
STAGES = 4  # of PyramidDrop
_MASS = "vision_attention"  # where a call has what its watched layers saw, by layer


@dataclass(frozen=True)
class Attended(LayerByLayer):
    """After some layers only those of a row's vision tokens stay that its last prompt token attends to most there.

    The others leave for all later layers: `kv="evict"`. `watch_attention` must have been called for these layers.

    Attributes:
        stages: (layer, share of all vision tokens that stays after it), ascending in layers and descending in shares.
        seed: of random tokens in the place of those attended to, the control; None is attention.
    """

    stages: tuple[tuple[int, float], ...]
    seed: int | None = None
    decide_at: ClassVar = None

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a token is text or has stayed."""
        vision = (call.modality == VISION) & call.real
        if not bool(vision.any()):
            return Decision(torch.ones_like(call.real))
        return Decision(self._stays(layer, vision, lambda watched: self._scores(watched, call)))

    def planned(self, step: Step) -> Step:
        """A step as if this policy had decided in it; the first tokens stay, since which ones costs the same."""
        vision = (step.modality == VISION) & step.real
        like = vision.float()
        run = {layer: Decision(self._stays(layer, vision, lambda _: like)) for layer in step.decisions}
        return replace(step, kv="evict", decisions=run)

    def _stays(
        self, layer: int, vision: Bool[Tensor, "batch seq"], scores: Callable[[int], Tensor]
    ) -> Bool[Tensor, "batch seq"]:
        stays = torch.ones_like(vision)
        for watched, keep in self.stages:
            if layer > watched:  # who has left stays away
                stays = top_vision(scores(watched).masked_fill(~stays, -1.0), vision, keep)
        return stays

    def _scores(self, layer: int, call: Call) -> Float[Tensor, "batch seq"]:
        if self.seed is not None:
            return uniform(call.position, -1, self.seed).float()
        seen = vars(call).get(_MASS, {})
        if layer not in seen:
            raise SkipItError(
                f"Attended: nobody watched layer {layer} in this call. Call `watch_attention(model, [{layer}])` first, "
                "and keep the decoder on one device."
            )
        found: Tensor = seen[layer]
        return found


def fastv(keep: float, seed: int | None = None) -> Attended:
    """FastV (arXiv 2403.06764): after layer K = 2 the share `keep` of the vision tokens.

    Those stay whose mean attention over heads from the last prompt token is largest there: as the authors have it.
    """
    return Attended(((FASTV_LAYER, keep),), seed)


def pyramid_drop(keep: float, layers: int, seed: int | None = None) -> Attended:
    """PyramidDrop (arXiv 2410.17247): S = 4 stages of equal depth; after stage s the share lambda^s stays.

    lambda is `keep`, 0.5 by the authors. They rank by the next stage's first attention; here it is the last of the
    stage, which is computed anyway.

    Example:
        >>> pyramid_drop(0.5, 12).stages
        ((2, 0.5), (5, 0.25), (8, 0.125))
    """
    return Attended(tuple((s * layers // STAGES - 1, keep**s) for s in range(1, STAGES)), seed)


def watch_attention(model: nn.Module, layers: Iterable[int]) -> list[Any]:
    """Let layers write down, with each call, how much the last prompt token attends to every token.

    Returns:
        Handles whose `remove()` ends it.
    """

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        call = kwargs.get(KWARG)
        if not isinstance(call, Call) or not bool((call.modality == VISION).any()):
            return None
        return args, {**kwargs, OBSERVER_KWARG: _observer(call, module.skipit_index)}

    every = gated_layers(model)
    return [every[layer].register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]


def _observer(call: Call, layer: int) -> Any:
    """What packed attention calls with a layer's queries and keys, [batch, heads, tokens, head_dim]."""

    @torch.no_grad()
    def observe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        batch, width = call.real.shape
        device = query.device
        last = torch.arange(width, device=device).expand(batch, -1).masked_fill(~call.prompt, -1).amax(-1).clamp(min=0)
        stretch, layout = call.stretches[layer], None
        if call.mode == "gathered" and not stretch.everyone(layer):  # packed: who has left is not there
            layout = stretch.layout(layer)
            query, width, last = (
                layout.to_rows(query),
                layout.width,
                (layout.index == last[:, None]).int().argmax(-1),
            )
        rows = torch.arange(batch, device=device)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        asked = query[rows, :, last][:, :, None]
        scores = (asked @ key.transpose(-1, -2)).float()[:, :, 0] * (
            query.shape[-1] ** -0.5 if scaling is None else scaling
        )
        allowed = torch.arange(key.shape[2], device=device) <= (key.shape[2] - width + last)[:, None]
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        if mask is not None:
            seen = mask.expand(batch, -1, -1, -1)[rows, 0, last][:, None]
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        mass = torch.softmax(scores, dim=-1).mean(1)[:, -width:]
        vars(call).setdefault(_MASS, {})[layer] = mass if layout is None else _in_place(mass, layout)
        return mask

    return observe


def _in_place(mass: Float[Tensor, "batch width"], layout: Layout) -> Float[Tensor, "batch seq"]:
    """What is known of packed tokens at their places in the call, 0 elsewhere."""
    index = layout.index
    places = index.masked_fill(index < 0, layout.seq)
    return mass.new_zeros(layout.batch, layout.seq + 1).scatter_(1, places, mass)[:, : layout.seq]
