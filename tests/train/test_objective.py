"""The losses are what their formulas say, and do not depend on how a step's rows are split into batches."""

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WIDTH, build, inputs
from torch import Tensor

from skipit.router import RouterConfig, Trace, attach, gated_layers, running, set_gates
from skipit.theory.cost import CostModel, trace_compute
from skipit.train.objective import AnswerLosses, DualAscent, answer_losses, answer_targets, gated_compute

EIGHT: list[list[int | str]] = [[5, "image", 6, 7, 8][: 3 + i % 3] + [9 + i, 10] * (1 + i // 3) for i in range(8)]


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] < 9), -100)


def losses(student: Tensor, teacher: Tensor | None, labels: Tensor) -> AnswerLosses:
    """Of logits at every position."""
    kept, targets = answer_targets(labels)
    return answer_losses(student[:, kept], None if teacher is None else teacher[:, kept], targets)


def test_losses_by_the_formula() -> None:
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [2, -100, 6, -100, 0]])
    ce, kl, correct = losses(student, teacher, labels)
    expected_ce = expected_kl = 0.0
    expected_correct = 0
    for row in range(2):
        for t in range(4):
            if labels[row, t + 1] == -100:
                continue
            q, p = torch.softmax(student[row, t], -1), torch.softmax(teacher[row, t], -1)
            expected_ce -= q[labels[row, t + 1]].log()
            expected_kl += (p * (p / q).log()).sum()
            expected_correct += int(q.argmax() == labels[row, t + 1])
    torch.testing.assert_close(ce, torch.as_tensor(expected_ce))
    torch.testing.assert_close(kl, torch.as_tensor(expected_kl))
    assert correct == expected_correct
    assert losses(student, None, labels).kl == 0
    assert losses(student, student, labels).kl.abs() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_taken_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = (30 * torch.randn(1, 4, 9)).to(dtype), torch.tensor([[0, 1, 2, 3]])
    rounded = losses(logits, logits.flip(-1), labels)
    assert rounded == losses(logits.float(), logits.flip(-1).float(), labels)
    assert rounded.ce.dtype == torch.float32


def test_rows_without_answers_add_nothing() -> None:
    student, labels = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 3), -100)
    ce, kl, correct = losses(student, student.detach(), labels)
    assert ce == kl == correct == 0
    (ce + kl).backward()
    assert not student.grad.any()


def step_loss(model: Any, batch: dict[str, Tensor], costs: CostModel, kv: str, items: int) -> Tensor:
    """What the trainer computes for a batch, at a fixed price."""
    labels = labels_of(batch)
    trace = Trace()
    with running(mode="masked", kv=kv, trace=trace):
        logits = model(**batch, use_cache=False).logits
    with torch.no_grad(), running(mode="dense"):
        teacher = model(**batch, use_cache=False).logits
    ce, kl, _ = losses(logits, teacher, labels)
    compute = gated_compute(costs, trace.steps[0])
    over = (compute.executed.sum() - 0.5 * compute.dense.sum()) / 1e4
    return (ce + kl + 0.7 * over) / items


@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("split", [[4, 4], [1, 5, 2]])
def test_one_large_batch_is_several_small_ones(kv: str, split: list[int]) -> None:
    model = build("llava").train()
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    set_gates(model, torch.randn(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2))
    costs = CostModel.of(model)
    torch.manual_seed(0)
    pixels = torch.randn(8, 3, 8, 8)

    def rows(start: int, stop: int) -> dict[str, Tensor]:
        batch = inputs("llava", EIGHT[start:stop], "right")
        return batch | {"pixel_values": pixels[start:stop]}

    items = int((labels_of(rows(0, 8))[:, 1:] != -100).sum())

    def gradients(sizes: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        start = 0
        for size in sizes:
            step_loss(model, rows(start, start + size), costs, kv, items).backward()
            start += size
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients([8]), gradients(split)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_compute_counts_decisions_and_blames_probabilities(kv: str) -> None:
    model, batch = build("llava"), inputs("llava", EIGHT, "right")
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    set_gates(model, torch.randn(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2))
    costs, trace = CostModel.of(model), Trace()
    with running(mode="masked", trace=trace):
        model(**batch, use_cache=False)
    compute = gated_compute(costs, trace.steps[0])
    counted = trace_compute(costs, trace.steps)
    torch.testing.assert_close(compute.executed.double(), counted.executed, rtol=1e-5, atol=0)
    torch.testing.assert_close(compute.dense.double(), counted.dense, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_running_costs(kv: str) -> None:
    """Gates that do not look at the states act on compute directly, and in one direction."""
    model, batch = build("llava"), inputs("llava", EIGHT, "right")
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    set_gates(model, torch.zeros(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2))
    trace = Trace()
    with running(mode="masked", trace=trace):
        model(**batch, use_cache=False)
    gated_compute(CostModel.of(model), trace.steps[0]).executed.sum().backward()
    for layer in gated_layers(model):
        assert (layer.layer_gate.bias.grad > 0).all()


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.05, 1.0])
def test_dual_ascent_finds_the_price(budget: float, start: float) -> None:
    """A router whose compute follows its price with some delay settles at the budget, from above and from below."""
    ascent, share = DualAscent(budget, rate=0.1, damping=4.0), start
    for _ in range(500):
        share += 0.1 * (float(torch.sigmoid(torch.tensor(1 - ascent.price))) - share)
        ascent.update(share)
    assert share == pytest.approx(budget, abs=0.01)
    assert ascent.multiplier == pytest.approx(1 - float(torch.tensor(budget).logit()), abs=0.1)


def test_price() -> None:
    ascent = DualAscent(0.5, rate=0.1, damping=2.0)
    assert ascent.price == 0
    ascent.update(0.8)
    assert ascent.multiplier == pytest.approx(0.03)
    assert ascent.price == pytest.approx(0.03 + 2.0 * 0.3)
    for _ in range(10):
        ascent.update(0.1)
    assert ascent.price < 0  # compute that is left over is bought
