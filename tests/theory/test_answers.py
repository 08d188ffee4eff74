"""Teacher-forced batches: logits stand where answers are predicted, and sums are those of single rows."""

import pytest
import tiny_models
import torch

from skipit.router import InputError
from skipit.theory.answers import teacher_forced


def test_logits_and_sums_are_those_of_the_answers_of_each_row() -> None:
    model = tiny_models.build("llava")
    inputs = tiny_models.inputs("llava", [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12, 13]], "left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1], labels[1, -2:] = 8, torch.tensor([12, 13])
    (batch,) = teacher_forced(model, [{**inputs, "labels": labels}])
    assert batch.wanted.tolist() == [8, 12, 13]
    assert batch.inputs.keys() == inputs.keys()
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(batch.logits(model), torch.stack([logits[0, -2], logits[1, -3], logits[1, -2]]))
    assert batch.row_sums(torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])).tolist() == [[1, 6], [1, 2]]


def test_no_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="`batches`: got no row, expected at least one batch with labels"):
        list(teacher_forced(tiny_models.build("llava"), []))
