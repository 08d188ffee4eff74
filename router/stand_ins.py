"""What stands in for a cache while a layer's own code runs: keys and values then go where they belong.

An attention hands its new keys and values to `past_key_values.update` and attends to what that returns. So whoever
answers in the cache's place can take them, have them ready, or put them into rows, without code for any family.
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .cache import Keys, KeysAndValues, SkipCacheLayer, Values
from .errors import UnsupportedModelError
from .layout import Layout
from .views import run, without


class _Captured(Exception):
    """Carries keys and values out of a layer that is left before its attention is computed."""

    def __init__(self, keys: Keys, values: Values) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Capture:
    """Takes the keys and values a layer is about to store, and leaves the layer."""

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> None:
        raise _Captured(keys, values)


def capture(module: nn.Module, hidden: Float[Tensor, "batch seq dim"], kwargs: dict[str, Any]) -> KeysAndValues:
    """The keys and values that a module is about to store, without its attention or MLP.

    The module itself computes them, up to the point where it would store them.

    Raises:
        UnsupportedModelError: it never does.
    """
    try:
        run(without(module, "q_proj"), hidden, {**kwargs, "past_key_values": _Capture()})
    except _Captured as captured:
        return captured.keys, captured.values
    raise UnsupportedModelError(
        f"`{type(module).__name__}` does not store its keys and values through `past_key_values.update`, so `retain` "
        "cannot have them without the rest of it. Use kv='evict'."
    )


class Taken:
    """Takes the keys and values of all tokens of a first call, which attend to them and to nothing else."""

    keys: Keys
    values: Values

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Keep them, and give them back."""
        self.keys, self.values = keys, values
        return keys, values


class Ended:
    """Writes keys and values to the end of those that there are, where room was left for them."""

    def __init__(self, keys: Keys, values: Values) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Write them, and give all."""
        first, new = self.keys.shape[-2] - keys.shape[-2], keys.shape[-2]
        self.keys.narrow(-2, first, new).copy_(keys)
        self.values.narrow(-2, first, new).copy_(values)
        return self.keys, self.values


class Slot:
    """Writes the keys and values of one token per row to a place that a tensor names, where there is memory for it."""

    def __init__(self, keys: Keys, values: Values, place: Int[Tensor, " 1"]) -> None:
        self.keys, self.values, self.place = keys, values, place

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Write them, and give all that there is memory for."""
        self.keys.index_copy_(-2, self.place, keys)
        self.values.index_copy_(-2, self.place, values)
        return self.keys, self.values


class Ready:
    """Has the keys and values of all tokens already; those of the tokens that run are not read."""

    def __init__(self, keys: Keys, values: Values) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Give what is there."""
        return self.keys, self.values


class HeldImages:
    """Lets a layer read the keys and values of images that it has already."""

    def __init__(self, store: SkipCacheLayer) -> None:
        self.layers: dict[int, SkipCacheLayer] = defaultdict(lambda: store)  # only one layer will ask


class Packed:
    """Puts the keys and values of packed tokens, the only ones a layer will have, into rows."""

    def __init__(self, store: SkipCacheLayer | None, layout: Layout, tokens: int) -> None:
        self.store, self.layout, self.tokens = store, layout, tokens

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Store them where there is a store; give all that there are."""
        keys, values = self.layout.to_rows(keys), self.layout.to_rows(values)
        if self.store is None:
            return keys, values
        return self.store.append(keys, values, self.layout.index, self.tokens)


class Marked:
    """Stores the keys and values of every token, and marks those that skip as absent."""

    def __init__(self, store: SkipCacheLayer, past: int, run: Bool[Tensor, "batch seq"]) -> None:
        self.store, self.past, self.run = store, past, run

    def update(self, keys: Keys, values: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Store them, and give all that there are."""
        index = torch.arange(self.past, self.past + self.run.shape[1], device=self.run.device)
        self.store.gaps = True
        return self.store.append(keys, values, index.masked_fill(~self.run, -1), keys.shape[-2])
