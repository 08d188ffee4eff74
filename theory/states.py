"""What enters and leaves the layers of a model while it runs: one recorder for every measure."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

_CACHE = ("past_key_values", "use_cache")


@dataclass(frozen=True)
class LayerRun:
    """One layer's part in a forward pass.

    Attributes:
        index: of the layer.
        entered: its input.
        left: its output.
        kwargs: its other arguments, without a cache.
    """

    index: int
    entered: Float[Tensor, "*batch dim"]
    left: Float[Tensor, "*batch dim"]
    kwargs: dict[str, Any]


@contextmanager
def watching(layers: Iterable[nn.Module], watch: Callable[[LayerRun], None]) -> Iterator[None]:
    """Within the block, `watch` is called after each of the layers, or of any other modules from states to states."""

    def after(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        left = output[0] if isinstance(output, tuple) else output
        watch(LayerRun(index, entered, left, {k: v for k, v in kwargs.items() if k not in _CACHE}))

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(partial(after, index), with_kwargs=True))
        yield


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[LayerRun]]:
    """Within the block every layer of a decoder that runs is recorded, with the graph between them.

    Layers come in order. A model leaves cross-attention layers out when there is no image.
    """

    def require_grad(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The graph begins here: the embeddings and the vision tower need no gradient.
        return (args[0].detach().requires_grad_(), *args[1:])

    runs: list[LayerRun] = []
    with watching(layers, runs.append), layers[0].register_forward_pre_hook(require_grad):
        yield runs
