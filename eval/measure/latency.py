"""Wall-clock time of prefill and decoding, several models in turn in one run, and the hardware it was measured on."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from skipit.eval.metrics.compute import speed_up
from skipit.router import SkipItError, Trace, find_router, running
from skipit.router.errors import readable
from skipit.router.measured import processor

from .stopwatch import run_once
from .twin import compiled

COMPILED = "dense, compiled"


@dataclass(frozen=True)
class Latency:
    """Medians over interleaved repeats, in milliseconds, and ratios to the first model.

    Attributes:
        prefill_ms: one forward over the prompt, with a cache; without the vision tower where `generate` runs it before,
            as transformers 5.23 does.
        decode_ms: one decoding step.
        prefill_speed_up: prefill time of the first model over this one's, median of the ratios pair by pair.
        decode_speed_up: the same for a decoding step.
        repeats: measurements.
        prefill_interval: of the prefill's speed-up, 95 %; None with too few repeats.
        decode_interval: of the decoding step's.
        decode_ideal: layers over the layers that a decoding step enters: its speed-up if only layers took time.
    """

    prefill_ms: float
    decode_ms: float
    prefill_speed_up: float
    decode_speed_up: float
    repeats: int
    prefill_interval: tuple[float, float] | None = None
    decode_interval: tuple[float, float] | None = None
    decode_ideal: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A model to time and the context it runs in, such as `lambda: running(budget=0.5)`."""

    model: Any
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@torch.no_grad()
def time_models(
    subjects: Mapping[str, Subject], inputs: dict[str, Tensor], *, decode_steps: int = 8, repeats: int = 15
) -> dict[str, Latency]:
    """Time models on the same inputs, one repeat of each in turn, so that a drifting machine touches all alike.

    Every repeat begins with another model: none is always the one after the slowest.

    Args:
        subjects: by name; the first is what speed-ups compare with, and should be the untouched dense model.
        inputs: a prompt batch.
        decode_steps: decoding steps per repeat.
        repeats: counted repeats, after two that are not.
    """
    prefill: dict[str, list[float]] = {name: [] for name in subjects}
    decode: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 2):
        names = list(subjects)
        for name in (names * 2)[repeat % len(names) :][: len(names)]:
            with subjects[name].context():
                first, step = run_once(subjects[name].model, inputs, decode_steps)
            if repeat >= 2:
                prefill[name].append(first)
                decode[name].append(step)
    base = next(iter(subjects))

    def ratios(times: dict[str, list[float]], name: str) -> list[float]:
        return [speed_up(a, b) for a, b in zip(times[base], times[name], strict=True)]

    return {
        name: Latency(
            1000 * statistics.median(prefill[name]),
            1000 * statistics.median(decode[name]),
            statistics.median(ratios(prefill, name)),
            statistics.median(ratios(decode, name)),
            repeats,
            median_interval(ratios(prefill, name)),
            median_interval(ratios(decode, name)),
            _decode_ideal(subjects[name], inputs, decode_steps),
        )
        for name in subjects
    }


def compiled_subject(dense: Any, inputs: dict[str, Tensor]) -> Subject | str:
    """The dense model with its decoder compiled for prompts like this and the tokens after it, or why it cannot be."""
    fast = compiled(dense)
    try:
        run_once(fast, inputs, 3)  # a prompt, a first token, and any later one are compiled apart
    except Exception as error:  # a compiler raises whatever it likes
        # Dynamo says which backend failed, and why in the line below.
        return f"{type(error).__name__}: {readable(' '.join(str(error).splitlines()[:2]))}"
    return Subject(fast)


def _decode_ideal(subject: Subject, inputs: dict[str, Tensor], steps: int) -> float:
    try:
        find_router(subject.model)
    except SkipItError:
        return 1.0
    trace = Trace()
    with subject.context(), running(trace=trace):
        run_once(subject.model, inputs, steps)
    entered = torch.stack([step.run.flatten(1).any(-1) for step in trace.steps[1 : steps + 1]])
    return float(entered.numel() / entered.sum().clamp(min=1))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The distribution-free interval of a median: two of the values themselves; None if there are too few.

    The number of values below the median is binomial, so the k-th smallest is above it with P(Bin(n, 1/2) < k).

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), median_interval([1.0, 2.0])
        ((1.0, 7.0), None)
    """
    last = int(binom.ppf((1 - confidence) / 2, len(values), 0.5)) - 1
    # `ppf` is the smallest k with P(Bin <= k) of at least the tail; one below it has at most the tail.
    return (sorted(values)[last], sorted(values)[-1 - last]) if last >= 0 else None


def hardware(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """In words: the GPU, if one is there, the processor, and how many threads PyTorch uses."""
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts.append(f"{processor(cpuinfo)}, {os.cpu_count()} cores, PyTorch threads: {torch.get_num_threads()}")
    return ", ".join(parts)
