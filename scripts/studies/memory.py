"""Memory: keys and values that a cache holds, and the most that anything had allocated at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipit.router import SkipCache, Trace, running
from skipit.theory.cost import CostModel


@torch.no_grad()
def cache_bytes(model: Any, inputs: dict[str, Tensor], costs: CostModel) -> tuple[int, int]:
    """Bytes of keys and values after a prompt, and those of the tokens that must be kept.

    Returns:
        What the cache holds, and the ideal: under `evict` the tokens that ran each layer, else all; padding never.
    """
    trace = Trace()
    with running(trace=trace):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    if not isinstance(cache, SkipCache):
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return held, held
    (step,) = trace.steps
    kept = step.run if step.kv == "evict" and step.unit != "mlp" else step.real.expand_as(step.run)
    ideal = (kept.sum((1, 2)).double().cpu() * costs.column("kv_bytes")).sum()
    return cache.num_bytes(), int(ideal)


@torch.no_grad()
def peak_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Most bytes that a forward pass over a prompt had allocated at once, beyond what was there before."""
    return most_allocated(lambda: model(**inputs, use_cache=True, logits_to_keep=1), model.device)


def most_allocated(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that a call had allocated at once, beyond what was there before.

    From torch's own account of its allocations: on a GPU the allocator's, on a CPU the profiler's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
