"""Running a model over a data set as a user would, with `generate()`, and counting what it executed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipit.eval.metrics import SkipRate
from skipit.eval.metrics.answers import exact_match_scores, mean_by_group
from skipit.router import InputError, Step, Trace, running
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel, trace_compute


@dataclass(frozen=True)
class Outcome:
    """What a model answered and what it executed for it.

    Attributes:
        answers: generated text, one per row.
        accuracy: exact match over all rows, in [0, 1].
        by_kind: exact match per kind of question.
        compute: executed share of the dense decoder's FLOPs, prefill and decoding up to each row's end; 1 for the
            dense model.
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


def run_dataset(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]],
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
        rows: with the columns the collator needs, `answer` or else `completion`, and optionally `kind`.
        collate: prompts only, padded on the left.
        costs: of the model's layers.
        kv: the model's K/V policy.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        progress: called with the number of rows of each finished batch.
        **options: of `skipit.running`: `policy`, `budget`, `mode`.

    Raises:
        InputError: there are no rows, or a row has no answer; the message names it.
    """
    layers = len(costs.layers)
    rate = SkipRate(layers)
    executed, dense = torch.zeros(layers, 2, dtype=torch.float64), torch.zeros(layers, 2, dtype=torch.float64)
    answers: list[str] = []
    wanted: list[str] = []
    kinds: list[str] = []
    for batch in answer_batches(
        model, processor, rows, collate, batch_size=batch_size, max_new_tokens=max_new_tokens, **{"kv": kv, **options}
    ):
        answers, wanted = answers + batch.answers, wanted + batch.wanted
        kinds += [str(row.get("kind", "all")) for row in batch.rows]
        if batch.steps:
            compute = trace_compute(costs, batch.steps)
            executed, dense = executed + compute.executed.cpu(), dense + compute.dense.cpu()
            for step in batch.steps:
                rate.update(step.run.cpu(), step.modality.cpu(), step.real.cpu())
        progress(len(batch.rows))
    scores = exact_match_scores(answers, wanted)
    ran = bool(dense.sum() > 0)
    return Outcome(
        answers,
        float(scores.mean()),
        mean_by_group(scores, kinds),
        float(executed.sum() / dense.sum()) if ran else 1.0,
        executed / dense if ran else torch.ones(layers, 2),
        rate.compute() if ran else torch.zeros(layers, 2),
    )


class Answered(NamedTuple):
    """What a model did with the rows of one batch.

    Attributes:
        rows: of the data.
        inputs: what the model was given.
        answers: generated text, one per row.
        wanted: what is right.
        new: generated tokens [batch, new], with what a batch appends to a row that has ended.
        logits: of the generated tokens, [batch, vocabulary] for each, if they were asked for.
        steps: what ran, prefill first; none for a dense run.
    """

    rows: list[Mapping[str, Any]]
    inputs: dict[str, Tensor]
    answers: list[str]
    wanted: list[str]
    new: Tensor
    logits: tuple[Tensor, ...]
    steps: list[Step]


@torch.no_grad()
def answer_batches(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    max_new_tokens: int,
    logits: bool = False,
    **options: Any,
) -> Iterator[Answered]:
    """Answer rows greedily, batch by batch; see `run_dataset`.

    Raises:
        InputError: there are no rows, or a row has no answer; the message names it.
    """
    if len(rows) == 0:
        raise InputError("the data set is empty; expected at least one row.")
    device = next(model.parameters()).device
    wishes = {"max_new_tokens": max_new_tokens, "do_sample": False, "output_logits": logits}
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        wanted = [right_answer(row, start + i) for i, row in enumerate(chunk)]
        inputs = {key: value.to(device) for key, value in collate(chunk).items()}
        trace = Trace()
        with running(**{**options, "trace": trace}):
            made = model.generate(**inputs, **wishes, return_dict_in_generate=True)
        new = made.sequences[:, inputs["input_ids"].shape[1] :]
        answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        leave_out_finished(trace.steps, new, model.generation_config.eos_token_id)
        yield Answered(chunk, inputs, answers, wanted, new, made.logits or (), trace.steps)


def leave_out_finished(steps: list[Step], new: Tensor, end: int | list[int] | None) -> None:
    """Count a row's tokens up to its end, as if it had been alone: a batch goes on until its longest answer is done."""
    if end is None:
        return
    ended = torch.isin(new, torch.tensor(end, device=new.device)).cumsum(1) > 0
    for step, done in zip(steps[1:], ended.T, strict=False):
        step.real = step.real & ~done[:, None]


def right_answer(row: Mapping[str, Any], number: int) -> str:
    """A row's `answer`, or else the text of its `completion`.

    Raises:
        InputError: it has neither; the message names the row.
    """
    if row.get("answer") is not None:
        return str(row["answer"])
    completion = row.get("completion")
    if completion is None:
        raise InputError(f"row {number}: no column answer or completion; found: {', '.join(row)}.")
    if isinstance(completion, str):
        return completion.strip()
    parts = [turn["content"] for turn in completion]
    texts = [part if isinstance(part, str) else "".join(p.get("text") or "" for p in part) for part in parts]
    return "\n".join(texts).strip()
