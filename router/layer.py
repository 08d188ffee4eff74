"""A decoder layer with a gate: a dynamic subclass of the layer's own class, made after loading.

Masked execution computes the layer for every token and discards it where the gate says skip: every module runs on every
rank, which is what training needs. Gathered execution computes only the tokens that run. Both keep the same keys and
values, so their results agree to rounding. What a token skips is the whole layer (`block`), or the attention or the MLP
inside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cache import SkipCache, SkipCacheLayer
from .call import KWARG, Call
from .config import Unit
from .errors import UnsupportedModelError
from .eviction import KEY_WEIGHT_KWARG, KeyWeights
from .gates import TokenGate
from .gathered import (
    dense,
    image_states,
    mask_over,
    states_of,
    with_attention,
    with_image_attention,
    with_states,
    without_attention,
)
from .policies import Decision
from .subclass import Mixin, mix_in, own_class, take_out

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


@dataclass(frozen=True)
class _Skip:
    """A layer's decision on its way to the module inside that it is about."""

    decision: Decision
    call: Call
    store: SkipCacheLayer | None
    of_images: bool


_skip: ContextVar[_Skip | None] = ContextVar("skipit_skip", default=None)


class _MarkedCache:
    """Stands in for a cache in masked execution with `evict`: stores every token, marks the skipped ones as absent."""

    def __init__(self, store: SkipCacheLayer, index: Tensor) -> None:
        self.store, self.index = store, index

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.append(keys, values, self.index, keys.shape[-2])


class GatedLayer(Mixin, _Module):
    """Mixin put before a decoder layer's own class."""

    layer_gate: TokenGate
    skipit_index: int
    skipit_attends_to_images: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer for the tokens that the call's policy chooses; the whole layer when there is no call."""
        kwargs = _named(own_class(type(self)), 1, args, kwargs)
        call: Call | None = kwargs.pop(KWARG, None)
        if call is None:
            return super().forward(hidden_states, **kwargs)
        call = call.to(hidden_states.device)
        decision = call.policy.decide(self.skipit_index, hidden_states, call, self.layer_gate)
        held: SkipCache | None = kwargs.get("past_key_values")
        store = held.layers[self.skipit_index] if held is not None else None
        if call.step is not None:
            call.step.decisions.setdefault(self.skipit_index, decision)
            if self.skipit_attends_to_images:
                call.step.images = image_states(kwargs, len(hidden_states), store)
        skip = _Skip(decision, call, store, self.skipit_attends_to_images)
        if call.unit == "block":
            return _execute(super().forward, hidden_states, hidden_states, skip, kwargs)
        _check_parts(self, call.unit)
        with _inside(skip):
            return super().forward(hidden_states, **kwargs)


class GatedAttention(Mixin, _Module):
    """Mixin put before the class of a layer's attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention for the tokens that its layer chose, when that is what they skip; others get zeros."""
        skip = _skip.get()
        if skip is None:
            return super().forward(*args, **kwargs)
        kwargs = _named(own_class(type(self)), 0, args, kwargs)
        hidden = kwargs.pop("hidden_states")
        if skip.call.unit == "attention":
            output = _execute(super().forward, hidden, torch.zeros_like(hidden), skip, kwargs)
            return output if isinstance(output, tuple) else (output, None)  # nothing ran, so there are no weights
        return dense(super().forward, hidden, skip.call, skip.store, kwargs)


class GatedMLP(Mixin, _Module):
    """Mixin put before the class of a layer's MLP."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP for the tokens that its layer chose, when that is what they skip; others get zeros."""
        skip = _skip.get()
        if skip is None or skip.call.unit != "mlp" or args or kwargs:
            return super().forward(hidden, *args, **kwargs)
        zeros = torch.zeros_like(hidden)
        if skip.call.mode == "masked":
            output = super().forward(hidden)
            return with_states(output, _select(zeros, states_of(output), skip.decision))
        return without_attention(super().forward, hidden, zeros, skip.decision.run, skip.call)


def mix_in_parts(layer: nn.Module) -> None:
    """Let a layer's attention and MLP be skipped by themselves, where they can be told."""
    attention = [child for child in layer.children() if hasattr(child, "head_dim") and hasattr(child, "config")]
    others = [
        child
        for child in layer.children()
        if child not in attention and not isinstance(child, TokenGate) and any(p.dim() > 1 for p in child.parameters())
    ]
    if len(attention) == 1 and len(others) == 1:
        mix_in(attention[0], GatedAttention)
        mix_in(others[0], GatedMLP)


def take_out_parts(layer: nn.Module) -> None:
    """Undo `mix_in_parts`, also where PEFT has wrapped a part."""
    for module in layer.modules():
        if isinstance(module, GatedAttention | GatedMLP):
            take_out(module)


def _check_parts(layer: nn.Module, unit: Unit) -> None:
    if not any(isinstance(child, GatedMLP) for child in layer.modules()):
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
        raise UnsupportedModelError(
            f"`unit`: got {unit!r}, but `{type(layer).__name__}` is not one attention and one MLP; it has {children}. "
            "Use unit='block'."
        )


@contextmanager
def _inside(skip: _Skip) -> Iterator[None]:
    token = _skip.set(skip)
    try:
        yield
    finally:
        _skip.reset(token)


def _execute(forward: Any, hidden: Tensor, skipped: Tensor, skip: _Skip, kwargs: dict[str, Any]) -> Any:
    """A module with attention inside, masked or gathered; `skipped` is what leaves it where a token skips."""
    decision, call, store = skip.decision, skip.call, skip.store
    if call.mode == "gathered" and skip.of_images:
        return with_image_attention(forward, hidden, skipped, decision.run, call, store, kwargs)
    if call.mode == "gathered":
        return with_attention(forward, hidden, skipped, decision.run, call, store, kwargs)
    run = decision.run
    weight = decision.straight_through()
    if call.kv == "retain" or skip.of_images or (weight is None and bool((run | ~call.real).all())):
        output = dense(forward, hidden, call, store, kwargs)
    else:
        if weight is not None and store is None:
            kwargs = {**kwargs, KEY_WEIGHT_KWARG: KeyWeights(kwargs.get("attention_mask"), weight)}
        kwargs = {**kwargs, "attention_mask": mask_over(hidden, store, kwargs, call.past, run)}
        if store is not None:
            index = torch.arange(call.past, call.past + hidden.shape[1], device=hidden.device)
            kwargs["past_key_values"] = _MarkedCache(store, index.masked_fill(~run, -1))
        output = forward(hidden, **kwargs)
    return with_states(output, _select(skipped, states_of(output), decision))


def _select(skipped: Tensor, output: Tensor, decision: Decision) -> Tensor:
    """A module's output where a token runs, else `skipped`; straight-through when there is a gradient."""
    weight = decision.straight_through()
    if weight is None:
        return torch.where(decision.run[..., None], output, skipped)
    gate = weight[..., None].to(output.dtype)
    return gate * output + (1 - gate) * skipped


def _named(own: type, skip: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call to `own`'s forward, with its positional ones after the first `skip` by name."""
    return kwargs | dict(zip(_parameters(own)[skip:], args, strict=False)) if args else kwargs


@cache
def _parameters(own: type) -> tuple[str, ...]:
    """Names of the arguments of a module class's own forward."""
    return tuple(signature(own.forward).parameters)[1:]  # type: ignore[attr-defined]
