"""Answering rows while keeping, for each of them, what was answered, how sure the model was and what it ran."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .adaptivity import Record
from .metrics import exact_match_scores
from .runner import answer_batches

Rows = Sequence[Mapping[str, Any]]
Kinds = Callable[[Rows, dict[str, Tensor]], Mapping[str, Bool[Tensor, "batch seq"]]]
"""From some rows and their inputs to kinds of their tokens, by name."""


@dataclass(frozen=True)
class Recorded:
    """What a model did with some rows.

    Attributes:
        answers: generated text, one per row.
        right: whether each is the row's answer.
        log_probability: of the generated tokens up to the end of the answer and with it, given those before: log of the
            probability that this very answer would be drawn, in nats, at most 0.
        tokens: how many they are.
        records: what ran, batch by batch; none for a dense run, where everything does.
    """

    answers: list[str]
    right: Bool[Tensor, " rows"]
    log_probability: Float[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    records: list[Record]

    @property
    def product(self) -> Float[Tensor, " rows"]:
        """The probability of each answer as a whole, in [0, 1]: what should be the chance that it is right."""
        return self.log_probability.exp()

    @property
    def mean(self) -> Float[Tensor, " rows"]:
        """The geometric mean of the probabilities of an answer's tokens, in [0, 1]: long answers are not penalized."""
        return (self.log_probability / self.tokens).exp()


def record_rows(
    model: Any,
    processor: Any,
    rows: Rows,
    collate: Callable[[Rows], dict[str, Tensor]],
    *,
    kinds: Kinds | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> Recorded:
    """Answer every row greedily, as `run_dataset` does, and keep more of it.

    Args:
        model: gated, or dense.
        processor: decodes answers.
        rows: with the columns the collator needs, and `answer` or else `completion`.
        collate: prompts only, padded on the left.
        kinds: of the prompt's tokens, for `measure_adaptivity`.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        progress: called with the number of rows of each finished batch.
        **options: of `skipit.running`: `policy`, `budget`, `mode`.

    Raises:
        InputError: there are no rows, or a row has no answer; the message names it.
    """
    answers: list[str] = []
    wanted: list[str] = []
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    records: list[Record] = []
    for batch in answer_batches(
        model, processor, rows, collate, batch_size=batch_size, max_new_tokens=max_new_tokens, logits=True, **options
    ):
        answers, wanted = answers + batch.answers, wanted + batch.wanted
        own = _until_end(batch.new, model.generation_config.eos_token_id)
        chosen = [logits.float().log_softmax(-1) for logits in batch.logits]
        picked = torch.stack([step.gather(-1, batch.new[:, at, None])[:, 0] for at, step in enumerate(chosen)], -1)
        sums.append((picked.double() * own).sum(-1).cpu())
        counts.append(own.sum(-1).cpu())
        if batch.steps:
            named = None if kinds is None else kinds(batch.rows, batch.inputs)
            records.append(Record.of(batch.steps, kinds=named))
        progress(len(batch.rows))
    right = exact_match_scores(answers, wanted).bool()
    return Recorded(answers, right, torch.cat(sums), torch.cat(counts), records)


def _until_end(new: Int[Tensor, "batch new"], end: int | list[int] | None) -> Bool[Tensor, "batch new"]:
    """Tokens of the answer with its end; what a batch appends while other rows go on is no part of it."""
    if end is None:
        return torch.ones_like(new, dtype=torch.bool)
    ends = torch.isin(new, torch.tensor(end, device=new.device)).long()
    return (ends.cumsum(-1) - ends) == 0
