"""Controlled skipping row by row: figures of one row do not depend on the others, and means are those of the rows."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor

from skipit.eval.measure.controlled import Effect, RowEffects, effects, kl_interval, one_unit_skipped, row_effects
from skipit.router import FixedUnits, InputError, attach, running
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel

ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12, 13, 14], [6, "image", 15, 16]]


def batch(rows: list[list[int | str]] = ROWS) -> dict[str, Tensor]:
    """The last two tokens of every row are its answer, three in the second row."""
    made = tiny_models.inputs("llava", rows, "left")
    labels = torch.full_like(made["input_ids"], -100)
    for index, row in enumerate(rows):
        length = 3 if len(row) == 7 else 2
        labels[index, -length:] = made["input_ids"][index, -length:]
    return {**made, "labels": labels}


@pytest.fixture(scope="module")
def model() -> object:
    made = tiny_models.build("llava")
    attach(made)
    return made


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_rows_are_as_alone_and_means_are_theirs(model: torch.nn.Module, kv: KVPolicy) -> None:
    plans = one_unit_skipped(model)[::3]
    costs = CostModel.of(model)
    together = row_effects(model, [batch()], plans, kv, costs=costs)
    alone = row_effects(model, [batch([row]) for row in ROWS], plans, kv, costs=costs)
    for whole, single in zip(together, alone, strict=True):
        for name in ("kl", "loss", "same", "tokens", "right", "executed", "dense"):
            assert torch.allclose(getattr(whole, name), getattr(single, name), atol=1e-5), name
    assert together[0].tokens.tolist() == [2, 3, 2]
    means = effects(model, [batch()], plans, kv)
    assert means == [whole.mean() for whole in together]
    assert means[0].kl == pytest.approx(float(together[0].kl.sum()) / 7)


def test_figures_are_those_of_a_real_skip(model: torch.nn.Module) -> None:
    plan = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    (found,) = row_effects(model, [batch()], [plan], "retain", costs=CostModel.of(model))
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        with running(mode="dense"):
            full = model(**inputs, use_cache=False).logits[:, -3:-1].log_softmax(-1)
        with running(policy=FixedUnits(plan), kv="retain"):
            skipping = model(**inputs, use_cache=False).logits[:, -3:-1].log_softmax(-1)
    target = batch()["labels"][:, -2:]
    kl = (full.exp() * (full - skipping)).sum((1, 2))
    loss = (full - skipping).gather(-1, target[..., None]).sum((1, 2))
    assert found.kl[0].item() == pytest.approx(kl[0].item(), rel=1e-4)
    assert found.loss[2].item() == pytest.approx(loss[2].item(), rel=1e-4, abs=1e-6)
    assert found.same[0] == (full[0].argmax(-1) == skipping[0].argmax(-1)).sum()
    assert 0 < found.compute < 1
    assert F.relu(-found.kl).max() < 1e-6


def test_a_row_is_right_if_every_answer_token_is() -> None:
    nothing = torch.zeros(2, dtype=torch.float64)
    model = tiny_models.build("llava")
    attach(model)
    made = batch(ROWS[:2])
    with torch.no_grad(), running(mode="dense"):
        predicted = model(**{k: v for k, v in made.items() if k != "labels"}, use_cache=False).logits.argmax(-1)
    labels = made["labels"]
    answer = labels != -100
    labels[:, 1:] = torch.where(answer[:, 1:], predicted[:, :-1], -100)
    labels[1, -1] = (labels[1, -1] + 1) % 50  # one token of the second row is wrong
    everything = torch.ones(tiny_models.LAYERS, 2, dtype=torch.bool)
    (found,) = row_effects(model, [{**made, "labels": labels}], [everything], "retain")
    assert found.right.tolist() == [1, 0]
    assert found.mean() == Effect(pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6), 1.0, 0.5)
    assert torch.isnan(found.executed).all()
    assert torch.allclose(found.kl, nothing, atol=1e-6)


def test_the_divergence_of_all_rows_is_per_answer_token() -> None:
    kl, tokens = torch.tensor([1.0, 0.0, 5.0]).double(), torch.tensor([1.0, 4.0, 1.0]).double()
    found = kl_interval(RowEffects(kl, kl, kl, tokens, kl, kl, kl))
    assert found.value == 1.0
    assert 0 <= found.low < 1 < found.high <= 5


def test_no_row_is_an_error(model: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="`batches`: got no row, expected at least one batch with labels"):
        row_effects(model, iter([]), one_unit_skipped(model), "retain")
