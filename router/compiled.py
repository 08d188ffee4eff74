"""Decoder layers as graphs of `torch.compile`: the same results from fewer and larger kernels.

A graph has one shape of memory, so tokens are packed into rows of a fixed width: those that run in order, and after
them, if a row has fewer, a token again whose result nobody reads. Causal attention never looks at what comes after, so
a packed row needs no mask of its own. One graph then does for every count, every layer of a kind, and every prompt.

What has no such graph is run as it is without: gates that learn, layers that attend to images, the attention of some
tokens alone, `evict` in the middle of a prompt, and the rows of a decoding step of which some skip.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .attention import visible_keys
from .cache import Keys, KeysAndValues, SkipCacheLayer, Values
from .call import Call
from .errors import UnsupportedModelError
from .execute import Execution, States, complete, route, states_of, with_states
from .stand_ins import Ended, Taken
from .stretch import Packing
from .views import Part, run, with_parts


def run_all(layer: nn.Module, hidden: States, store: SkipCacheLayer | None, call: Call, kwargs: dict[str, Any]) -> Any:
    """Run a layer for every token."""
    return _whole(layer, hidden, None, store, call, complete(hidden, store, kwargs, call.past))


def run_some(layer: nn.Module, hidden: States, execution: Execution, kwargs: dict[str, Any]) -> Any:
    """Run a layer for some tokens, where `handles` says so."""
    call, store = execution.call, execution.store
    assert call.compiling is not None
    packing = execution.stretch.packing(execution.layer, call.compiling.multiple or (1 if hidden.is_cpu else 64))
    if call.kv == "retain" or call.unit == "mlp":
        return _whole(layer, hidden, packing, store, call, complete(hidden, store, kwargs, call.past))
    output, keys, values = _call(_evicting, call, layer, hidden, packing, _bare(kwargs))
    if store is not None:
        index = _index(packing)
        if packing.exact:
            width = execution.count
            keys, values, index = keys[:, :, :width], values[:, :, :width], index[:, :width]
        else:
            store.gaps = True
        store.append(keys, values, index, hidden.shape[1])
    return output


def _whole(
    layer: nn.Module,
    hidden: States,
    packing: Packing | None,
    store: SkipCacheLayer | None,
    call: Call,
    kwargs: dict[str, Any],
) -> Any:
    block = call.unit == "block"
    if store is not None:
        store.settle()
    if store is None or not store.is_initialized:
        output, keys, values = _call(_first, call, layer, hidden, packing, block, _bare(kwargs))
        if store is not None:
            store.append(keys, values, None, hidden.shape[1])
        return output
    return _call(_later, call, layer, hidden, packing, block, store.grow(hidden.shape[1]), _bare(kwargs))


def _call(function: Callable[..., Any], call: Call, layer: nn.Module, hidden: States, *args: Any) -> Any:
    assert call.compiling is not None
    try:
        return _compiled(function, call.compiling.options)(layer, hidden, *args)
    except torch._dynamo.exc.Unsupported as error:
        raise UnsupportedModelError(
            f"`compile`: `{type(layer).__name__}` cannot be compiled as one graph: {str(error).splitlines()[0]} "
            "Run the model without `skipit.compile`."
        ) from error


def handles(packs_mlp: bool, hidden: States, execution: Execution) -> bool:
    """Whether a layer that some tokens run, or that has a bound on how many do, is run as a graph."""
    call, bounded = execution.call, execution.stretch.bounds is not None
    if call.unit == "attention" or hidden.shape[1] == 1 or not (bounded or execution.count):
        return False
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


def _run(layer: nn.Module, hidden: States, packing: Packing | None, block: bool, kwargs: dict[str, Any]) -> Any:
    """Attention for every token, the MLP for those that run."""
    if packing is None:
        return run(layer, hidden, kwargs)
    name: str = layer.skipit_parts[1]  # type: ignore[index, assignment]
    mlp: Any = layer._modules[name]

    def some(states: States, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return mlp(states, *args, **kwargs)
        output = mlp(_pack(states, packing))
        return with_states(output, _unpack(states_of(output), packing, torch.zeros_like(states)))

    output = run(with_parts(layer, **{name: Part(mlp, some)}), hidden, kwargs)
    kept = torch.where(packing.run[..., None], states_of(output), hidden) if block else states_of(output)
    return with_states(output, kept)


def _evicting(layer: nn.Module, hidden: States, packing: Packing, kwargs: dict[str, Any]) -> tuple[Any, Keys, Values]:
    """A layer for the tokens that run alone: what it gives for all, and the keys and values of a packed row."""
    taken, pack = Taken(), partial(_pack, packing=packing)
    packed = {**kwargs, "past_key_values": taken}
    if kwargs.get("position_embeddings") is not None:
        packed["position_embeddings"] = tree_map(pack, kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        packed["position_ids"] = pack(kwargs["position_ids"][..., None])[..., 0]
    if kwargs.get("attention_mask") is not None:
        index = _index(packing)
        packed["attention_mask"] = visible_keys(kwargs["attention_mask"], index, index, 0)
    output = run(layer, pack(hidden), packed)
    return with_states(output, _unpack(states_of(output), packing, hidden)), taken.keys, taken.values


def _pack(
    tokens: Shaped[Tensor, "*any batch_or_1 seq dim"], packing: Packing
) -> Shaped[Tensor, "*any batch width dim"]:
    """The tokens that run, row by row; the last one of all in the places after them."""
    batch, width = packing.columns.shape
    tokens = tokens.expand(*tokens.shape[:-3], batch, -1, -1)
    places = packing.columns.clamp(max=tokens.shape[-2] - 1)[..., None]
    return tokens.gather(-2, places.expand(*tokens.shape[:-2], width, tokens.shape[-1]))


def _unpack(
    tokens: Float[Tensor, "batch width dim"], packing: Packing, others: Float[Tensor, "batch seq dim"]
) -> Float[Tensor, "batch seq dim"]:
    """Each packed token at its place, `others` where none was packed."""
    ranks = packing.ranks.clamp(0, tokens.shape[1] - 1)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.where(packing.run[..., None], tokens.gather(1, ranks), others)


def _index(packing: Packing) -> Int[Tensor, "batch width"]:
    return packing.columns.masked_fill(packing.columns == packing.run.shape[1], -1)


def _bare(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "past_key_values"}
