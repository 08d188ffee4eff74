"""Running a model over a data set as a user would, with `generate()`, and counting what it executed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipit.router import Trace, running
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel, trace_compute

from .metric_classes import SkipRate
from .metrics import exact_match_scores, mean_by_group


@dataclass(frozen=True)
class Outcome:
    """What a model answered and what it executed for it.

    Attributes:
        answers: generated text, one per row.
        accuracy: exact match over all rows, in [0, 1].
        by_kind: exact match per kind of question.
        compute: executed share of the dense decoder's FLOPs, prefill and decoding together; 1 for the dense model.
        compute_by_unit: the same per unit [layers, modalities], NaN where a unit has no tokens.
        skip_rate: share of a unit's tokens that skipped it [layers, modalities].
    """

    answers: list[str]
    accuracy: float
    by_kind: dict[str, float]
    compute: float
    compute_by_unit: Tensor
    skip_rate: Tensor

    def to_json(self) -> dict[str, Any]:
        """The figures, without the answers."""
        return {
            "accuracy": self.accuracy,
            "by_kind": self.by_kind,
            "compute": self.compute,
            "compute_by_unit": self.compute_by_unit.tolist(),
            "skip_rate": self.skip_rate.tolist(),
            "rows": len(self.answers),
        }


@torch.no_grad()
def run_dataset(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
    costs: CostModel,
    kv: KVPolicy,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> Outcome:
    """Answer every row greedily and compare with its `answer`.

    Args:
        model: gated; a dense run is `mode="dense"`, whose figures are those of no skipping.
        processor: decodes answers.
        rows: with the columns the collator needs, `answer`, and optionally `kind`.
        collate: prompts only, padded on the left.
        costs: of the model's layers.
        kv: the model's K/V policy.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        progress: called with the number of rows of each finished batch.
        **options: of `skipit.running`: `policy`, `budget`, `mode`.
    """
    answers: list[str] = []
    layers = len(costs.layers)
    rate = SkipRate(layers)
    executed, dense = torch.zeros(layers, 2, dtype=torch.float64), torch.zeros(layers, 2, dtype=torch.float64)
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        inputs = {key: value.to(device) for key, value in collate(chunk).items()}
        trace = Trace()
        with running(**{"kv": kv, **options, "trace": trace}):
            generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if trace.steps:
            compute = trace_compute(costs, trace.steps, kv)
            executed, dense = executed + compute.executed.cpu(), dense + compute.dense.cpu()
            for step in trace.steps:
                rate.update(step.run.cpu(), step.modality.cpu(), step.real.cpu())
        progress(len(chunk))
    wanted = [str(row["answer"]) for row in rows]
    scores = exact_match_scores(answers, wanted)
    kinds = [str(row.get("kind", "all")) for row in rows]
    everything = executed.sum() > 0
    return Outcome(
        answers,
        float(scores.mean()),
        mean_by_group(scores, kinds),
        float(executed.sum() / dense.sum()) if everything else 1.0,
        executed / dense if everything else torch.ones(layers, 2),
        rate.compute() if everything else torch.zeros(layers, 2),
    )
