"""Changing what a live module does by a dynamic subclass of its own class, and undoing it.

Parameters, `state_dict` keys, hooks, `isinstance` and the class name stay as they were.
"""

from functools import cache
from types import MethodType
from typing import Any

from torch import nn


class Mixin:
    """Base of the classes that `mix_in` puts before a module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the two classes: one made at run time cannot be found by its name."""
        return _rebuild, type(self).__bases__, self.__dict__


def mix_in(module: nn.Module, mixin: type) -> None:
    """Let `mixin` come before the module's own class."""
    own: type = type(module)
    _become(module, _combined(mixin, own))


def take_out(module: nn.Module) -> None:
    """Undo `mix_in`."""
    _become(module, own_class(type(module)))


def own_class(combined: type) -> type:
    """The class a module had before `mix_in`."""
    own: type = combined.__bases__[1]
    return own


def _become(module: nn.Module, kind: type) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):
        # accelerate (`device_map`) put a forward of its own on the instance, around the class's.
        module._old_forward = MethodType(kind.forward, module)  # type: ignore[attr-defined, assignment]


@cache
def _combined(mixin: type, base: type) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _rebuild(mixin: type, base: type) -> Any:
    made = _combined(mixin, base)
    return made.__new__(made)
