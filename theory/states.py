"""What enters and leaves the layers of a model while it runs: one recorder for every measure."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class LayerRun(NamedTuple):
    """One layer's part in a forward pass.

    Attributes:
        index: of the layer.
        entered: its input.
        left: its output.
        kwargs: its other arguments.
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
        watch(LayerRun(index, entered, output[0] if isinstance(output, tuple) else output, kwargs))

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(partial(after, index), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


class LayerStates:
    """Records what enters and leaves every decoder layer in one forward pass, with the graph between them.

    Attributes:
        at: indices of the layers that were there, in order: a model leaves cross-attention layers out when there is no
            image.
        entered: per such layer, [batch, seq, dim].
        left: the same.
        kwargs: its other arguments, without a cache.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.at: list[int] = []
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def __enter__(self) -> "LayerStates":
        """Start recording."""
        self._hooks = ExitStack()
        self._hooks.callback(self.layers[0].register_forward_pre_hook(_require_grad).remove)
        self._hooks.enter_context(watching(self.layers, self._record))
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop recording; what was recorded stays."""
        self._hooks.close()

    def _record(self, run: LayerRun) -> None:
        self.at.append(run.index)
        self.entered.append(run.entered)
        self.left.append(run.left)
        self.kwargs.append({k: v for k, v in run.kwargs.items() if k not in ("past_key_values", "use_cache")})


def _require_grad(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The graph begins here: the embeddings and the vision tower need no gradient.
    return (args[0].detach().requires_grad_(), *args[1:])
