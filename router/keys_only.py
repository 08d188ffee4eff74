"""Leaving out the query projection while a layer is asked for its keys and values alone.

Under `retain` a layer computes keys and values of skipped tokens by its own code, in which the query projection
comes first. Nobody reads those queries, so in the usual layout (an `nn.Linear` called `q_proj`) they are zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .subclass import Mixin, mix_in, take_out

if TYPE_CHECKING:
    _Linear = nn.Linear
else:
    _Linear = object

_keys_only: ContextVar[bool] = ContextVar("skipit_keys_only", default=False)


@contextmanager
def keys_only() -> Iterator[None]:
    """Within the block, query projections return zeros."""
    token = _keys_only.set(True)
    try:
        yield
    finally:
        _keys_only.reset(token)


class QueryProjection(Mixin, _Linear):
    """Mixin put before the class of a query projection."""

    def forward(self, input: Tensor) -> Tensor:
        """The projection, or zeros of its shape where only keys and values are wanted."""
        if _keys_only.get():
            return input.new_zeros(*input.shape[:-1], self.out_features)
        return super().forward(input)


def wrap_queries(layer: nn.Module) -> None:
    """Let a decoder layer's query projection know when it is not needed; without a `q_proj` nothing changes."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[-1] == "q_proj" and isinstance(module, nn.Linear):
            mix_in(module, QueryProjection)


def unwrap_queries(layer: nn.Module) -> None:
    """Undo `wrap_queries`, also below a LoRA layer that PEFT put around the projection."""
    for module in layer.modules():
        if isinstance(module, QueryProjection):
            take_out(module)
