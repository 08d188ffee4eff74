"""The hardware that times were measured on, in words."""

import os
import platform
from pathlib import Path

import torch


def hardware(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The GPU, if one is there, the processor, and how many threads PyTorch uses."""
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts.append(f"{_processor(cpuinfo)}, {os.cpu_count()} cores, PyTorch threads: {torch.get_num_threads()}")
    return ", ".join(parts)


def _processor(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
