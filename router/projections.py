"""Leaving out projections whose result nobody reads.

Under `retain` keys and values of all tokens are computed by the layer's own code, in which the query projection comes
first; nobody reads those queries. The tokens that run then go through the same code for their queries, and nobody reads
their keys and values, which are there already. In the usual layout (an `nn.Linear` each, called `q_proj`, `k_proj` and
`v_proj`) what is not read is zeros; in any other it is computed for nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor, nn

from .subclass import Mixin, mix_in, take_out

if TYPE_CHECKING:
    _Linear = nn.Linear
else:
    _Linear = object

Wanted = Literal["queries", "keys and values", "everything"]
_wanted: ContextVar[Wanted] = ContextVar("skipit_wanted", default="everything")


@contextmanager
def only(wanted: Wanted) -> Iterator[None]:
    """Within the block, the other projections return zeros."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


class _Projection(Mixin, _Linear):
    gives: Wanted

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch features"]:
        """The projection, or zeros of its shape where only others are wanted."""
        if _wanted.get() in ("everything", self.gives):
            return super().forward(input)
        return input.new_zeros(()).expand(*input.shape[:-1], self.out_features)  # one number, wherever it is read


class QueryProjection(_Projection):
    """Mixin put before the class of a query projection."""

    gives = "queries"


class KeyValueProjection(_Projection):
    """Mixin put before the class of a key or value projection."""

    gives = "keys and values"


_KINDS = {"q_proj": QueryProjection, "k_proj": KeyValueProjection, "v_proj": KeyValueProjection}


def wrap_projections(layer: nn.Module) -> None:
    """Let a decoder layer's projections know when they are not needed; in a layout of its own nothing changes."""
    for name, module in list(layer.named_modules()):
        kind = _KINDS.get(name.rpartition(".")[-1])
        if kind is not None and isinstance(module, nn.Linear):
            mix_in(module, kind)


def unwrap_projections(layer: nn.Module) -> None:
    """Undo `wrap_projections`, also below a LoRA layer that PEFT put around a projection."""
    for module in layer.modules():
        if isinstance(module, _Projection):
            take_out(module)
