"""Settings every test relies on: no network, one thread, one seed, and shapes in signatures that are checked."""

import os
import sys
from collections.abc import Callable
from typing import Any, get_args

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check with beartype the annotations that name a shape, and only those.

    Wrong values of every other type must reach the function: its own error message is what tests are about.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint if _names_a_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


# The hook wants the name of an importable function, and has to be there before the first `import skipit`.
sys.modules["shape_checks"] = sys.modules[__name__]
jaxtyping.install_import_hook("skipit", "shape_checks.check_shapes")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Every test starts from the same random state, on one thread: sums are then reproducible bit for bit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for dependencies that still draw from the global state


# What a law is tried with for families beyond the three of `tiny_models`; the other choices are slow tests.
_ONE_CHOICE = {"pattern": "tokens", "attention": "sdpa"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the fast suite leaves out of the product of families, patterns and attention functions."""
    for item in (item for item in items if item.path.name == "test_laws.py"):
        from tiny_models import FAMILIES

        params = getattr(getattr(item, "callspec", None), "params", {})
        other = any(params.get(name, choice) != choice for name, choice in _ONE_CHOICE.items())
        if other and params.get("family", FAMILIES[0]) not in FAMILIES:
            item.add_marker(pytest.mark.slow)
