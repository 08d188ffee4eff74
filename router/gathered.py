"""Gathered execution: a module computes only the tokens that run, and keys and values go where they belong.

The module (a layer, or the attention or MLP inside one) is called by its own `forward` on the tokens that run, packed
side by side. What a family does to its keys, positions or norms therefore needs no code here.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .attention import LAYOUT_KWARG, Layout, visible_keys
from .cache import ImageCacheLayer, SkipCacheLayer
from .call import Call
from .errors import UnsupportedModelError
from .projections import only
from .trace import ImageStates

Forward = Callable[..., Any]


class _KeysAndValues(Exception):
    """Carries keys and values out of a layer that is left before its attention is computed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Capture:
    """Stands in for a cache: takes the keys and values a layer is about to store, and leaves the layer."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _KeysAndValues(keys, values)


class _Ready:
    """Stands in for a cache that has the keys and values of all tokens already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class _HeldImages:
    """Stands in for a cache while a layer reads the keys and values of images that it has already."""

    def __init__(self, store: SkipCacheLayer) -> None:
        self.layers: dict[int, SkipCacheLayer] = defaultdict(lambda: store)  # only one layer will ask


class _PackedCache:
    """Stands in for a cache while a layer runs on packed tokens, the only ones it will have: puts them into rows."""

    def __init__(self, store: SkipCacheLayer | None, layout: Layout, past: int, tokens: int) -> None:
        self.store, self.layout, self.past, self.tokens = store, layout, past, tokens

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.layout.to_rows(keys), self.layout.to_rows(values)
        if self.store is None:
            return keys, values
        return self.store.append(keys, values, self.layout.index(self.past), self.tokens)


def with_attention(
    forward: Forward,
    hidden: Tensor,
    skipped: Tensor,
    run: Tensor,
    call: Call,
    store: SkipCacheLayer | None,
    kwargs: dict[str, Any],
) -> Any:
    """Run a module that has attention inside for some tokens.

    Args:
        forward: the module's own.
        hidden: states that enter it, [batch, seq, dim].
        skipped: what leaves it where a token skips, the same shape.
        run: bool [batch, seq].
        call: of the model.
        store: where the layer's keys and values are kept, or None.
        kwargs: the module's other arguments.

    Returns:
        What the module returns, with the states of all tokens.
    """
    layout = Layout.of(run & call.real)
    tokens = hidden.shape[1]
    if len(layout.rows) == call.tokens:
        return dense(forward, hidden, call, store, kwargs)
    query, device = layout.index(call.past), hidden.device
    if call.kv == "retain":
        keys, values = _keys_and_values(forward, hidden, call, kwargs)
        key = torch.arange(call.past, call.past + tokens, device=device).expand(layout.batch, -1)
        if store is not None:
            keys, values = store.append(keys, values, None, tokens)
            key = store.slots(layout.batch, device)
        held: Any = _Ready(keys, values)
        wanted = only("queries")
    else:
        key = query if store is None else torch.cat([store.slots(layout.batch, device), query], dim=1)
        if len(layout.rows) == 0 and store is not None:
            store.pass_over(tokens)
        held = _PackedCache(store, layout, call.past, tokens)
        wanted = only("everything")
    if len(layout.rows) == 0:
        return skipped
    full = kwargs.get("attention_mask")
    if call.kv == "retain" and full is None and layout.batch == 1 and (store is None or store.index is None):
        layout = layout.with_spans(call.past)
    packed = _pack(kwargs, layout) | {"past_key_values": held, LAYOUT_KWARG: layout}
    plain = call.kv == "evict" and full is None and layout.batch == 1 and call.past == 0
    packed["attention_mask"] = None if plain else visible_keys(full, query, key, call.past)
    with wanted:
        output = forward(layout.pack(hidden), **packed)
    return with_states(output, layout.unpack(states_of(output), skipped))


def with_image_attention(
    forward: Forward,
    hidden: Tensor,
    skipped: Tensor,
    run: Tensor,
    call: Call,
    store: SkipCacheLayer | None,
    kwargs: dict[str, Any],
) -> Any:
    """Run a module that attends to images, which are not in the sequence, for some tokens; see `with_attention`.

    Keys and values come from the images whatever the tokens do, so both K/V policies mean the same: they are made and
    kept once, also when no token of this call runs the module; a later one may.
    """
    layout = Layout.of(run & call.real)
    name = "cross_attention_mask" if "cross_attention_mask" in kwargs else "attention_mask"
    mask, rows = kwargs.get(name), kwargs.get("full_text_row_masked_out_mask")
    if len(layout.rows) == call.tokens:
        return forward(hidden, **kwargs)
    if mask is None:  # what a token then sees is the attention function's choice, and depends on its place in the call
        output = forward(hidden, **kwargs)
        return with_states(output, torch.where(run[..., None], states_of(output), skipped))
    store = ImageCacheLayer() if store is None else store
    if kwargs.get("cross_attention_states") is not None:
        nothing = {**kwargs, name: None, "full_text_row_masked_out_mask": None}
        store.update(*_stored(forward, hidden[:, :0], nothing))
    if len(layout.rows) == 0:
        return skipped
    packed = _pack(kwargs, layout) | {"past_key_values": _HeldImages(store), LAYOUT_KWARG: layout}
    packed |= {"cross_attention_states": None, name: layout.to_rows(layout.pack(mask.transpose(0, 1)))}
    if rows is not None:
        packed["full_text_row_masked_out_mask"] = layout.pack(rows.transpose(0, 1))
    output = forward(layout.pack(hidden), **packed)
    return with_states(output, layout.unpack(states_of(output), skipped))


def image_states(kwargs: dict[str, Any], batch: int, store: SkipCacheLayer | None = None) -> ImageStates:
    """What a layer that attends to images attends to in a call, from its arguments and before it has run."""
    states: Tensor | None = kwargs.get("cross_attention_states")
    new = 0 if states is None else states.shape[:-1].numel() // batch
    return ImageStates(new + (0 if store is None else store.get_seq_length()), new)


def without_attention(forward: Forward, hidden: Tensor, skipped: Tensor, run: Tensor, call: Call) -> Any:
    """Run a module that works token by token for some tokens; see `with_attention`."""
    layout = Layout.of(run & call.real)
    if len(layout.rows) == call.tokens:
        return forward(hidden)
    if len(layout.rows) == 0:
        return skipped
    output = forward(layout.pack(hidden))
    return with_states(output, layout.unpack(states_of(output), skipped))


def dense(forward: Forward, hidden: Tensor, call: Call, store: SkipCacheLayer | None, kwargs: dict[str, Any]) -> Any:
    """Run a module for every token; only keys that earlier calls evicted may be missing."""
    if store is not None and store.index is not None:
        kwargs = {**kwargs, "attention_mask": mask_over(hidden, store, kwargs, call.past)}
    return forward(hidden, **kwargs)


def mask_over(
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


def states_of(output: Any) -> Tensor:
    """The states in what a module returned."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_states(output: Any, states: Tensor) -> Any:
    """What a module returned, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _keys_and_values(forward: Forward, hidden: Tensor, call: Call, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, [batch, heads, seq, head_dim], without attention or MLP; zeros at padding.

    The module itself computes them, up to the point where it would store them.
    """
    layout = call.padded
    if layout is None:
        return _stored(forward, hidden, {**kwargs, "attention_mask": None})
    packed = _pack(kwargs, layout) | {"attention_mask": None}
    keys, values = _stored(forward, layout.pack(hidden), packed)
    return layout.to_columns(keys, hidden.shape[1]), layout.to_columns(values, hidden.shape[1])


def _stored(forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys and values that a module is about to store."""
    try:
        with only("keys and values"):
            forward(hidden, **{**kwargs, "past_key_values": _Capture()})
    except _KeysAndValues as taken:
        return taken.keys, taken.values
    owner = type(forward.__self__).__name__  # type: ignore[attr-defined]
    raise UnsupportedModelError(
        f"`{owner}` does not store its keys and values through `past_key_values.update`, so `retain` cannot have them "
        "without the rest of it. Use kv='evict'."
    )


def _pack(kwargs: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """A module's arguments for the packed tokens: positions are gathered, never renumbered."""
    packed = {k: v for k, v in kwargs.items() if k not in ("position_ids", "position_embeddings")}
    if kwargs.get("position_embeddings") is not None:
        packed["position_embeddings"] = tree_map_only(Tensor, layout.pack, kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        packed["position_ids"] = layout.pack(kwargs["position_ids"][..., None])[..., 0]
    return packed
