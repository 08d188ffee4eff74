"""A K/V cache whose layers may hold different tokens.

transformers asks a cache how many tokens it has seen (`get_seq_length`, for positions and masks) and assumes
that every layer holds them all. Here each layer counts the tokens it has seen and keeps, beside the keys and
values, the sequence index of each slot: rows may hold different tokens, and a slot of index -1 holds none.

Where keys and values are kept (`retain`) and no token runs a layer, nobody reads them yet: the layer owes them. They
are made, for all tokens at once, when somebody first looks; often nobody does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import UnsupportedModelError
from .room import Room, extend, grow

# Those of some tokens, and those of all that a layer holds, in rows.
Keys = Float[Tensor, "batch heads tokens head_dim"]
Values = Float[Tensor, "batch heads tokens value_dim"]
KeysAndValues = tuple[Float[Tensor, "rows heads slots head_dim"], Float[Tensor, "rows heads slots value_dim"]]


class _Owed(NamedTuple):
    """Keys and values that a call has not made: how, by whom, and from what."""

    make: Callable[..., KeysAndValues]
    module: ref[nn.Module]
    hidden: Float[Tensor, "batch tokens dim"]
    kwargs: dict[str, Any]


class SkipCacheLayer(DynamicLayer):
    """Keys and values of the tokens that exist for one layer.

    Attributes:
        index: the sequence index of each slot or -1; None while slot i holds token i.
        partial: whether tokens are missing, so that there is an index.
        gaps: whether some slots hold none.
        seen: tokens per row that have passed, whether or not they were kept.
        decided: the gate logits that a prompt's tokens have decided by together (see `Call.pooled`), NaN where none
            were there; None where tokens decide for themselves.
        threshold: of each row, as its prompt has found it (see `GatedPerInput`), in the first layer; or None.
        learned: whether a gate that learns has marked some of them as absent.
    """

    def __init__(self) -> None:
        self._owed: tuple[_Owed, ...] = ()  # a copy of the layer may go its own way
        super().__init__()
        self._index: Int[Tensor, "batch_or_1 slots"] | None = None
        self._after = 0  # slots after those of `_index`, which hold the last tokens seen
        self.gaps = False
        self.seen = 0
        self.decided: Float[Tensor, "batch modalities"] | None = None
        self.threshold: Float[Tensor, " batch"] | None = None
        self.learned = False
        self._room_for_keys: Room | None = None
        self._room_for_values: Room | None = None

    @property
    def keys(self) -> Any:
        """Keys of all slots, [batch, heads, slots, head_dim], or None; those that are owed are made now."""
        self.settle()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys = keys

    @property
    def values(self) -> Any:
        """Values of all slots, [batch, heads, slots, value_dim], or None; those that are owed are made now."""
        self.settle()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    @property
    def partial(self) -> bool:
        """Whether tokens are missing, so that there is an index."""
        return self._index is not None

    @property
    def index(self) -> Int[Tensor, "batch_or_1 slots"] | None:
        """The sequence index of each slot or -1; None while slot i holds token i."""
        if self._index is not None and self._after:
            last = torch.arange(self.seen - self._after, self.seen, device=self._index.device)
            self.index = torch.cat([self._index, last.expand(len(self._index), -1)], dim=1)
        return self._index

    @index.setter
    def index(self, index: Int[Tensor, "batch_or_1 slots"] | None) -> None:
        self._index, self._after = index, 0

    def owes(
        self,
        make: Callable[..., KeysAndValues],
        module: nn.Module,
        hidden: Float[Tensor, "batch tokens dim"],
        kwargs: dict[str, Any],
    ) -> bool:
        """Pass over tokens whose keys and values can be made later; False if they cannot.

        Args:
            make: makes them, from the following three.
            module: the layer, or the attention inside it.
            hidden: states of all tokens of a call, as they enter.
            kwargs: its other arguments.
        """
        later = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type)
        if later or "_hf_hook" in vars(module):
            return False
        kept = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "attention_mask")}
        self._owed = (*self._owed, _Owed(make, ref(module), hidden, kept))
        self.seen += hidden.shape[1]
        return True

    def settle(self) -> None:
        """Make the keys and values that are owed."""
        if self._owed:  # which is asked much more often than not
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        owed, self._owed = self._owed, ()
        module = owed[0].module()
        if module is None:
            raise UnsupportedModelError("`past_key_values`: the model that this cache belongs to is gone.")
        hidden, kwargs = torch.cat([one.hidden for one in owed], dim=1), dict(owed[0].kwargs)
        self.seen -= hidden.shape[1]
        if len(owed) > 1:
            for name, dim in (("position_embeddings", -2), ("position_ids", -1)):
                every = [one.kwargs.get(name) for one in owed]
                if every[0] is not None:
                    kwargs[name] = tree_map(lambda *parts: torch.cat(parts, dim=dim), *every)  # noqa: B023
        keys, values = owed[0].make(module, hidden, {**kwargs, "attention_mask": None})
        self.append(keys, values, None, hidden.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which has no model, and reads the same memory."""
        self.settle()
        for room, _ in self._rooms():
            room.shared = True
        return vars(self)

    def _rooms(self) -> list[tuple[Room, Float[Tensor, "batch heads slots dim"]]]:
        """Memory with room to spare, and what is held of it."""
        both = ((self._room_for_keys, self._keys), (self._room_for_values, self._values))
        return [(room, held) for room, held in both if room is not None]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Forget in the end what was done within; nothing that is held by then is copied, nor made for it."""
        self.settle()
        before = dict(vars(self))
        ends = [(room, room.used) for room, held in self._rooms() if room.ends(held)]
        try:
            yield
        finally:
            vars(self).update(before)
            for room, used in ends:
                room.used = used

    def append(
        self, keys: Keys, values: Values, index: Int[Tensor, "batch tokens"] | None, tokens: int
    ) -> KeysAndValues:
        """Add slots for the next `tokens` tokens, of which some may be missing.

        Args:
            keys: of the new slots.
            values: of the new slots.
            index: sequence index of each new slot or -1; None when all tokens are there.
            tokens: how many tokens of the sequence have passed.

        Returns:
            All keys and values of the layer.
        """
        self.settle()
        self._count(tokens, index)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._keys, self._room_for_keys = extend(self._keys, self._room_for_keys, keys)
        self._values, self._room_for_values = extend(self._values, self._room_for_values, values)
        return self._keys, self._values

    def grow(self, tokens: int, index: Int[Tensor, "batch tokens"] | None = None) -> KeysAndValues:
        """Make room for the next tokens; whoever asks writes their keys and values.

        Args:
            tokens: how many slots, one for each token.
            index: as in `append`.

        Returns:
            All keys and values of the layer, the last `tokens` of them still to be written.
        """
        self.settle()
        self._count(tokens, index)
        self._keys, self._room_for_keys = grow(self._keys, self._room_for_keys, tokens)
        self._values, self._room_for_values = grow(self._values, self._room_for_values, tokens)
        return self._keys, self._values

    def _count(self, tokens: int, index: Int[Tensor, "batch slots"] | None) -> None:
        if index is not None:
            batch = len(index)
            self.index = index if self.seen == 0 else torch.cat([self.slots(batch, index.device), index], dim=1)
            self.gaps |= batch > 1
        elif self.partial:
            self._after += tokens
        self.seen += tokens

    def move(self, keys: Keys, values: Values) -> Room:
        """Go on in other memory, which has more slots than are held; what holds it is alive as long as this layer."""
        held = self.keys, self.values
        rooms = [Room(memory, one.shape[-2]) for memory, one in zip((keys, values), held, strict=True)]
        self._keys, self._values = (room.taken() for room in rooms)
        for new, old in zip((self._keys, self._values), held, strict=True):
            new.copy_(old)
        self._room_for_keys, self._room_for_values = rooms
        return rooms[0]

    def lives_in(self, keys: Keys, values: Values) -> bool:
        """Whether all that is held lies in this memory, and nobody else reads it."""
        rooms = self._rooms()
        return len(rooms) == 2 and all(
            room.memory is memory and room.ends(held) and not room.shared
            for (room, held), memory in zip(rooms, (keys, values), strict=True)
        )

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> KeysAndValues:
        """Add tokens all of which run; see `transformers.Cache`."""
        return self.append(key_states, value_states, None, key_states.shape[-2])

    def pass_over(self, tokens: int) -> None:
        """Count tokens that leave nothing in this layer."""
        self.settle()
        if self.index is None:
            self.index = torch.arange(self.seen)[None]
        self.seen += tokens

    def slots(self, batch: int, device: torch.device) -> Int[Tensor, "{batch} slots"]:
        """The sequence index of every slot."""
        self.settle()
        if self.index is None:
            return torch.arange(self.seen, device=device).expand(batch, -1)
        return self.index.to(device).expand(batch, -1)

    def get_seq_length(self) -> int:
        """Tokens seen per row, kept or not: what positions and masks are built from."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        self._owed = ()
        super().reset()
        self.index, self.gaps, self.seen, self.decided, self.learned = None, False, 0, None, False
        self.threshold = None
        self._room_for_keys = self._room_for_values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row; the argument is zero or negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove`: got {tokens_to_remove}, expected zero or a negative number.")
        self.settle()
        index = self.index
        self.seen = max(0, self.seen + int(tokens_to_remove))  # transformers 5.17 gives a tensor
        if not self.is_initialized:
            return
        if index is None:
            for room, held in self._rooms():
                room.crop(held, self.seen)
            self.keys, self.values = self.keys[..., : self.seen, :], self.values[..., : self.seen, :]
            return
        index = index.masked_fill(index >= self.seen, -1)
        kept = int((index >= 0).any(0).nonzero().max()) + 1 if (index >= 0).any() else 0
        self.index = index[:, :kept]
        self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Reorder rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.settle()
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)
        if self.index is not None and len(self.index) > 1:
            self.index = self.index.repeat_interleave(repeats, dim=0)
        if self.decided is not None:
            self.decided = self.decided.repeat_interleave(repeats, dim=0)
        if self.threshold is not None:
            self.threshold = self.threshold.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Int[Tensor, " rows"]) -> None:
        """Keep only the rows `indices`."""
        self.settle()
        if self.is_initialized:
            here = indices.to(self.keys.device)
            self.keys, self.values = self.keys[here], self.values[here]
        if self.index is not None and len(self.index) > 1:
            self.index = self.index[indices.to(self.index.device)]
        if self.decided is not None:
            self.decided = self.decided[indices.to(self.decided.device)]
        if self.threshold is not None:
            self.threshold = self.threshold[indices.to(self.threshold.device)]


class ImageCacheLayer(SkipCacheLayer):
    """Keys and values of images, in a layer that attends to nothing else: `seen` counts image states, not tokens."""

    def crop(self, tokens_to_remove: int) -> None:
        """Keep everything: images are forgotten with no token."""


class SkipCache(DynamicCache):
    """A cache for gated models; a gated model makes one by itself wherever transformers would make its own."""

    layers: list[SkipCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, image_layers: frozenset[int] = frozenset()) -> None:
        Cache.__init__(self, layers=[*_new_layers(num_layers, image_layers)])

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Forget in the end what was done within: tokens that were tried, and whatever they have left."""
        with ExitStack() as layers:
            for layer in self.layers:
                layers.enter_context(layer.undone())
            yield

    @property
    def partial(self) -> bool:
        """Whether some layer lacks tokens."""
        return any(layer.partial for layer in self.layers)

    def num_bytes(self) -> int:
        """Memory of the keys and values that are held, in bytes, without room to spare."""
        return sum(
            layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
            for layer in self.layers
            if layer.is_initialized
        )


def take_over(cache: Cache, num_layers: int, image_layers: frozenset[int] = frozenset()) -> SkipCache:
    """Let a gated model fill the cache that its caller owns, whether empty or filled by the dense model.

    The object stays the caller's, and becomes a `SkipCache` with what it holds.

    Raises:
        UnsupportedModelError: neither a `SkipCache` nor a `DynamicCache`, or a sliding window has dropped tokens.
    """
    if isinstance(cache, SkipCache):
        if len(cache.layers) != num_layers:
            raise UnsupportedModelError(
                f"`past_key_values`: got the cache of a model of {len(cache.layers)} layers, this one has {num_layers}."
            )
        return cache
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedModelError(
            f"`past_key_values`: got {type(cache).__name__}, a gated model takes `SkipCache` or `DynamicCache`. "
            "Leave `cache_implementation` unset, or run the dense model: `with running(mode='dense')`."
        )
    layers = _new_layers(num_layers, image_layers)
    for mine, theirs in zip(layers, cache.layers, strict=False):
        if not isinstance(theirs, DynamicLayer) or theirs.keys is None or theirs.values is None:
            continue  # empty
        if theirs.keys.shape[-2] != theirs.get_seq_length():
            raise UnsupportedModelError(
                "`past_key_values`: a sliding window has already dropped tokens, so the cache cannot be taken "
                "over. Start from an empty cache."
            )
        mine.update(theirs.keys, theirs.values)
    taken: Any = cache
    taken.__class__, taken.layers, taken.layer_class_to_replicate = SkipCache, layers, None
    return taken


def check_complete(cache: Any) -> None:
    """Refuse a cache in which keys were evicted, for a run that would look for all of them.

    Raises:
        UnsupportedModelError: says so.
    """
    if isinstance(cache, SkipCache) and cache.partial:
        raise UnsupportedModelError(
            "`past_key_values`: a gated run with kv='evict' has left keys out of this cache, and a dense run "
            "needs them all. Start from an empty cache."
        )


def _new_layers(num_layers: int, image_layers: frozenset[int]) -> list[SkipCacheLayer]:
    kinds = [ImageCacheLayer if index in image_layers else SkipCacheLayer for index in range(num_layers)]
    return [kind() for kind in kinds]
