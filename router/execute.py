"""Running a module for the tokens that a decision chooses: masked, gathered and dense, side by side.

The module is a layer, or the attention or MLP inside one, and every function here runs its own code: what a
family does to its keys, positions or norms needs no code of ours.

- `masked` computes every token and discards what it computed where a token skips: every module runs on every rank,
  which is what training needs.
- `gathered` packs the tokens that run side by side, computes those alone, and puts them back among the others. Under
  `retain`, where keys and values of all tokens are needed anyway, `whole` is often faster: attention for every token,
  and only the MLP packed.
- `dense` is what both are when every token runs.

The law is that masked and gathered give the same, to rounding: the states of the tokens that run, `skipped` for the
others, and in the cache the same keys and values. Under `retain` those of all tokens are there in both; under `evict`
masked execution marks a skipped token's as absent where gathered execution never makes them.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .attention import LAYOUT_KWARG, visible_keys
from .cache import ImageCacheLayer, KeysAndValues, SkipCacheLayer
from .call import Call, Route
from .errors import UnsupportedModelError
from .eviction import KEY_WEIGHT_KWARG, KeyWeights
from .layout import Layout
from .measured import packing_pays
from .stand_ins import HeldImages, Marked, Packed, Ready, capture
from .stretch import Decision, Packing, Stretch
from .views import run, without

States = Float[Tensor, "batch seq dim"]


@dataclass(frozen=True)
class Execution:
    """What running a module for some tokens takes, beside the module and what enters it.

    Attributes:
        layer: its index.
        stretch: of layers, in which it was decided.
        call: of the model.
        store: where the layer's keys and values are kept, or None.
        of_images: whether the layer's keys and values come from images.
    """

    layer: int
    stretch: Stretch
    call: Call
    store: SkipCacheLayer | None
    of_images: bool

    @cached_property
    def decision(self) -> Decision:
        """Which tokens run."""
        return self.stretch.decision.of(self.layer - self.stretch.first)

    @property
    def count(self) -> int:
        """How many real tokens run."""
        return self.stretch.count(self.layer)

    @property
    def everyone(self) -> bool:
        """Whether all real tokens run."""
        return self.stretch.everyone(self.layer)

    @property
    def layout(self) -> Layout:
        """Where the real tokens that run belong."""
        return self.stretch.layout(self.layer)


def execute(module: nn.Module, hidden: States, skipped: States, execution: Execution, kwargs: dict[str, Any]) -> Any:
    """Run a module that has attention inside for some tokens.

    Args:
        module: a gated layer, or what stands inside one; or a view of it.
        hidden: states that enter it.
        skipped: what leaves it where a token skips.
        execution: the decision, and how it is carried out.
        kwargs: the module's other arguments.

    Returns:
        What the module returns, with the states of all tokens.
    """
    if execution.call.mode == "masked":
        return masked(module, hidden, skipped, execution, kwargs)
    if execution.of_images:
        return gathered_over_images(module, hidden, skipped, execution, kwargs)
    return gathered(module, hidden, skipped, execution, kwargs)


def execute_tokenwise(module: nn.Module, hidden: States, skipped: States, execution: Execution) -> Any:
    """Run a module that works token by token for some tokens; see `execute`."""
    if execution.call.mode == "masked":
        return _select(skipped, module(hidden), execution.decision)
    if execution.everyone:
        return module(hidden)
    if execution.count == 0:
        return skipped
    layout = execution.layout
    return _unpack(skipped, module(layout.pack(hidden)), layout)


def dense(module: nn.Module, hidden: States, store: SkipCacheLayer | None, past: int, kwargs: dict[str, Any]) -> Any:
    """Run a module for every token; only keys that earlier calls evicted may be missing."""
    return run(module, hidden, complete(hidden, store, kwargs, past))


def complete(hidden: States, store: SkipCacheLayer | None, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
    """A module's arguments for every token, with a mask over the keys that there are, where some are missing."""
    if store is not None and store.partial:
        # One token sees all that there are.
        alone = hidden.shape[:2] == (1, 1) and kwargs.get("attention_mask") is None and not store.gaps
        if not alone:
            return {**kwargs, "attention_mask": mask_over(hidden, store, kwargs, past)}
    return kwargs


def masked(module: nn.Module, hidden: States, skipped: States, execution: Execution, kwargs: dict[str, Any]) -> Any:
    """Run a module for every token and select; under `evict` nobody but itself sees a token that skips.

    Raises:
        UnsupportedModelError: gates would have to learn through what an earlier call has cached.
    """
    decision, call, store = execution.decision, execution.call, execution.store
    runs, weight = decision.run, decision.straight_through()
    if call.kv == "retain" or execution.of_images or (weight is None and execution.everyone):
        return _select(skipped, dense(module, hidden, store, call.past, kwargs), decision)
    if weight is not None:
        mask = kwargs.get("attention_mask")
        if store is not None and store.learned:
            raise UnsupportedModelError(
                "`past_key_values`: gates under kv='evict' cannot learn through keys that an earlier call has cached. "
                "Give all tokens in one call, or make the earlier call under `torch.no_grad()`."
            )
        if store is not None and store.seen:
            mask = mask_over(hidden, store, kwargs, call.past)
            weight = torch.cat([(store.slots(len(runs), runs.device) >= 0).to(weight), weight], dim=1)
        kwargs = {**kwargs, KEY_WEIGHT_KWARG: KeyWeights(mask, weight)}
    kwargs = {**kwargs, "attention_mask": mask_over(hidden, store, kwargs, call.past, runs)}
    if store is not None:
        kwargs["past_key_values"] = Marked(store, call.past, runs)
        store.learned |= weight is not None
    return _select(skipped, run(module, hidden, kwargs), decision)


def gathered(module: nn.Module, hidden: States, skipped: States, execution: Execution, kwargs: dict[str, Any]) -> Any:
    """Run a module for the tokens that run alone, packed; under `retain` keys and values are made for all."""
    if execution.everyone:
        return dense(module, hidden, execution.store, execution.call.past, kwargs)
    call, store = execution.call, execution.store
    batch, tokens = hidden.shape[:2]
    if execution.count == 0 and (
        call.kv == "evict" or (store is not None and not call.adapted and store.owes(capture, module, hidden, kwargs))
    ):
        if call.kv == "evict" and store is not None:
            store.pass_over(tokens)
        return skipped
    layout, mask = execution.layout, kwargs.get("attention_mask")
    if call.kv == "retain":
        keys, values = _keys_and_values(module, hidden, execution.stretch.padded, kwargs)
        if store is not None:
            keys, values = store.append(keys, values, None, tokens)
        if execution.count == 0:
            return skipped
        held: Any = Ready(keys, values)
        module = without(module, "k_proj", "v_proj")
        if mask is None and batch == 1 and (store is None or not store.partial):  # nothing but causal attention
            layout = replace(layout, spans=execution.stretch.spans(execution.layer))
    else:
        held = Packed(store, layout, tokens)
    mask = _mask_of_packed(layout, hidden, execution, mask)
    packed = pack_arguments(kwargs, layout) | {"past_key_values": held, LAYOUT_KWARG: layout, "attention_mask": mask}
    return _unpack(skipped, run(module, layout.pack(hidden), packed), layout)


def _mask_of_packed(
    layout: Layout, hidden: States, execution: Execution, full: Shaped[Tensor, "..."] | None
) -> Shaped[Tensor, "batch 1 width keys"] | None:
    """The mask of packed tokens over the keys that their layer will have; None where they see all before them."""
    call, store, tokens = execution.call, execution.store, hidden.shape[1]
    evict = call.kv == "evict"
    if full is None and evict and call.past == 0:
        return None  # those that run are in order, and there are no others
    if full is None and not evict and tokens == 1 and (store is None or not store.partial):
        return None
    if evict and call.past == 0:
        key = layout.index
    elif store is None:
        key = torch.arange(call.past, call.past + tokens, device=hidden.device).expand(len(hidden), -1)
    else:
        key = store.slots(len(hidden), hidden.device)
        key = torch.cat([key, layout.index], dim=1) if evict else key
    if full is None and tokens == 1:
        return (key >= 0)[:, None, None]
    return visible_keys(full, layout.index, key, call.past)


def whole(module: nn.Module, hidden: States, execution: Execution, kwargs: dict[str, Any]) -> Any:
    """Run a layer with its attention for every token and its MLP for those that run: under `retain`, the same result.

    What the layer makes of a token that skips is thrown away, so it does not matter what its MLP gave for it.
    """
    output = dense(module, hidden, execution.store, execution.call.past, kwargs)
    return with_states(output, torch.where(execution.decision.run[..., None], states_of(output), hidden))


def gathered_over_images(
    module: nn.Module, hidden: States, skipped: States, execution: Execution, kwargs: dict[str, Any]
) -> Any:
    """Run a module that attends to images, which are not in the sequence, for the tokens that run alone.

    Keys and values come from the images whatever the tokens do, so both K/V policies mean the same: they are made and
    kept once, also when no token of this call runs the module; a later one may.
    """
    name = "cross_attention_mask" if "cross_attention_mask" in kwargs else "attention_mask"
    mask, rows = kwargs.get(name), kwargs.get("full_text_row_masked_out_mask")
    if execution.everyone:
        return run(module, hidden, kwargs)
    if mask is None:  # what a token then sees is the attention function's choice, and depends on its place in the call
        output = run(module, hidden, kwargs)
        return with_states(output, torch.where(execution.decision.run[..., None], states_of(output), skipped))
    store = ImageCacheLayer() if execution.store is None else execution.store
    if kwargs.get("cross_attention_states") is not None:
        nothing = {**kwargs, name: None, "full_text_row_masked_out_mask": None}
        store.update(*capture(module, hidden[:, :0], nothing))
    if execution.count == 0:
        return skipped
    layout = execution.layout
    packed = pack_arguments(kwargs, layout) | {"past_key_values": HeldImages(store), LAYOUT_KWARG: layout}
    packed |= {"cross_attention_states": None, name: layout.to_rows(layout.pack(mask.transpose(0, 1)))}
    if rows is not None:
        packed["full_text_row_masked_out_mask"] = layout.pack(rows.transpose(0, 1))
    return _unpack(skipped, run(module, layout.pack(hidden), packed), layout)


def route(packs_mlp: bool, hidden: States, execution: Execution) -> Route:
    """By which of the ways that give the same a layer runs.

    Args:
        packs_mlp: whether the layer's MLP can be packed by itself.
        hidden: what enters the layer.
        execution: of the layer.
    """
    call = execution.call
    some = call.mode == "gathered" and call.kv == "retain" and 0 < execution.count < execution.stretch.tokens
    if not some or not packs_mlp or execution.of_images:
        return "packed"
    if call.route is not None:
        return call.route
    saved = (execution.stretch.tokens - execution.count) * 4 * hidden.shape[-1] ** 2
    return "packed" if saved > packing_pays(hidden.device, hidden.dtype, hidden.shape[-1]) else "whole"


def states_of(output: Any) -> States:
    """The states in what a module returned."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_states(output: Any, states: States) -> Any:
    """What a module returned, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _select(skipped: States, output: Any, decision: Decision) -> Any:
    """A module's output where a token runs, else `skipped`; straight-through when there is a gradient."""
    states, weight = states_of(output), decision.straight_through()
    if weight is None:
        return with_states(output, torch.where(decision.run[..., None], states, skipped))
    gate = weight[..., None].to(states.dtype)
    return with_states(output, gate * states + (1 - gate) * skipped)


def _unpack(skipped: States, output: Any, layout: Layout) -> Any:
    """A module's output for packed tokens, each at its place, and `skipped` for the others."""
    return with_states(output, layout.unpack(states_of(output), skipped))


def pack_arguments(kwargs: dict[str, Any], layout: Layout | Packing) -> dict[str, Any]:
    """A module's arguments for the packed tokens: positions are gathered, never renumbered."""
    packed = {k: v for k, v in kwargs.items() if k not in ("position_ids", "position_embeddings")}
    if kwargs.get("position_embeddings") is not None:
        packed["position_embeddings"] = tree_map(layout.pack, kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        packed["position_ids"] = layout.pack(kwargs["position_ids"][..., None])[..., 0]
    return packed


def _keys_and_values(module: nn.Module, hidden: States, layout: Layout | None, kwargs: dict[str, Any]) -> KeysAndValues:
    """Keys and values of all tokens, without attention or MLP; zeros at padding, where `layout` leaves some out."""
    if layout is None:
        return capture(module, hidden, {**kwargs, "attention_mask": None})
    packed = pack_arguments(kwargs, layout) | {"attention_mask": None}
    keys, values = capture(module, layout.pack(hidden), packed)
    return layout.to_columns(keys), layout.to_columns(values)


def mask_over(
    hidden: States,
    store: SkipCacheLayer | None,
    kwargs: dict[str, Any],
    past: int,
    run: Bool[Tensor, "batch seq"] | None = None,
) -> Shaped[Tensor, "batch 1 seq keys"]:
    """The mask of all tokens over the keys that exist, when some do not. Those of `run` False see only themselves."""
    batch, tokens = hidden.shape[:2]
    query = torch.arange(past, past + tokens, device=hidden.device).expand(batch, -1)
    key, alive = query, run
    if store is not None:
        held = store.slots(batch, hidden.device)
        key = torch.cat([held, query], dim=1)
        alive = torch.cat([torch.ones_like(held, dtype=torch.bool), run], dim=1) if run is not None else None
    return visible_keys(kwargs.get("attention_mask"), query, key, past, alive)
