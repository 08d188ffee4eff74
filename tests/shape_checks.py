"""An import hook that checks, with jaxtyping and beartype, the annotations that name a shape, and only those.

Wrong values of every other type must reach the function: its own error message is what tests are about. jaxtyping's
own hook is not used: it wraps functions without shapes too, checks arguments twice, and while it loads a module it
hides the bytecode of everything this module imports. With it, collecting the tests took half as long again.
"""

import ast
import dataclasses
import functools
import sys
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

_NAME = "_check_shapes"
_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))


def check_shapes(thing: Any) -> Any:
    """Check what a function, or the constructor of a dataclass, says of shapes; leave everything else as it is."""
    if torch.compiler.is_dynamo_compiling():  # which cannot trace the checks
        return thing
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and not hasattr(thing.__init__, "__wrapped__"):
            thing.__init__ = check_shapes(thing.__init__)  # type: ignore[misc]
        return thing
    hints = getattr(thing, "__annotations__", {})
    shapes = {name: hint for name, hint in hints.items() if _names_a_shape(hint)}
    if not shapes:
        return thing
    thing.__annotations__ = {name: shapes.get(name, Any) for name in hints}
    checked = _beartype(thing)
    thing.__annotations__ = hints
    bound = any("{" in str(hint) for hint in shapes.values())  # its arguments are part of its shapes
    if bound:
        checked = jaxtyping.jaxtyped(checked, typechecker=None)

    @functools.wraps(thing)
    def within(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if torch.compiler.is_dynamo_compiling():
            return thing(*args, **kwargs)
        with nullcontext() if bound else jaxtyping.jaxtyped("context"):  # an axis means one size throughout
            return checked(*args, **kwargs)

    return within


class _Loader(SourceFileLoader):
    """Decorates every function, innermost, and every class, outermost, with `check_shapes`."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)  # always anew: bytecode that is there has no decorators

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = ast.parse(data)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                place = 0 if isinstance(node, ast.ClassDef) else len(node.decorator_list)
                node.decorator_list.insert(place, ast.copy_location(ast.Name(_NAME, ast.Load()), node))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _NAME, check_shapes)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname.split(".")[0] in self.packages else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(*packages: str) -> None:
    """Check the shapes of what is imported from these packages from now on."""
    sys.meta_path.insert(0, _Finder(packages))
