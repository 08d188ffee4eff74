"""Decoder layers as graphs of `torch.compile`: the same results from fewer and larger kernels.

A graph has one shape of memory, so tokens are packed into rows of a fixed width: those that run in order, and after
them, if a row has fewer, a token again whose result nobody reads. Causal attention never looks at what comes after, so
a packed row needs no mask of its own. One graph then does for every count, every layer of a kind, and every prompt.

What has no such graph is run as it is without: gates that learn, layers that attend to images, the attention of some
tokens alone, `evict` in the middle of a prompt, and the rows of a decoding step of which some skip.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import visible_keys
from .cache import Keys, KeysAndValues, SkipCacheLayer, Values
from .call import Compiling
from .errors import UnsupportedModelError
from .execute import Execution, States, complete, mask_over, pack_arguments, route, states_of, with_states
from .stand_ins import Ended, Slot, Taken, capture
from .stretch import Packing
from .views import Part, run, with_parts


def run_all(
    layer: nn.Module, hidden: States, store: SkipCacheLayer | None, compiling: Compiling, kwargs: dict[str, Any]
) -> Any:
    """Run a layer for every token."""
    recordings = compiling.recordings
    if recordings is not None and store is not None and recordings.can_step(layer, hidden, store, kwargs):
        return recordings.step(_step, layer, hidden, store, kwargs, None)
    return _whole(layer, hidden, None, store, compiling, kwargs)


def run_some(
    layer: nn.Module, hidden: States, execution: Execution, compiling: Compiling, kwargs: dict[str, Any]
) -> Any:
    """Run a layer for some tokens, where `handles` says so."""
    call, store = execution.call, execution.store
    if hidden.shape[1] == 1:
        return _some_rows(layer, hidden, execution, compiling, kwargs)
    packing = execution.stretch.packing(execution.layer, compiling.multiple or (1 if hidden.is_cpu else 64))
    if call.kv == "retain" or call.unit == "mlp":
        kwargs = complete(hidden, store, kwargs, call.past)
        return _whole(layer, hidden, packing, store, compiling, kwargs, block=call.unit == "block")
    output, keys, values = _call(_evicting, compiling, layer, hidden, packing, _bare(kwargs))
    if store is not None:
        index = packing.indices
        if packing.exact:
            width = execution.count
            keys, values, index = keys[:, :, :width], values[:, :, :width], index[:, :width]
        else:
            store.gaps = True
        store.append(keys, values, index, hidden.shape[1])
    return output


def _some_rows(
    layer: nn.Module, hidden: States, execution: Execution, compiling: Compiling, kwargs: dict[str, Any]
) -> Any:
    """Run a layer for a token of every row; the states of those that skip are kept."""
    call, store, run = execution.call, execution.store, execution.decision.run
    assert compiling.recordings is not None
    assert store is not None
    if execution.count == 0:
        compiling.recordings.step(_keep, layer, hidden, store, {**kwargs, "attention_mask": None})
        return hidden
    if call.kv == "retain":
        kwargs, index = complete(hidden, store, kwargs, call.past), None
    else:
        kwargs = {**kwargs, "attention_mask": mask_over(hidden, store, kwargs, call.past, run)}
        index = torch.full_like(run, call.past, dtype=torch.long).masked_fill(~run, -1)
    return compiling.recordings.step(_step, layer, hidden, store, kwargs, run[:, 0], index=index)


def _whole(
    layer: nn.Module,
    hidden: States,
    packing: Packing | None,
    store: SkipCacheLayer | None,
    compiling: Compiling,
    kwargs: dict[str, Any],
    block: bool = True,
) -> Any:
    if store is not None:
        store.settle()
    if store is None or not store.is_initialized:
        output, keys, values = _call(_first, compiling, layer, hidden, packing, block, _bare(kwargs))
        if store is not None:
            store.append(keys, values, None, hidden.shape[1])
        return output
    return _call(_later, compiling, layer, hidden, packing, block, store.grow(hidden.shape[1]), _bare(kwargs))


def _call(function: Callable[..., Any], compiling: Compiling, layer: nn.Module, hidden: States, *args: Any) -> Any:
    made = function if compiling.options is None else _compiled(function, compiling.options)
    try:
        # A later call writes to keys and values that lie elsewhere every time.
        if compiling.recordings is not None and function is not _later:
            return compiling.recordings.run(made, layer, hidden, *args)
        return made(layer, hidden, *args)
    except torch._dynamo.exc.Unsupported as error:
        raise UnsupportedModelError(
            f"`compile`: `{type(layer).__name__}` cannot be compiled as one graph: {str(error).splitlines()[0]} "
            "Run the model without `skipit.compile`."
        ) from error


def handles(layer: nn.Module, hidden: States, execution: Execution, kwargs: dict[str, Any]) -> bool:
    """Whether a layer that some tokens run, or that has a bound on how many do, is run as a graph."""
    call, bounded = execution.call, execution.stretch.bounds is not None
    if hidden.shape[1] == 1:
        recordings = None if call.compiling is None or call.unit != "block" else call.compiling.recordings
        if recordings is None or (call.kv == "evict" and execution.count == 0):
            return False
        return recordings.can_step(layer, hidden, execution.store, kwargs)
    if call.unit == "attention" or not (bounded or execution.count):
        return False
    packs_mlp = layer.skipit_parts is not None
    if call.unit == "mlp":
        return True
    if call.kv == "evict":
        return call.past == 0
    return packs_mlp and (bounded or route(packs_mlp, hidden, execution) == "whole")


_graphs: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A function, compiled; once for all models in the process that have the same options."""
    key = (function, repr(options))
    if key not in _graphs:
        # Each kind of layer, batch and K/V policy of each model is a graph of its own.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        _graphs[key] = torch.compile(function, fullgraph=True, **{"dynamic": True, **options})
    return _graphs[key]


def _first(
    layer: nn.Module, hidden: States, packing: Packing | None, block: bool, kwargs: dict[str, Any]
) -> tuple[Any, Keys, Values]:
    """A layer in the first call: what it gives, and the keys and values of all tokens."""
    taken = Taken()
    output = _run(layer, hidden, packing, block, {**kwargs, "past_key_values": taken})
    return output, taken.keys, taken.values


def _later(
    layer: nn.Module, hidden: States, packing: Packing | None, block: bool, held: KeysAndValues, kwargs: dict[str, Any]
) -> Any:
    """A layer in a later call: what it gives; its keys and values are written to the end of those that are held."""
    return _run(layer, hidden, packing, block, {**kwargs, "past_key_values": Ended(*held)})


def _step(
    layer: nn.Module,
    keys: Keys,
    values: Values,
    place: Int[Tensor, " 1"],
    hidden: Float[Tensor, "batch 1 dim"],
    runs: Bool[Tensor, " batch"] | None,
    kwargs: dict[str, Any],
) -> Any:
    """A layer for one token per row, which sees the slots up to its own, or those of its mask; who skips stays."""
    if kwargs.get("attention_mask") is None:
        visible = torch.arange(keys.shape[-2], device=keys.device) <= place
        kwargs = {**kwargs, "attention_mask": visible.expand(len(hidden), 1, 1, -1)}
    output = run(layer, hidden, {**kwargs, "past_key_values": Slot(keys, values, place)})
    if runs is None:
        return output
    return with_states(output, torch.where(runs[:, None, None], states_of(output), hidden))


def _keep(
    layer: nn.Module,
    keys: Keys,
    values: Values,
    place: Int[Tensor, " 1"],
    hidden: Float[Tensor, "batch 1 dim"],
    kwargs: dict[str, Any],
) -> None:
    """Keys and values of one token per row, and nothing else of the layer."""
    Slot(keys, values, place).update(*capture(layer, hidden, kwargs))


def _run(layer: nn.Module, hidden: States, packing: Packing | None, block: bool, kwargs: dict[str, Any]) -> Any:
    """Attention for every token, the MLP for those that run."""
    if packing is None:
        return run(layer, hidden, kwargs)
    name: str = layer.skipit_parts[1]  # type: ignore[index, assignment]
    mlp: Any = layer._modules[name]

    def some(states: States, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return mlp(states, *args, **kwargs)
        output = mlp(packing.pack(states))
        return with_states(output, packing.unpack(states_of(output), torch.zeros_like(states)))

    output = run(with_parts(layer, **{name: Part(mlp, some)}), hidden, kwargs)
    kept = torch.where(packing.run[..., None], states_of(output), hidden) if block else states_of(output)
    return with_states(output, kept)


def _evicting(layer: nn.Module, hidden: States, packing: Packing, kwargs: dict[str, Any]) -> tuple[Any, Keys, Values]:
    """A layer for the tokens that run alone: what it gives for all, and the keys and values of a packed row."""
    taken = Taken()
    packed = pack_arguments(kwargs, packing) | {"past_key_values": taken}
    if kwargs.get("attention_mask") is not None:
        packed["attention_mask"] = visible_keys(kwargs["attention_mask"], packing.indices, packing.indices, 0)
    output = run(layer, packing.pack(hidden), packed)
    return with_states(output, packing.unpack(states_of(output), hidden)), taken.keys, taken.values


def _bare(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "past_key_values"}
