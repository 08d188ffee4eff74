"""Settings every test relies on: no network, one thread, one seed, and shapes in signatures that are checked."""

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["SKIPIT_CACHE"] = os.path.join(os.devnull, "none")  # what `bench` found here changes no test
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import shape_checks
import torch

shape_checks.install("skipit", "studies")  # before either is imported
# A job in the background of a shell begins with these ignored; tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.disable()  # until everything is: see `pytest_collection_finish`


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


def pytest_collection_finish() -> None:
    """Leave out of every later collection of garbage what is there for good: it is a million objects of imports."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
