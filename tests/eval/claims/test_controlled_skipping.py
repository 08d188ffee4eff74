"""Controlled skipping on other data: answers without completions, rows without images."""

import pytest
import torch

from skipit.eval.claims import controlled_skipping, pattern
from skipit.router import find_router
from skipit.router.errors import SkipItError
from skipit.train.data.sources import load_data, load_model
from skipit.train.profiling import profile_model


def test_controlled_skipping_leaves_the_dense_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    for module in (controlled_skipping, pattern):
        monkeypatch.setattr(module, "note", notes.append)
    skipping = controlled_skipping.controlled_skipping
    model, processor = load_model("reference")
    rows = load_data("reference", "test", 2)
    measured = profile_model(model, processor, rows, draws=1)
    answers = rows.remove_columns("completion")
    found = skipping(model, processor, answers, measured, "evict")
    assert found.keys() == {"units", "growing", "quadrants"}
    assert found["units"]["kv"] == found["growing"]["kv"] == "evict"
    assert found["units"]["rows"] == 2
    with pytest.raises(SkipItError, match="has no gates"):
        find_router(model)
    # A measure that cannot be had leaves the others standing.
    measured.var_text.fill_(torch.nan)
    measured.var_last.fill_(torch.nan)
    assert skipping(model, processor, answers, measured, "evict").keys() == {"units", "growing"}
    assert notes.pop().startswith("the 2x2 experiment is left out: ")
    assert pattern.outer_layers(measured, torch.full((12,), torch.nan).numpy()) is None
    assert notes.pop().startswith("late entry and early exit are left out: ")
