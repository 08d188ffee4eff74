"""A module seen with other parts inside, for one call: what is left out of a layer, without a change to the layer.

A view shares everything with its module but the parts that are named, so a family's own code runs as it stands, and
threads that run the same layer in other ways do not meet.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .subclass import Mixin, own_class


class Part:
    """Stands for a module inside a view: calls a function in its place, and has everything else from it."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the module has."""
        return getattr(self._module, name)


def with_parts(module: nn.Module, **parts: Any) -> nn.Module:
    """A view of a module with other `parts`, by the names under which it calls them."""
    view = object.__new__(type(module))
    vars(view).update(vars(module), _modules={**module._modules, **parts})
    return view


def without(module: nn.Module, *names: str) -> nn.Module:
    """A view of an attention, or of a layer around one, in which some projections give zeros: nobody reads them.

    In the usual layout they are called `q_proj`, `k_proj` and `v_proj`; in any other nothing changes, and what is not
    read is computed for nothing.
    """
    parts: dict[str, Any] = {}
    for name, child in module.named_children():
        features = getattr(child, "out_features", None)
        if name in names and isinstance(features, int):
            parts[name] = Part(child, _zeros(features))
        elif any(name in child._modules for name in names):
            parts[name] = without(child, *names)
    return with_parts(module, **parts) if parts else module


def _zeros(features: int) -> Callable[[Float[Tensor, "*batch dim"]], Float[Tensor, "*batch features"]]:
    # One number, wherever it is read.
    return lambda states: states.new_zeros(()).expand(*states.shape[:-1], features)


def run(module: nn.Module, hidden: Float[Tensor, "batch seq dim"], kwargs: dict[str, Any]) -> Any:
    """Call a module or a view of one; a gated layer as its own class has it, without its gate."""
    if isinstance(module, Mixin):
        return own_class(type(module)).forward(module, hidden, **kwargs)  # type: ignore[attr-defined]
    return module(hidden, **kwargs)


def attention_and_mlp(layer: nn.Module) -> tuple[str, str] | None:
    """The names of an untouched layer's attention and of its MLP; None where it is not clear which is which."""
    children = dict(layer.named_children())
    attention = [name for name, child in children.items() if hasattr(child, "head_dim") and hasattr(child, "config")]
    maps = [name for name, child in children.items() if any(p.dim() > 1 for p in child.parameters())]
    others = [name for name in maps if name not in attention]
    return (attention[0], others[0]) if len(attention) == len(others) == 1 else None
