"""What `skipit bench` has measured on this machine, as the router needs it: how much packing must save to pay."""

import os
import platform
import re
import warnings
from functools import lru_cache
from math import inf
from pathlib import Path

import torch

from .errors import CheckpointError
from .strict_json import read_json

# FLOPs of query and output projections that packing a layer's queries must save to be worth its extra kernels, some 45.
# On a CPU as measured (docs/benchmarks.md); on a GPU 45 launches of 5 us against 400 TFLOP/s, an estimate.
PACKING_PAYS = {"cpu": 5e7, "cuda": 1e11}


@lru_cache
def packing_pays(device: torch.device, dtype: torch.dtype, hidden: int) -> float:
    """FLOPs that packing must save: as measured, where `skipit bench` was run for such layers, or a default.

    A file is read once per process. One that is damaged is warned of, and counts as none.
    """
    try:
        path = bench_file(device, dtype, hidden)
        if path.is_file():
            values = read_json(path)
            value = values.get("packing_pays") if isinstance(values, dict) else values
            if isinstance(value, int | float) and 0 <= value < inf:
                return float(value)
            raise CheckpointError(f"{path}: `packing_pays`: got {value!r}, expected a number, at least 0.")
    except (CheckpointError, OSError, RuntimeError) as error:  # the last: nobody knows where home is
        warnings.warn(f"{error} A default is used; `skipit bench MODEL` measures anew.", stacklevel=2)
    return PACKING_PAYS.get(device.type, PACKING_PAYS["cuda"])


def bench_file(device: torch.device, dtype: torch.dtype, hidden: int) -> Path:
    """Where `skipit bench` writes what it measures of layers on this machine: a file per device, dtype and width."""
    kind = str(dtype).removeprefix("torch.")
    return cache_folder() / "bench" / f"{re.sub('[^A-Za-z0-9]+', '-', device_name(device))}_{kind}_{hidden}.json"


def cache_folder() -> Path:
    """The user's folder for what can be made again: $SKIPIT_CACHE, or as Hugging Face's libraries on every system."""
    if own := os.environ.get("SKIPIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipit"


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's with PyTorch's threads: home folders are shared among unlike machines."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    return device.type


@lru_cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor in words."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
