"""What served requests have executed, as Prometheus counters on the server's `/metrics`.

The process that runs the model adds to a file of numbers, the one that answers `/metrics` reads it.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .decisions import Row, Spent

FOLDER = "SKIPIT_VLLM_COUNTS"  # in the environment, which the processes of a server share
FIELDS = {
    "requests": "Requests that have begun.",
    "tokens": "Tokens that were run, without those whose keys and values were cached.",
    "token_layers": "Layers that these tokens ran, summed over tokens.",
    "flops_routed": "FLOPs of what tokens ran, gates included, as skipit counts them.",
    "flops_executed": "FLOPs that were executed here, where attention is computed for every token.",
    "flops_dense": "FLOPs without skipping.",
}


class Counts:
    """What this process has run, by the names of what requests may spend.

    Args:
        folder: of the server's counts.
        names: of spendings.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.rows = {name: row for row, name in enumerate(names)}
        path = Path(folder) / str(os.getpid())
        self.table = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(names), len(FIELDS)))

    def __call__(self, row: Row, spent: Spent) -> None:
        """Add what a step of a request has spent."""
        first = row.spent.tokens == spent.tokens
        values = (spent.tokens, spent.token_layers, spent.routed, spent.executed, spent.dense)
        self.table[self.rows[row.spending.name]] += (float(first), *values)


class Collector:
    """What all processes of a server have run, for `prometheus_client`.

    Args:
        names: of spendings.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.folder = tempfile.TemporaryDirectory(prefix="skipit-vllm-")  # gone with the collector

    def collect(self) -> Iterator[Any]:
        """One counter per field, labelled by budget."""
        from prometheus_client.core import CounterMetricFamily

        table = np.zeros((len(self.names), len(FIELDS)))
        for path in Path(self.folder.name).iterdir():
            table += np.fromfile(path).reshape(table.shape)
        for column, (field, meaning) in enumerate(FIELDS.items()):
            family = CounterMetricFamily(f"skipit_{field}", meaning, labels=["budget"])
            for row, name in enumerate(self.names):
                family.add_metric([name], table[row, column])
            yield family


_collectors: list[Collector] = []


def publish(names: Sequence[str]) -> None:
    """Add the counters of a model to `/metrics` of this process, in the place of those of the model before."""
    from prometheus_client import REGISTRY

    while _collectors:
        REGISTRY.unregister(_collectors.pop())
    _collectors.append(Collector(names))
    os.environ[FOLDER] = _collectors[0].folder.name  # for the processes that are started next
    REGISTRY.register(_collectors[0])
