"""Running a model over a data set as a user would, with `generate()`: what it answers, how surely, at what cost."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.eval.metrics import SkipRate
from skipit.eval.metrics.answers import mean_by_group
from skipit.eval.metrics.vqa import Metric, answer_scores
from skipit.router import InputError, Step, Trace, running
from skipit.router.config import KVPolicy
from skipit.router.errors import short
from skipit.theory.cost import CostModel, trace_compute
from skipit.theory.inputs import to_model
from skipit.train.data.collate import tried
from skipit.train.data.rows import check_columns, seen_in

from .recorded import Kinds, Record, Recorded, Row
from .traced import ONE_PASS

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]
RIGHT = 0.5  # the score from which an answer counts as right where it must be one or the other


@dataclass(frozen=True)
class Outcome:
    """What a model answered and what it executed for it.

    Attributes:
        recorded: the answers, how sure the model was of each, and what ran token by token.
        accuracy: mean score over all rows, in [0, 1].
        by_kind: the same per kind of question.
        compute: executed share of the dense decoder's FLOPs, prefill and decoding up to each row's end; 1 for the
            dense model.
        compute_by_unit: the same per unit [layers, modalities], NaN where a unit has no tokens.
        skip_rate: share of a unit's tokens that skipped it [layers, modalities].
        scored_by: what the accuracy is, in words.
    """

    recorded: Recorded
    accuracy: float
    by_kind: dict[str, float]
    compute: float
    compute_by_unit: Tensor
    skip_rate: Tensor
    scored_by: str = "exact match"

    @property
    def answers(self) -> list[str]:
        """Answered text, one per row."""
        return self.recorded.answers

    def to_json(self) -> dict[str, Any]:
        """The figures, without the answers."""
        return {
            "accuracy": self.accuracy,
            "scored_by": self.scored_by,
            "by_kind": self.by_kind,
            "compute": self.compute,
            "compute_by_unit": self.compute_by_unit.tolist(),
            "skip_rate": self.skip_rate.tolist(),
            "rows": len(self.answers),
        }


def run_dataset(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    collate: Collate,
    costs: CostModel,
    kv: KVPolicy,
    *,
    kinds: Kinds | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    metric: Metric = "usual",
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
        kinds: of the prompt's tokens, for `measure_adaptivity`.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        metric: by which answers are scored.
        progress: called with the number of rows of each finished batch.
        **options: of `skipit.running`: `policy`, `budget`, `mode`.

    Raises:
        InputError: there are no rows, or a row has no answer; the message names it.
    """
    layers = len(costs.layers)
    rate = SkipRate(layers)
    executed, dense = torch.zeros(layers, 2, dtype=torch.float64), torch.zeros(layers, 2, dtype=torch.float64)
    answers: list[str] = []
    wanted: list[list[str]] = []
    groups: list[str] = []
    log_probability: list[Tensor] = []
    tokens: list[Tensor] = []
    records: list[Record] = []
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "logits": True}
    for batch in answer_batches(model, rows, collate, **{"kv": kv, **settings, **options}):
        wanted += [right_answers(row, len(wanted) + number) for number, row in enumerate(batch.rows)]
        answers += [text.strip() for text in processor.batch_decode(batch.new, skip_special_tokens=True)]
        groups += [str(row.get("kind", "all")) for row in batch.rows]
        log_probability.append(batch.log_probability().cpu())
        tokens.append(batch.answer.sum(-1).cpu())
        if batch.steps:
            compute = trace_compute(costs, batch.steps)
            executed, dense = executed + compute.executed.cpu(), dense + compute.dense.cpu()
            for step in batch.steps:
                rate.update(step.run.cpu(), step.modality.cpu(), step.real.cpu())
            records.append(Record.of(batch.steps, kinds=None if kinds is None else kinds(batch.rows, batch.inputs)))
        progress(len(batch.rows))
    scores, scored_by = answer_scores(answers, wanted, metric)
    return Outcome(
        Recorded(answers, scores >= RIGHT, torch.cat(log_probability), torch.cat(tokens), records),
        float(scores.mean()),
        mean_by_group(scores, groups),
        float(executed.sum() / dense.sum()) if records else 1.0,
        executed / dense if records else torch.ones(layers, 2),
        rate.compute() if records else torch.zeros(layers, 2),
        scored_by,
    )


class Answered(NamedTuple):
    """What a model did with the rows of one batch.

    Attributes:
        rows: of the data.
        inputs: what the model was given.
        new: generated tokens, with what a batch appends to a row that has ended.
        answer: those of each row up to its end, with it.
        logits: of the generated tokens, [batch, vocabulary] for each, if they were asked for.
        steps: what ran, prefill first, each row up to its end; none for a dense run.
    """

    rows: list[Row]
    inputs: dict[str, Tensor]
    new: Int[Tensor, "batch new"]
    answer: Bool[Tensor, "batch new"]
    logits: tuple[Tensor, ...]
    steps: list[Step]

    def log_probability(self) -> Float[Tensor, " batch"]:
        """The log of the probability that each row's very answer would be drawn, fp64, in nats."""
        log_p = [logits.float().log_softmax(-1) for logits in self.logits]
        chosen = torch.stack([step.gather(-1, self.new[:, at, None])[:, 0] for at, step in enumerate(log_p)], -1)
        return (chosen.double() * self.answer).sum(-1)


@torch.no_grad()
def answer_batches(
    model: Any,
    rows: Sequence[Row],
    collate: Collate,
    *,
    batch_size: int,
    max_new_tokens: int,
    logits: bool = False,
    **options: Any,
) -> Iterator[Answered]:
    """Answer rows greedily, batch by batch; see `run_dataset`.

    Raises:
        InputError: there are no rows.
    """
    if len(rows) == 0:
        raise InputError("the data set is empty; expected at least one row.")
    wishes = {**ONE_PASS, "do_sample": False, "max_new_tokens": max_new_tokens, "output_logits": logits}
    for chunk, inputs in prompt_batches(model, rows, collate, batch_size):
        trace = Trace()
        with running(**{**options, "trace": trace}):
            made = model.generate(**inputs, **{**wishes, "return_dict_in_generate": True})
        new, end = made.sequences[:, inputs["input_ids"].shape[1] :], model.generation_config.eos_token_id
        if trace.steps:
            trace.check_one_pass(made.sequences.shape[1] - 1)
        leave_out_finished(trace.steps, new, end)
        kept = made.logits or ()
        del made  # holds the cache, which is not to stay beside that of the next batch
        yield Answered(chunk, inputs, new, until_end(new, end), kept, trace.steps)


def prompt_batches(
    model: Any, rows: Sequence[Row], collate: Collate, batch_size: int
) -> Iterator[tuple[list[Row], dict[str, Tensor]]]:
    """Consecutive rows, and what the model is given for them, on its device."""
    for start in range(0, len(rows), batch_size):
        chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield chunk, to_model(collate(chunk), model)


def until_end(new: Int[Tensor, "batch new"], end: int | list[int] | None) -> Bool[Tensor, "batch new"]:
    """Tokens of the answer with its end; what a batch appends while other rows go on is no part of it."""
    if end is None:
        return torch.ones_like(new, dtype=torch.bool)
    ends = torch.isin(new, torch.tensor(end, device=new.device)).long()
    return (ends.cumsum(-1) - ends) == 0


def leave_out_finished(steps: list[Step], new: Tensor, end: int | list[int] | None) -> None:
    """Count a row's tokens up to its end, as if it had been alone: a batch goes on until its longest answer is done."""
    if end is None:
        return
    ended = torch.isin(new, torch.tensor(end, device=new.device)).cumsum(1) > 0
    for step, done in zip(steps[1:], ended.T, strict=False):
        step.real = step.real & ~done[:, None]


def right_answers(row: Row, number: int) -> list[str]:
    """What a row's `answer` accepts, or else the text of its `completion`.

    An answer is a text or a number, or a list of these, of which VQAv2 makes {"answer": text}.

    Raises:
        InputError: it has neither, or an answer is something else; the message names the row.
    """
    given: Any = row.get("answer")
    given = given.tolist() if hasattr(given, "tolist") else given
    if given is not None:
        if isinstance(given, Mapping):  # one, or a list of them as Arrow may turn it: a list by key
            given = given.get("answer")
        accepted = [_accepted(one) for one in (given if isinstance(given, list | tuple) else [given])]
        if not accepted or not all(accepted):
            raise InputError(
                f"{_where(row, number)}: `answer` is {short(row['answer'])}; expected a text or a number, or a "
                'list of them, or of {"answer": text}.'
            )
        return [text for texts in accepted for text in texts]
    completion = row.get("completion")
    if completion is None:
        raise InputError(f"{_where(row, number)}: no column answer or completion; found: {', '.join(row)}.")
    if isinstance(completion, str):
        return [completion.strip()]
    parts = [turn["content"] for turn in completion]
    texts = [part if isinstance(part, str) else "".join(p.get("text") or "" for p in part) for part in parts]
    return ["\n".join(texts).strip()]


def _where(row: Row, number: int) -> str:
    return str(getattr(row, "where", f"row {number}"))


def _accepted(given: Any) -> list[str]:
    """The texts that one answer stands for; none for what is no answer. A whole number may be written with a point."""
    given = given.get("answer") if isinstance(given, Mapping) else given
    if isinstance(given, bool) or not isinstance(given, str | int | float) or given != given:
        return []
    return [str(given), str(int(given))] if isinstance(given, float) and given.is_integer() else [str(given)]


def right_answer(row: Row, number: int) -> str:
    """The one of `right_answers` that most gave, the first of equals.

    Raises:
        InputError: there is none; the message names the row.
    """
    return Counter(right_answers(row, number)).most_common(1)[0][0]


def answerable(collate: Collate) -> Callable[[Any], Any]:
    """Checks that a row can be answered, and that its answer can be judged."""
    check = tried(collate)

    def both(row: Any) -> Any:
        check_columns(row, row.where, seen_in(row), "prompt", *([] if "answer" in row else ["completion"]))
        right_answers(row, 0)
        return check(row)

    return both


def completed(row: Row, number: int) -> Row:
    """A row with its completion, which is its answer if it has none."""
    if row.get("completion") is not None:
        return row
    said = [{"type": "text", "text": right_answer(row, number)}]
    return {**row, "completion": [{"role": "assistant", "content": said}]}
