"""The losses are what their formulas say, and do not depend on how a step's rows are split into batches."""

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WIDTH, build, inputs
from torch import Tensor

from skipit.router import RouterConfig, attach, running, set_gates
from skipit.train.objective import AnswerLosses, answer_losses, answer_targets

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


def step_loss(model: Any, batch: dict[str, Tensor], kv: str, items: int) -> Tensor:
    """What the trainer computes for a batch, at a fixed threshold."""
    labels = labels_of(batch)
    with running(mode="masked", kv=kv):
        logits = model(**batch, use_cache=False).logits
    with torch.no_grad(), running(mode="dense"):
        teacher = model(**batch, use_cache=False).logits
    ce, kl, _ = losses(logits, teacher, labels)
    return (ce + kl) / items


@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("split", [[4, 4], [1, 5, 2]])
def test_one_large_batch_is_several_small_ones(kv: str, split: list[int]) -> None:
    model = build("llava").train()
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    set_gates(model, torch.randn(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2))
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
            step_loss(model, rows(start, start + size), kv, items).backward()
            start += size
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients([8]), gradients(split)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name
