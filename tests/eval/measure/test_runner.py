"""Answers and executed FLOPs over a data set: as of single rows, whatever the batch, and as the cost model says."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from skipit.eval.measure.runner import Outcome, completed, leave_out_finished, right_answer, right_answers, run_dataset
from skipit.router import Decision, FixedUnits, Gated, Step, attach, detach
from skipit.router.errors import InputError
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset

LAYERS = 12


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("test", 7)


@pytest.fixture(scope="module")
def reference() -> Any:
    model, processor = load_model("reference")
    attach(model)
    return model, processor


@pytest.fixture(scope="module")
def run(reference: Any, rows: Dataset) -> Any:
    def run(kv: Any = "retain", batch_size: int = 4, data: Any = rows, **options: Any) -> Outcome:
        model, processor = reference
        collate = Collator(processor, with_completion=False)
        return run_dataset(model, processor, data, collate, CostModel.of(model), kv, batch_size=batch_size, **options)

    return run


def units(run: Tensor) -> FixedUnits:
    return FixedUnits(run.expand(LAYERS, 2))


EVERY_OTHER = torch.arange(LAYERS)[:, None] % 2 == 0


def test_dense_and_all_run_are_the_model_itself(reference: Any, run: Any, rows: Dataset) -> None:
    dense, everything = run(mode="dense"), run()
    assert dense.answers == everything.answers
    assert dense.accuracy == everything.accuracy >= 6 / 7
    assert dense.compute == 1
    assert everything.compute == pytest.approx(1, abs=0.005)
    assert dense.compute_by_unit.eq(1).all()
    for outcome in (dense, everything):
        assert outcome.skip_rate.eq(0).all()
    model, _ = reference
    detach(model)
    try:
        plain = run()
    finally:
        attach(model)
    assert (plain.answers, plain.compute) == (dense.answers, 1)


def test_accuracy_is_counted_by_kind(run: Any, rows: Dataset) -> None:
    outcome = run()
    right = [answer == row["answer"] for answer, row in zip(outcome.answers, rows, strict=True)]
    assert outcome.accuracy == pytest.approx(sum(right) / 7)
    assert set(outcome.by_kind) == set(rows["kind"])
    assert outcome.by_kind["cell"] == (right[0] + right[6]) / 2
    assert run(data=[{**row, "kind": "x", "answer": "42"} for row in rows.select([0, 1])]).by_kind == {"x": 0}


@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("policy", [units(EVERY_OTHER), Gated(5.5)], ids=["units", "gates"])
def test_figures_do_not_depend_on_the_batch(run: Any, kv: str, policy: Any) -> None:
    alone, together = run(kv, batch_size=1, policy=policy), run(kv, batch_size=7, policy=policy)
    assert alone.answers == together.answers
    assert alone.compute == pytest.approx(together.compute, abs=1e-6)
    assert torch.allclose(alone.compute_by_unit, together.compute_by_unit, atol=1e-6)
    assert torch.allclose(alone.skip_rate, together.skip_rate, atol=1e-6)


def test_skipped_units_cost_what_the_policy_leaves_of_them(reference: Any, run: Any) -> None:
    evict, retain = (run(kv, policy=units(EVERY_OTHER)) for kv in ("evict", "retain"))
    assert evict.skip_rate.tolist() == retain.skip_rate.tolist() == [[layer % 2.0] * 2 for layer in range(LAYERS)]
    cost = CostModel.of(reference[0]).layers[0]
    left = evict.compute_by_unit[1::2]
    assert left.max() < 2 * cost.gate / cost.linear, "the gates alone"
    kept = (cost.keys_values + cost.gate) / cost.linear
    assert torch.allclose(retain.compute_by_unit[1::2], torch.tensor(kept, dtype=torch.float64), rtol=0.1)
    assert evict.compute_by_unit[::2].min() > 0.99
    assert evict.compute == pytest.approx(0.5, abs=0.01)


def test_nothing_runs(run: Any) -> None:
    nothing = run("evict", policy=units(torch.zeros(LAYERS, 2, dtype=torch.bool)))
    assert nothing.compute < 0.01
    assert nothing.skip_rate.eq(1).all()
    assert len(nothing.answers) == 7


def test_json_and_progress(run: Any) -> None:
    seen: list[int] = []
    values = run(progress=seen.append).to_json()
    assert seen == [4, 3]
    assert set(values) == {"accuracy", "scored_by", "by_kind", "compute", "compute_by_unit", "skip_rate", "rows"}
    assert values["rows"] == 7
    assert torch.tensor(values["skip_rate"]).shape == (LAYERS, 2)


def test_no_rows(run: Any) -> None:
    with pytest.raises(InputError, match="the data set is empty; expected at least one row"):
        run(data=[])


def test_a_finished_row_counts_no_further() -> None:
    def step(length: int) -> Step:
        decisions = {0: Decision(torch.ones(2, length, dtype=torch.bool))}
        return Step(torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.bool), 0, decisions)

    def counted(end: Any) -> list[list[bool]]:
        steps = [step(3), step(1), step(1), step(1)]
        leave_out_finished(steps, torch.tensor([[5, 2, 0, 0], [6, 7, 8, 9]]), end)
        assert steps[0].real.all()
        return [one.real.flatten().tolist() for one in steps[1:]]

    assert counted(2) == [[True, True], [False, True], [False, True]]
    assert counted([2, 8]) == [[True, True], [False, True], [False, False]]
    assert counted(None) == [[True, True]] * 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": 7, "completion": "8"}, "7"),
        ({"completion": " 8 \n"}, "8"),
        ({"answer": None, "completion": [{"role": "assistant", "content": "a cat"}]}, "a cat"),
        (
            {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "a "}, {"text": "cat"}]}]},
            "a cat",
        ),
        ({"completion": [{"content": [{"type": "image", "text": None}]}]}, ""),
    ],
)
def test_right_answer(row: dict[str, Any], expected: str) -> None:
    assert right_answer(row, 3) == expected


def test_no_right_answer() -> None:
    with pytest.raises(InputError, match="row 3: no column answer or completion; found: images, text"):
        right_answer({"images": [], "text": "?"}, 3)


def test_a_row_without_a_completion_is_answered_by_its_answer() -> None:
    assert completed({"answer": 7, "prompt": "x"}, 0)["completion"] == [
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]}
    ]
    row = {"completion": "8", "answer": "7"}
    assert completed(row, 0) is row


@pytest.mark.parametrize(
    "odd",
    [
        {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
        {"use_cache": False, "num_beams": 3, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2, "prefill_chunk_size": 5},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_a_checkpoint_may_ask_for_odd_things(odd: dict[str, Any], rows: Dataset) -> None:
    """One answer per row and one pass per token is measured all the same."""
    model, processor = load_model("reference")
    attach(model)
    collate, costs = Collator(processor, with_completion=False), CostModel.of(model)
    more = {"batch_size": 4, "policy": units(EVERY_OTHER)}
    wanted = run_dataset(model, processor, rows, collate, costs, "evict", **more)
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    found = run_dataset(model, processor, rows, collate, costs, "evict", **more)
    assert found.answers == wanted.answers
    assert found.compute == wanted.compute
    from skipit.eval.measure.answer import answer

    prompt = rows[0]["prompt"][0]["content"][-1]["text"]
    assert answer(model, processor, rows[0]["images"], prompt).text is not None


def test_guidance_has_no_trace(rows: Dataset) -> None:
    model, processor = load_model("reference")
    attach(model)
    model.generation_config.guidance_scale = 1.5
    collate = Collator(processor, with_completion=False)
    with pytest.raises(InputError, match=r"tokens were run more than once while generating: .*guidance"):
        run_dataset(model, processor, rows, collate, CostModel.of(model), "evict")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("cat", ["cat"]),
        (7, ["7"]),
        (7.5, ["7.5"]),
        (7.0, ["7.0", "7"]),
        (["cat", "a cat", 2], ["cat", "a cat", "2"]),
        (("cat",), ["cat"]),
        ([{"answer": "cat", "answer_id": 1}, {"answer": "dog"}], ["cat", "dog"]),
        ({"answer": ["cat", "dog"], "answer_id": [1, 2]}, ["cat", "dog"]),
        (torch.tensor([3, 4]), ["3", "4"]),
        (torch.tensor(3), ["3"]),
    ],
)
def test_right_answers(answer: Any, expected: list[str]) -> None:
    assert right_answers({"answer": answer}, 3) == expected


@pytest.mark.parametrize(
    "answer", [[], {}, {"text": ["cat"]}, [["cat"]], [None, "cat"], True, [False], float("nan"), b"cat", object()]
)
def test_what_is_no_answer(answer: Any) -> None:
    with pytest.raises(InputError, match=r"^row 3: `answer` is .*; expected a text or a number, or a list of them"):
        right_answers({"answer": answer, "completion": "cat"}, 3)


def test_the_answer_that_most_gave() -> None:
    assert right_answer({"answer": ["dog", "cat", "cat"]}, 0) == "cat"
    assert right_answer({"answer": ["dog", "cat"]}, 0) == "dog"
    said = completed({"answer": ["dog", "cat", "cat"]}, 0)["completion"]
    assert said == [{"role": "assistant", "content": [{"type": "text", "text": "cat"}]}]


def test_any_of_several_answers_is_right(run: Any, rows: Dataset) -> None:
    alone = run()
    several = run(data=[{**row, "answer": ["nothing", row["answer"]]} for row in rows])
    assert several.recorded.right.tolist() == alone.recorded.right.tolist()
    assert (several.accuracy, several.by_kind) == (alone.accuracy, alone.by_kind)
    assert alone.scored_by == "exact match"
    assert several.scored_by == "exact match with any of several answers of 7 rows"


def test_ten_answers_are_scored_as_vqa(run: Any, rows: Dataset) -> None:
    alone = run()
    ten = run(data=[{**row, "answer": [row["answer"]] * 10} for row in rows])
    assert (ten.accuracy, ten.recorded.right.tolist()) == (alone.accuracy, alone.recorded.right.tolist())
    assert ten.scored_by == "VQA accuracy of 7 rows with ten answers"
    for agreeing, score in ((1, 0.3), (2, 0.6)):
        others = ["?"] * (10 - agreeing)
        some = run(data=[{**row, "answer": [{"answer": row["answer"]}] * agreeing + others} for row in rows])
        assert some.accuracy == pytest.approx(score * alone.accuracy)
        assert some.recorded.right.tolist() == [right and score > 0.5 for right in alone.recorded.right.tolist()]
        assert some.to_json()["scored_by"] == ten.scored_by
