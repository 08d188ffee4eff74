"""Measuring what a certificate needs: greedy answers with and without skipping, one threshold after another.

Both answers come from `generate()`, as a user gets them. A single teacher-forced pass along the dense model's answer
would find the same disagreements only where generation is a plain arg max: a checkpoint's own repetition penalty or
suppressed tokens would not be seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipit.router import Decision, Gated, find_router, running
from skipit.router.call import Call
from skipit.router.gates import TokenGate, logits_of
from skipit.theory.cost import CostModel, trace_compute
from skipit.theory.risk import certify, check_rows

from .recorded import Row
from .runner import Collate, answer_batches, prompt_batches


@dataclass(frozen=True)
class Trial:
    """One threshold that was tested.

    Attributes:
        threshold: of the gate logits.
        disagreements: rows whose answer differs from the dense model's in any token.
        p_value: of "more than the risk disagree".
        compute: executed share of the dense decoder's FLOPs, prefill and decoding together.
    """

    threshold: float
    disagreements: int
    p_value: float
    compute: float


@dataclass(frozen=True)
class Certificate:
    """What was certified about a gated model.

    Attributes:
        risk: largest share of new rows that may be answered differently.
        confidence: probability, over the draw of the rows, with which the certificate holds.
        rows: tested.
        trials: from safe to fast; testing stopped after the first that failed.
        chosen: the fastest certified threshold, or None.
    """

    risk: float
    confidence: float
    rows: int
    trials: tuple[Trial, ...]
    chosen: Trial | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for an artefact."""
        return asdict(self)

    def summary(self) -> str:
        """What is certified, in a sentence."""
        if self.chosen is None:
            return "nothing is certified."
        chosen = self.chosen
        return (
            f"at threshold {chosen.threshold:.3f} {chosen.compute:.1%} of the dense decoder's FLOPs; "
            f"{chosen.disagreements} of {self.rows} answers differ from the dense model's. With confidence "
            f"{self.confidence:g} at most {self.risk:g} of new answers do (p = {chosen.p_value:.2g})."
        )


class _Recorder:
    """A policy that runs everything and keeps the gates' logits."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def decide(self, layers: range, hidden: Tensor, call: Call, gates: Sequence[TokenGate]) -> Decision:
        """Run everything."""
        logits = logits_of(gates, hidden, call.modality)
        self.logits.append(logits[:, call.real].flatten().cpu())
        return Decision(call.real.new_ones(logits.shape))


@torch.no_grad()
def gate_logits(model: nn.Module, rows: Sequence[Row], collate: Collate, batch_size: int = 16) -> Tensor:
    """The logits with which a model's gates score the tokens of some prompts when every token runs, in one vector."""
    recorder = _Recorder()
    for _, inputs in prompt_batches(model, rows, collate, batch_size):
        with running(policy=recorder, mode="gathered", trace=None):
            model(**inputs, use_cache=False)
    return torch.cat(recorder.logits) if recorder.logits else torch.zeros(0)


def greedy_answers(
    model: Any,
    rows: Sequence[Row],
    collate: Collate,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> tuple[list[list[int]], float]:
    """Answer rows as a user would get them, without looking at labels.

    Args:
        model: gated.
        rows: with the columns the collator needs.
        collate: prompts only, padded on the left.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        progress: called with the number of rows of each finished batch.
        **options: of `skipit.running`: `policy` or `mode`.

    Returns:
        The new tokens of each row up to the end of its answer, and the executed share of the dense decoder's FLOPs (1
        for a dense run).
    """
    config = find_router(model)[1].config
    costs = CostModel.of(model, config.layers)
    answers: list[list[int]] = []
    executed = dense = 0.0
    for batch in answer_batches(model, rows, collate, batch_size=batch_size, max_new_tokens=max_new_tokens, **options):
        answers += [tokens[own].tolist() for tokens, own in zip(batch.new, batch.answer, strict=True)]
        if batch.steps:
            compute = trace_compute(costs, batch.steps)
            executed, dense = executed + float(compute.executed.sum()), dense + float(compute.dense.sum())
        progress(len(batch.rows))
    return answers, executed / dense if dense else 1.0


def certify_thresholds(
    model: Any,
    rows: Sequence[Row],
    collate: Collate,
    *,
    grid: Sequence[float],
    risk: float,
    confidence: float,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda rows: None,
) -> Certificate:
    """Find the fastest threshold whose answers are certified to be the dense model's own (statement 12).

    Args:
        model: gated; "dense" is the same model with every layer run for every token.
        rows: independent of each other, like those to come, and not used to choose the grid.
        collate: prompts only, padded on the left.
        grid: thresholds from safe to fast, such as `threshold_grid` of other rows' `gate_logits`.
        risk: share of new rows that may be answered differently, in (0, 1).
        confidence: probability with which the certificate holds, in (0, 1).
        batch_size: rows per call.
        max_new_tokens: longest answer; a difference after it is not seen.
        progress: called with the number of rows of each finished batch.

    Returns:
        The certificate; its `chosen` is None if not even the first threshold passes.

    Raises:
        InputError: too few rows to certify anything.
        ValueError: `risk` or `confidence` is out of range.
    """
    check_rows(len(rows), risk, confidence)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": progress}
    wanted, _ = greedy_answers(model, rows, collate, mode="dense", **settings)
    trials: list[Trial] = []
    disagrees: list[list[bool]] = []
    chosen = None
    for threshold in grid:
        answers, compute = greedy_answers(model, rows, collate, policy=Gated(threshold), mode="gathered", **settings)
        disagrees.append([ours != right for ours, right in zip(answers, wanted, strict=True)])
        certified = certify(torch.tensor(disagrees), risk, confidence)
        trials.append(Trial(threshold, sum(disagrees[-1]), float(certified.p_values[-1]), compute))
        if certified.index != len(trials) - 1:
            break  # in a fixed sequence nothing passes after a failure, so nothing more needs to be measured
        chosen = trials[-1]
    return Certificate(risk, confidence, len(rows), tuple(trials), chosen)
