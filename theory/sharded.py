"""Parameters that DeepSpeed has spread over processes (ZeRO-3), whole for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def sharded(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of which a process has a part only, until a module that needs them runs."""
    return [parameter for parameter in parameters if hasattr(parameter, "ds_id")]


@contextmanager
def unsharded(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Every process has these parameters whole within the block; nothing happens to those that are whole anyway.

    All processes must enter it together. What is changed inside is lost.
    """
    spread = sharded(parameters)
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield
