"""Recorded answers: the same whatever the batch, with probabilities that a forward pass gives."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from skipit.eval.claims.adaptivity import rates
from skipit.eval.measure.runner import Outcome, run_dataset
from skipit.router import FixedUnits, InputError, attach, running
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset

LAYERS = 12
EVERY_OTHER = FixedUnits((torch.arange(LAYERS)[:, None] % 2 == 0).expand(LAYERS, 2))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("test", 7)


@pytest.fixture(scope="module")
def reference() -> Any:
    model, processor = load_model("reference")
    attach(model)
    return model, processor


@pytest.fixture(scope="module")
def record(reference: Any, rows: Dataset) -> Any:
    def record(data: Any = rows, kv: Any = "retain", **options: Any) -> Outcome:
        model, processor = reference
        collate = Collator(processor, with_completion=False)
        return run_dataset(model, processor, data, collate, CostModel.of(model), kv, **options)

    return record


@pytest.mark.parametrize("options", [{"mode": "dense"}, {"policy": EVERY_OTHER, "kv": "evict"}], ids=["dense", "units"])
def test_probabilities_are_those_of_a_forward_pass_over_the_answer(
    reference: Any, rows: Dataset, record: Any, options: Any
) -> None:
    model, processor = reference
    found = record(**options).recorded
    ends = processor.tokenizer.eos_token
    for number, row in enumerate(rows):
        said = [{"role": "assistant", "content": [{"type": "text", "text": found.answers[number]}]}]
        batch = Collator(processor)([{**row, "completion": said}])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad(), running(**options):
            logits = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        answer = labels != -100
        assert processor.decode(labels[answer]).endswith(ends)
        expected = logits[answer].gather(-1, labels[answer][:, None]).sum()
        assert found.tokens[number] == answer.sum()
        assert found.log_probability[number].item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.allclose(found.product, found.log_probability.exp())
    assert torch.allclose(found.mean**found.tokens, found.product)


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_the_batch_changes_nothing_and_answers_are_those_of_a_run(
    reference: Any, rows: Dataset, record: Any, kv: str
) -> None:
    options: dict[str, Any] = {"policy": EVERY_OTHER, "kv": kv}
    run, single = record(batch_size=7, **options), record(batch_size=1, **options)
    together, alone, costs = run.recorded, single.recorded, CostModel.of(reference[0])
    assert together.answers == alone.answers == run.answers
    assert together.right.double().mean() == alone.right.double().mean() == run.accuracy
    assert torch.allclose(together.log_probability, alone.log_probability, atol=1e-4)
    assert torch.equal(together.tokens, alone.tokens)
    for recorded in (together, alone):
        flops = [[(values * r.real).sum() for values in r.flops(costs)] for r in recorded.records]
        executed, dense = torch.tensor(flops).sum(0)
        assert (executed / dense).item() == pytest.approx(run.compute, abs=1e-6)
        assert rates(recorded.records)[::2].eq(1).all()
        assert rates(recorded.records)[1::2].eq(0).all()


def test_a_dense_run_has_no_records_and_kinds_reach_the_others(record: Any, rows: Dataset) -> None:
    assert record(mode="dense").recorded.records == []
    seen: list[int] = []

    def kinds(chunk: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(len(chunk))
        return {"first": torch.ones_like(inputs["input_ids"]).cumsum(-1) == 1}

    found = record(policy=EVERY_OTHER, kinds=kinds, batch_size=4)
    assert seen == [4, 3]
    assert all(r.kinds["first"].sum(-1).eq(1).all() for r in found.recorded.records)


def test_no_rows_are_an_error(record: Any) -> None:
    with pytest.raises(InputError, match="the data set is empty; expected at least one row"):
        record(data=[])
