"""`generate` that also says what ran: for every token and layer, and in FLOPs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipit.router import Drafts, InputError, Trace, find_router, running
from skipit.theory.cost import CostModel, trace_flops

# One row per answer, and one pass over each of its tokens, whatever a checkpoint's `generation_config` asks for.
ONE_PASS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "prefill_chunk_size": None,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}


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
        return_trace: return what ran, too; with `lossless`, what was drafted and accepted.
        budget: a calibrated operating point, by its number or its name, as `model.generate` itself takes it.
        **kwargs: of `model.generate`: transformers' own, `budget_per`, and `lossless`, `draft_budget`, `draft_tokens`.

    Returns:
        What `model.generate` returns; with `return_trace` a pair of that and a `GenerationTrace`, or with `lossless` of
        that and its `Drafts`.

    Raises:
        SkipItError: the model has no gates.
        RouterConfigError: not a calibrated budget.
        InputError: `return_trace` with beams, which change rows while generating, or with anything else that runs a
            token more than once; or of a dense run, which records nothing.
    """
    _, router = find_router(model)
    if not return_trace:
        return model.generate(budget=budget, **kwargs)
    if kwargs.get("lossless") or getattr(kwargs.get("generation_config"), "lossless", None):
        drafts = Drafts()
        with running(drafts=drafts):
            return model.generate(budget=budget, **kwargs), drafts
    beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None)
    if (beams or model.generation_config.num_beams or 1) > 1:
        raise InputError(
            "`return_trace`: beam search moves rows while generating, so no row has a trace of its own. "
            "Leave `num_beams` at 1, or record steps with `running(trace=...)`."
        )
    trace = Trace()
    with running(trace=trace):
        output = model.generate(budget=budget, **kwargs)
    if not trace.steps:
        raise InputError("`return_trace`: a dense run executes every layer for every token, and records nothing.")
    made = output if isinstance(output, Tensor) else output.sequences
    embedded = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else None
    trace.check_one_pass(made.shape[1] - 1 + (0 if embedded is None else embedded.shape[1]))
    executed, dense = trace_flops(CostModel.of(model, router.config.layers), trace.steps)
    return output, GenerationTrace(
        run=torch.cat([step.run for step in trace.steps], dim=-1),
        modality=torch.cat([step.modality for step in trace.steps], dim=-1),
        real=torch.cat([step.real for step in trace.steps], dim=-1),
        flops=torch.cat(executed, dim=-1),
        dense_flops=torch.cat(dense, dim=-1),
        trace=trace,
    )
