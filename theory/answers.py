"""Batches whose answers are known, teacher-forced: what a model says of every answer token, given those before it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.router import InputError

from .inputs import to_model
from .labels import predicts_answer


@dataclass(frozen=True)
class TeacherForced:
    """One batch on a model's device.

    Attributes:
        inputs: what the model is given: the batch without its labels.
        answer: where the next token is one of an answer; the last token has none after it.
        labels: -100 everywhere but on answer tokens.
    """

    inputs: dict[str, Tensor]
    answer: Bool[Tensor, "batch predicted"]
    labels: Int[Tensor, "batch seq"]

    @property
    def wanted(self) -> Int[Tensor, " answers"]:
        """The tokens of all answers, row by row."""
        return self.labels[:, 1:][self.answer]

    def logits(self, model: Any) -> Float[Tensor, "answers vocabulary"]:
        """A pass over the whole batch: the logits of every answer token, fp32."""
        logits: Tensor = model(**self.inputs, use_cache=False).logits
        return logits[:, :-1][self.answer].float()

    def row_sums(self, values: Float[Tensor, "*figures answers"]) -> Float[Tensor, "*figures batch"]:
        """The sums of every row over its answer's tokens."""
        row = self.answer.nonzero()[:, 0]
        return values.new_zeros(*values.shape[:-1], len(self.answer)).index_add(-1, row, values)


def teacher_forced(model: Any, batches: Iterable[dict[str, Tensor]]) -> Iterator[TeacherForced]:
    """Move batches with labels to where a model is, one at a time.

    Raises:
        InputError: there is no batch.
    """
    empty = True
    for batch in batches:
        empty = False
        moved = to_model(batch, model)
        labels = moved.pop("labels")
        yield TeacherForced(moved, predicts_answer(labels), labels)
    if empty:
        raise InputError("`batches`: got no row, expected at least one batch with labels. A generator is read once.")
