"""One timed run of a prompt and a few tokens after it; needs torch alone."""

import time
from typing import Any

import torch
from torch import Tensor


def run_once(model: Any, inputs: dict[str, Tensor], steps: int) -> tuple[float, float]:
    """Seconds of a prefill, and of one of the `steps` greedy decoding steps after it.

    The model's calls within `generate()` are timed, and nothing between them: what each family needs beside ids and a
    mask, such as positions of a picture's rows and columns, only its own preparation knows.
    """
    device = next(model.parameters()).device
    started: list[float] = []
    seconds: list[float] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: started.append(now(device)), prepend=True),
        model.register_forward_hook(lambda *_: seconds.append(now(device) - started[-1])),
    ]
    length = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1}
    try:
        model.generate(**inputs, **length, do_sample=False, num_beams=1, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return seconds[0], sum(seconds[1 : steps + 1]) / steps


def now(device: torch.device) -> float:
    """Seconds on a clock, when a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
