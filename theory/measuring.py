"""A model while it is measured; afterwards it is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from skipit.router import RouterConfig, attach, detach, find_router
from skipit.router.errors import SkipItError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def routed(model: nn.Module, layers: str | None = None) -> Iterator[None]:
    """Within the block the model has a router: its own, or else one at the decoder path `layers`."""
    try:
        find_router(model)
    except SkipItError:
        attach(model, RouterConfig(layers=layers))
    else:
        yield
        return
    try:
        yield
    finally:
        detach(model)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter needs a gradient, so the graph keeps nothing for one."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
