"""A decoder layer with a gate: a dynamic subclass of the layer's own class, made after loading.

Masked execution computes the layer for every token and discards it where the gate says skip: every module
runs on every rank, which is what training needs. Gathered execution computes only the tokens that run.
Both keep the same keys and values, so their results agree to rounding.
"""

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .attention import LAYOUT_KWARG, Layout, visible_keys
from .cache import SkipCache, SkipCacheLayer
from .call import KWARG, Call
from .gates import TokenGate
from .keys_only import keys_only
from .policies import Decision
from .subclass import Mixin, own_class

if TYPE_CHECKING:
    _Layer = nn.Module
else:
    _Layer = object


class _KeysAndValues(Exception):
    """Carries keys and values out of a layer that is left before its attention is computed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Capture:
    """Stands in for a cache: takes the keys and values a layer is about to store, and leaves the layer."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _KeysAndValues(keys, values)


class _PackedCache:
    """Stands in for a cache while a layer runs on packed tokens: puts keys and values back into rows.

    Attention then sees, per row, the keys of earlier tokens, of this call's tokens that run, and, with
    `retain`, of those that skip.
    """

    def __init__(self, store: SkipCacheLayer | None, layout: Layout, past: int, tokens: int) -> None:
        self.store, self.layout, self.past, self.tokens = store, layout, past, tokens
        self.skipped: tuple[Layout, Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.skipped is None:
            index: Tensor | None = self.layout.index(self.past)
            keys, values = self.layout.to_rows(keys), self.layout.to_rows(values)
        else:
            index = None  # with `retain` every token has its keys and values
            other, other_keys, other_values = self.skipped
            keys = self._merge(keys, other, other_keys)
            values = self._merge(values, other, other_values)
        if self.store is None:
            return keys, values
        return self.store.append(keys, values, index, self.tokens)

    def _merge(self, run: Tensor, other: Layout, skipped: Tensor) -> Tensor:
        out = run.new_zeros(self.layout.batch, self.tokens, run.shape[1], run.shape[3])
        out[self.layout.rows, self.layout.columns] = run[0].transpose(0, 1)
        out[other.rows, other.columns] = skipped[0].transpose(0, 1)
        return out.transpose(1, 2)


class _MarkedCache:
    """Stands in for a cache in masked execution with `evict`: stores every token, marks the skipped ones as absent."""

    def __init__(self, store: SkipCacheLayer, index: Tensor) -> None:
        self.store, self.index = store, index

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.store.append(keys, values, self.index, keys.shape[-2])


class GatedLayer(Mixin, _Layer):
    """Mixin put before a decoder layer's own class."""

    layer_gate: TokenGate
    skipit_index: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer for the tokens that the call's policy chooses; the whole layer when there is no call."""
        if args:
            kwargs |= dict(zip(_parameters(own_class(type(self))), args, strict=False))
        call: Call | None = kwargs.pop(KWARG, None)
        if call is None:
            return super().forward(hidden_states, **kwargs)
        call = call.to(hidden_states.device)
        decision = call.policy.decide(self.skipit_index, hidden_states, call, self.layer_gate)
        if call.step is not None:
            call.step.decisions.setdefault(self.skipit_index, decision)
        held: SkipCache | None = kwargs.get("past_key_values")
        store = held.layers[self.skipit_index] if held is not None else None
        execute = self._masked if call.mode == "masked" else self._gathered
        return execute(hidden_states, decision, call, store, kwargs)

    def _dense(self, hidden: Tensor, store: SkipCacheLayer | None, kwargs: dict[str, Any], past: int) -> Any:
        """Every token runs; only keys that earlier calls evicted may be missing."""
        if store is not None and store.index is not None:
            kwargs = {**kwargs, "attention_mask": _mask(hidden, store, kwargs, past)}
        return super().forward(hidden, **kwargs)

    def _masked(
        self, hidden: Tensor, decision: Decision, call: Call, store: SkipCacheLayer | None, kwargs: dict[str, Any]
    ) -> Any:
        run = decision.run
        if call.kv == "retain" or bool((run | ~call.real).all()):
            output = self._dense(hidden, store, kwargs, call.past)
        else:
            kwargs = {**kwargs, "attention_mask": _mask(hidden, store, kwargs, call.past, run)}
            if store is not None:
                index = torch.arange(call.past, call.past + hidden.shape[1], device=hidden.device)
                kwargs["past_key_values"] = _MarkedCache(store, index.masked_fill(~run, -1))
            output = super().forward(hidden, **kwargs)
        return _with_states(output, _select(hidden, _states(output), decision))

    def _gathered(
        self, hidden: Tensor, decision: Decision, call: Call, store: SkipCacheLayer | None, kwargs: dict[str, Any]
    ) -> Any:
        run = decision.run & call.real
        if bool((run == call.real).all()):
            return self._dense(hidden, store, kwargs, call.past)
        tokens, layout = hidden.shape[1], Layout.of(run)
        packed = _PackedCache(store, layout, call.past, tokens)
        if call.kv == "retain":
            other = Layout.of(call.real & ~run)
            packed.skipped = (other, *self._keys_and_values(hidden, other, kwargs))
        if len(layout.rows) == 0:
            if store is not None and packed.skipped is not None:
                keys, values = packed.skipped[1:]
                packed.update(keys[:, :, :0], values[:, :, :0])
            elif store is not None:
                store.pass_over(tokens)
            return hidden
        kwargs = _pack(kwargs, layout)
        kwargs["attention_mask"] = _packed_mask(kwargs["attention_mask"], packed, hidden.device)
        output = super().forward(layout.pack(hidden), **kwargs, past_key_values=packed, **{LAYOUT_KWARG: layout})
        states = hidden.clone()
        states[layout.rows, layout.columns] = _states(output)[0]
        return _with_states(output, states)

    def _keys_and_values(self, hidden: Tensor, layout: Layout, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens that skip the layer, without their attention or MLP.

        The layer itself computes them, up to the point where it would store them: so norms, biases, position
        embeddings and whatever else a family does to its keys need no code here.
        """
        kwargs = _pack(kwargs, layout) | {"attention_mask": None, "past_key_values": _Capture()}
        try:
            with keys_only():
                super().forward(layout.pack(hidden), **kwargs)
        except _KeysAndValues as taken:
            return taken.keys, taken.values
        raise RuntimeError(
            f"`{type(self).__name__}` does not store its keys and values through `past_key_values.update`."
        )


@cache
def _parameters(layer: type) -> tuple[str, ...]:
    """Names of the arguments after `hidden_states` in a layer class's own forward."""
    return tuple(signature(layer.forward).parameters)[2:]  # type: ignore[attr-defined]


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _with_states(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _select(hidden: Tensor, output: Tensor, decision: Decision) -> Tensor:
    """The layer's output where a token runs, its input where it skips; straight-through when there is a gradient."""
    run, probability = decision.run[..., None], decision.probability
    if probability is None or not (torch.is_grad_enabled() and probability.requires_grad):
        return torch.where(run, output, hidden)
    gate = run + (probability - probability.detach())[..., None]
    gate = gate.to(output.dtype)
    return gate * output + (1 - gate) * hidden


def _mask(
    hidden: Tensor, store: SkipCacheLayer | None, kwargs: dict[str, Any], past: int, run: Tensor | None = None
) -> Tensor:
    """The mask of all tokens over the keys that exist, when some do not. Those of `run` False see only themselves."""
    batch, tokens = hidden.shape[:2]
    query = torch.arange(past, past + tokens, device=hidden.device).expand(batch, -1)
    key, alive = query, run
    if store is not None:
        held = store.slots(batch, hidden.device)
        key = torch.cat([held, query], dim=1)
        alive = torch.cat([torch.ones_like(held, dtype=torch.bool), run], dim=1) if run is not None else None
    return visible_keys(kwargs.get("attention_mask"), query, key, past, alive)


def _packed_mask(full: Tensor | None, packed: _PackedCache, device: torch.device) -> Tensor | None:
    """The mask of the packed queries of each row over the keys its row will have."""
    layout, past, store = packed.layout, packed.past, packed.store
    query = layout.index(past)
    key = query
    if packed.skipped is not None:
        key = torch.arange(past, past + packed.tokens, device=device).expand(layout.batch, -1)
    elif full is None and layout.batch == 1 and past == 0:
        return None  # plain causal among the tokens there are
    if store is not None:
        key = torch.cat([store.slots(layout.batch, device), key], dim=1)
    return visible_keys(full, query, key, past)


def _pack(kwargs: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The layer's arguments for the packed tokens: positions are gathered, never renumbered."""
    packed = {k: v for k, v in kwargs.items() if k not in ("position_ids", "position_embeddings", "past_key_values")}
    packed["attention_mask"] = kwargs.get("attention_mask")
    if kwargs.get("position_embeddings") is not None:
        packed["position_embeddings"] = tree_map_only(Tensor, layout.pack, kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        packed["position_ids"] = layout.pack(kwargs["position_ids"][..., None])[..., 0]
    return packed
