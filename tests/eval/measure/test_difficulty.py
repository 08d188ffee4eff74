"""Difficulty of rows: the dense model's loss and entropy, each row as alone."""

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.eval.measure.difficulty import row_difficulty
from skipit.router import FixedUnits, InputError, attach, running

ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12, 13, 14], [6, "image", 15, 16]]


def batch(rows: list[list[int | str]] = ROWS) -> dict[str, Tensor]:
    """The last two tokens of every row are its answer, three in the second row."""
    made = tiny_models.inputs("llava", rows, "left")
    labels = torch.full_like(made["input_ids"], -100)
    for index, row in enumerate(rows):
        length = 3 if len(row) == 7 else 2
        labels[index, -length:] = made["input_ids"][index, -length:]
    return {**made, "labels": labels}


def test_it_is_the_loss_and_the_entropy_of_the_answer() -> None:
    model = tiny_models.build("llava")
    found = row_difficulty(model, [batch()])
    for number, row in enumerate(ROWS):
        one = batch([row])
        with torch.no_grad():
            logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0, :-1]
        chosen = one["labels"][0, 1:] != -100
        p = logits[chosen].softmax(-1)
        expected = torch.nn.functional.cross_entropy(logits[chosen], one["labels"][0, 1:][chosen])
        assert found["loss"][number].item() == pytest.approx(expected.item(), abs=1e-4)
        assert found["entropy"][number].item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-4)


def test_gates_and_policies_are_not_asked() -> None:
    model = tiny_models.build("llava")
    before = row_difficulty(model, [batch()])
    attach(model)
    with running(policy=FixedUnits(torch.zeros(tiny_models.LAYERS, 2, dtype=torch.bool))):
        after = row_difficulty(model, [batch()])
    assert torch.allclose(before["loss"], after["loss"], atol=1e-6)


def test_rows_need_an_answer() -> None:
    model = tiny_models.build("llava")
    with pytest.raises(InputError, match="`batches`: got no row"):
        row_difficulty(model, [])
    empty = batch()
    empty["labels"][1] = -100
    with pytest.raises(InputError, match="row 1 of a batch has no label, expected an answer"):
        row_difficulty(model, [empty])
