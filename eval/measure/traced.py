"""`generate` that also says what ran: for every token and layer, and in FLOPs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipit.router import InputError, Trace, find_router, running
from skipit.theory.cost import CostModel, trace_flops


@dataclass(frozen=True)
class GenerationTrace:
    """What a generation executed.

    Tokens are those of the prompt, padding included, and the generated ones that were fed back: all but the last.

    Attributes:
        run: bool [layers, batch, tokens], which token ran which layer; False at padding.
        modality: int64 [batch, tokens], 0 text, 1 vision.
        real: bool [batch, tokens], False at padding.
        flops: fp64 [layers, batch, tokens], executed, gates included.
        dense_flops: fp64 [layers, batch, tokens], what the dense decoder would have executed.
        trace: its steps, as `running(trace=...)` records them.
    """

    run: Tensor
    modality: Tensor
    real: Tensor
    flops: Tensor
    dense_flops: Tensor
    trace: Trace

    @property
    def share(self) -> float:
        """Executed over dense FLOPs of the decoder."""
        return float(self.flops.sum() / self.dense_flops.sum())

    @property
    def depth(self) -> Tensor:
        """Layers that each token ran, int64 [batch, tokens]."""
        return self.run.sum(0)


def generate(model: Any, *, return_trace: bool = False, budget: float | str | None = None, **kwargs: Any) -> Any:
    """`model.generate(**kwargs)` of a gated model, at an operating point, and what it executed.

    Args:
        model: gated.
        return_trace: return what ran, too.
        budget: a calibrated operating point, by its number or its name, as `model.generate` itself takes it.
        **kwargs: of transformers' `generate`.

    Returns:
        What `model.generate` returns; with `return_trace` a pair of that and a `GenerationTrace`.

    Raises:
        SkipItError: the model has no gates.
        RouterConfigError: not a calibrated budget.
        InputError: `return_trace` with beams, which change rows while generating, or with anything else that runs a
            token more than once.
    """
    _, router = find_router(model)
    router.config.threshold_at(budget)
    beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None)
    if return_trace and (beams or model.generation_config.num_beams or 1) > 1:
        raise InputError(
            "`return_trace`: beam search moves rows while generating, so no row has a trace of its own. "
            "Leave `num_beams` at 1, or record steps with `running(trace=...)`."
        )
    if not return_trace:
        return model.generate(budget=budget, **kwargs)
    trace = Trace()
    with running(trace=trace):
        output = model.generate(budget=budget, **kwargs)
    trace.check_one_pass()
    executed, dense = trace_flops(CostModel.of(model, router.config.layers), trace.steps)
    return output, GenerationTrace(
        run=torch.cat([step.run for step in trace.steps], dim=-1),
        modality=torch.cat([step.modality for step in trace.steps], dim=-1),
        real=torch.cat([step.real for step in trace.steps], dim=-1),
        flops=torch.cat(executed, dim=-1),
        dense_flops=torch.cat(dense, dim=-1),
        trace=trace,
    )
