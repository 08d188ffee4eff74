"""Thresholds are found without logits that nobody reads, in models that can leave them out and in those that cannot."""

from typing import Any

import pytest
import torch
from families import build

from skipit.router import attach
from skipit.theory.calibrate import measured_share, shares_of
from skipit.theory.cost import CostModel
from skipit.theory.inputs import keeps_logits


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("ask", [measured_share, shares_of])
def test_no_more_than_one_logit_of_a_row_is_made(inputs: dict[str, torch.Tensor], ask: Any) -> None:
    model, made = build("llava").eval(), []
    attach(model)
    model.lm_head.register_forward_hook(lambda _module, _args, out: made.append(tuple(out.shape)))
    found = ask(model, [inputs], CostModel.of(model), "evict", *([0.0] if ask is measured_share else []))
    assert made == [(2, 1, model.lm_head.out_features)]
    assert 1 < (found if ask is measured_share else found(0.0)) < 1.01, "open gates, and what they cost"


def test_a_model_without_a_head_has_none_to_leave_out(inputs: dict[str, torch.Tensor]) -> None:
    whole = build("llava").eval()
    assert keeps_logits(whole)
    assert not keeps_logits(whole.model)
    attach(whole.model)
    assert 1 < measured_share(whole.model, [inputs], CostModel.of(whole.model), "evict", 0.0) < 1.01
