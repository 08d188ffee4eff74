"""A second model on the same weights: a copy, or one that torch.compile has compiled."""

import copy
from typing import TypeVar

from torch import nn

from skipit.router import SkipItError
from skipit.router import compile as compile_layers
from skipit.router.decoder import find_decoder

BACKEND = "inductor"
Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A copy with the same weights in memory: what is run more often must not be what is nearer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def compiled(model: Model) -> Model:
    """A twin that will be compiled when it is first run, which takes a minute or more: with gates its layers."""
    copied = twin(model)
    try:
        compile_layers(copied, backend=BACKEND)
    except SkipItError:  # no gates
        find_decoder(copied)[1].compile(backend=BACKEND)
    return copied
