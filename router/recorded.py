"""Layers recorded once and replayed: what the host does in a layer is then a few launches, whatever the layer does.

On CUDA a recording is a CUDA graph; on other devices its function runs again on the same memory, which is how all but
the graph itself is tested. Every layer has recordings of its own, so that those that nobody runs are not replayed: one
graph of a whole step could leave nothing out.

A decoding step needs keys and values at one place, whatever their number. So each layer has memory for those of one
cache, which moves into it after its prompt. A second cache that lives at the same time is served without recordings.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .cache import Keys, SkipCacheLayer, Values

States = Float[Tensor, "batch seq dim"]
Something = Shaped[Tensor, "..."]  # whatever a call is given or gives
MOST = 16  # recordings that a layer has; of more, the one that was used longest ago gives way
MEMORIES = 4  # that a layer has for caches of other sizes, batches first of all; likewise
SLOTS = 512  # the room for keys and values that decoding steps are recorded with is a multiple of this
SPARE = 128  # slots that are free at first


class _Shared:
    """Memory that recordings read from, or leave something in; those of all layers share it, and keep it alive."""

    def __init__(self, like: Something) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._held: tuple[Tensor, int] | None = None

    def fill(self, given: Something) -> None:
        """Copy it, unless it is what was copied last: positions are the same in every layer."""
        if given.is_inference():
            self._held = None
        elif self._held is not None and self._held[0] is given and self._held[1] == given._version:
            return
        else:
            self._held = (given, given._version)
        self.memory.copy_(given)


class _Recording:
    """A function of what lies in memory, recorded.

    Args:
        function: needs no arguments.
        given: the memory that it reads.
        device: of everything in it.
        pool: memory for what it makes on the way; None where there is no graph.
        left: memory for the tensors that it gives, by their number: a graph would keep those of its own for ever.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        given: list[_Shared],
        device: torch.device,
        pool: Any,
        left: Callable[[int, Something], _Shared],
    ) -> None:
        self._graph = None
        self._given = given
        tensors: list[Tensor] = []
        if device.type == "cuda":
            here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                function()
                self._output = function()
            here.wait_stream(aside)
        else:
            self._output = function()
        _taken_apart(self._output, tensors)
        self._left = [left(number, tensor) for number, tensor in enumerate(tensors)]
        self._output = _put_together(self._output, iter([one.memory for one in self._left]))
        self._function = function
        if device.type == "cuda":
            del tensors
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._leave()

    def _leave(self) -> None:
        tensors: list[Tensor] = []
        _taken_apart(self._function(), tensors)
        for left, tensor in zip(self._left, tensors, strict=True):
            left.memory.copy_(tensor)

    def __call__(self) -> Any:
        """What the function gives, in memory that is the caller's."""
        if self._graph is None:
            self._leave()
        else:
            self._graph.replay()
        return _put_together(self._output, (left.memory.clone() for left in self._left))


class _Layer:
    """A layer's recordings, and what must stay as it is for them to be of any use."""

    def __init__(self, layer: nn.Module) -> None:
        self.recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self.seen: OrderedDict[Any, None] = OrderedDict()
        self.memory: OrderedDict[tuple[Any, ...], _Memory] = OrderedDict()
        modules = [module for name, module in layer.named_modules() if not name.startswith("layer_gate")]
        self._modules = [(module, dict(module._modules)) for module in modules]
        self._tensors = [
            (place, name, tensor.data_ptr())
            for module in modules
            for place in (module._parameters, module._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]
        hooked = any("_hf_hook" in vars(module) for module in modules)
        self.recordable = not hooked and self.unchanged()

    def unchanged(self) -> bool:
        """Whether weights lie where they lay, in the same modules, and nobody has put a hook inside."""
        for number, (module, children) in enumerate(self._modules):
            if module._modules != children or (number and (module._forward_hooks or module._forward_pre_hooks)):
                return False
        for place, name, address in self._tensors:
            tensor = place.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
        return True


class _Memory:
    """Keys and values of the one cache that lives here, of so many rows and slots; and the steps recorded on them."""

    def __init__(self, keys: Keys, values: Values, slots: int) -> None:
        with torch.inference_mode(False):
            self.slots = slots
            self.keys, self.values = (one.new_zeros(*one.shape[:2], slots, one.shape[-1]) for one in (keys, values))
        self.recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._tenant: ReferenceType[Any] | None = None

    @property
    def taken(self) -> bool:
        """Whether a cache lives here."""
        return self._tenant is not None and self._tenant() is not None

    def admit(self, store: SkipCacheLayer) -> None:
        """Let a layer's cache live here, where none does."""
        self._tenant = ref(store.move(self.keys, self.values))


class Recordings:
    """Of a model's layers; used by one thread at a time."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()
        self._shared: WeakValueDictionary[Any, _Shared] = WeakValueDictionary()
        self._streams: dict[torch.device, Any] = {}
        self._last_place: tuple[int, Tensor] | None = None
        self._found: tuple[nn.Module, SkipCacheLayer, _Memory] | None = None
        self._pools: dict[torch.device, Any] = {}
        self._lock = RLock()

    def __reduce__(self) -> tuple[type["Recordings"], tuple[()]]:
        """For a copy, which begins with none: they are of the model's own memory."""
        return Recordings, ()

    def run(self, function: Callable[..., Any], layer: nn.Module, hidden: States, *args: Any) -> Any:
        """`function(layer, hidden, *args)`; recorded when a call of its kind comes the second time.

        Args:
            function: reads nothing but its arguments, asks the device for nothing, and writes nowhere.
            layer: a gated layer.
            hidden: states that enter it.
            *args: tensors, None, numbers, and tuples and dictionaries of them.
        """
        with self._lock:
            known = self._known(layer, hidden)
            if known is None:
                return function(layer, hidden, *args)
            leaves: list[Tensor] = []
            key = (function, _taken_apart((hidden, *args), leaves))
            if key not in known.recordings and key not in known.seen:
                _remember(known.seen, key, None, MOST)
                return function(layer, hidden, *args)
            made = partial(function, layer)
            return self._replay(known.recordings, key, leaves, (hidden, *args), made, hidden.device)

    def can_step(
        self,
        layer: nn.Module,
        hidden: States,
        store: SkipCacheLayer | None,
        kwargs: dict[str, Any],
    ) -> bool:
        """Whether `step` has a recording for this, or can make one."""
        mask = kwargs.get("attention_mask")
        if store is None or not store.is_initialized or hidden.shape[1] != 1:
            return False
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4):
            return False
        with self._lock:
            known = self._known(layer, hidden)
            memory = None if known is None else self._memory(known, store)
            self._found = None if memory is None else (layer, store, memory)
            return self._found is not None

    def step(
        self,
        function: Callable[..., Any],
        layer: nn.Module,
        hidden: Float[Tensor, "batch 1 dim"],
        store: SkipCacheLayer,
        kwargs: dict[str, Any],
        *args: Any,
        index: Int[Tensor, "batch 1"] | None = None,
    ) -> Any:
        """`function(layer, keys, values, place, hidden, *args, kwargs)` where `can_step` says so.

        Args:
            function: of one token per row; writes its keys and values into the memory it is given, at a place.
            layer: a gated layer.
            hidden: states that enter it.
            store: where its keys and values are; the place is that of its new slots.
            kwargs: the layer's other arguments; a mask is over the keys that there are and the new ones.
            *args: more for the function.
            index: the sequence index of the new slots, -1 where a row has none; None where all have one.
        """
        with self._lock:
            if self._found is None or self._found[0] is not layer or self._found[1] is not store:
                self.can_step(layer, hidden, store, kwargs)  # another thread has asked since
            assert self._found is not None
            memory = self._found[2]
            self._found = None
            place = store.grow(1, index)[0].shape[-2] - 1
            room = _room(place)
            mask = kwargs.get("attention_mask")
            if mask is not None:
                mask = F.pad(mask, (0, room - mask.shape[-1]))
            kwargs = {name: it for name, it in kwargs.items() if name != "past_key_values"} | {"attention_mask": mask}
            given = (self._place(place, hidden.device), hidden, *args, kwargs)
            leaves: list[Tensor] = []
            key = (function, room, _taken_apart(given, leaves))
            made = partial(function, layer, *(one.narrow(-2, 0, room) for one in (memory.keys, memory.values)))
            return self._replay(memory.recordings, key, leaves, given, made, hidden.device)

    def _place(self, place: int, device: torch.device) -> Int[Tensor, " 1"]:
        """A number as a tensor, the same one for all layers that ask for it in turn."""
        if self._last_place is None or self._last_place[0] != place or self._last_place[1].device != device:
            with torch.inference_mode(False):
                self._last_place = place, torch.full((1,), place, device=device)
        return self._last_place[1]

    def _known(self, layer: nn.Module, hidden: States) -> _Layer | None:
        """What is known of a layer; None where it cannot be recorded as things are."""
        device = hidden.device
        if layer.training or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
            return None
        if device.type == "cuda":  # memory is used in turn, which only one stream keeps to
            stream = torch.cuda.current_stream(device)
            if self._streams.setdefault(device, stream) != stream:
                return None
        known = self._layers.get(layer)
        if known is None or not known.unchanged():
            known = self._layers[layer] = _Layer(layer)
        return known if known.recordable else None

    def _memory(self, known: _Layer, store: SkipCacheLayer) -> _Memory | None:
        """Memory where the store lives, with a slot to spare; None where another lives there.

        One that is outgrown gives way to one twice as large or more: together all that were take no more than the last.
        """
        keys, values = store.keys, store.values
        slots = keys.shape[-2]
        key = (keys.shape[:2], keys.shape[-1], values.shape[-1], keys.dtype, keys.device)
        memory = known.memory.get(key)
        lives = memory is not None and store.lives_in(memory.keys, memory.values)
        if memory is not None and memory.taken and not lives:
            return None
        if memory is None or slots >= memory.slots:
            room = _room(slots + SPARE - 1)
            memory = _Memory(keys, values, room if memory is None else max(room, 2 * memory.slots))
            lives = False
        if not lives:
            memory.admit(store)
        _remember(known.memory, key, memory, MEMORIES)
        return memory

    def _replay(
        self,
        recordings: OrderedDict[Any, _Recording],
        key: Any,
        leaves: list[Something],
        args: tuple[Any, ...],
        function: Callable[..., Any],
        device: torch.device,
    ) -> Any:
        inputs = [self._memory_for("given", number, leaf) for number, leaf in enumerate(leaves)]
        for one, leaf in zip(inputs, leaves, strict=True):
            one.fill(leaf)
        recording = recordings.get(key)
        if recording is None:
            read = _put_together(args, iter([one.memory for one in inputs]))
            recording = _Recording(
                partial(function, *read),
                inputs,
                device,
                self._pool(device),
                partial(self._memory_for, "left"),
            )
        _remember(recordings, key, recording, MOST)
        return recording()

    def _memory_for(self, what: str, number: int, like: Something) -> _Shared:
        key = (what, number, like.shape, like.dtype, like.device)
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(like)
        return shared

    def _pool(self, device: torch.device) -> Any:
        """Memory that recordings use in turn, none of which leaves anything in it for another."""
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools.get(device)


def _room(place: int) -> int:
    """The slots that a step is recorded with whose own slot is at a place."""
    return (place // SLOTS + 1) * SLOTS


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > most:
        known.popitem(last=False)


def _taken_apart(value: Any, tensors: list[Something]) -> Any:
    """The kind of a call's arguments, to be compared; appends their tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, tuple | list):
        return type(value), tuple(_taken_apart(one, tensors) for one in value)
    if isinstance(value, dict):
        return tuple((name, _taken_apart(one, tensors)) for name, one in value.items())
    return value


def _put_together(value: Any, tensors: Any) -> Any:
    """The same arguments with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        parts = [_put_together(one, tensors) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _put_together(one, tensors) for name, one in value.items()}
    return value
