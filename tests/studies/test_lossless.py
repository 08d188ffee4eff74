"""What lossless decoding costs is measured by the model's own answers, and by steps that leave the cache as it was."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, inputs

from skipit.router import RouterConfig, attach
from studies import lossless


def test_answers_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build_shape = lossless.SHAPES["small"]
    monkeypatch.setitem(lossless.SHAPES, "small", lambda **given: build_shape(**{**given, "hidden": 64, "layers": 4}))
    sizes = ["--steps", "1", "--samples", "2", "--repeats", "1", "--drafted", "2", "4", "--image-tokens", "16"]
    lossless.main([*sizes, "--out", str(tmp_path)])
    cells = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()}
    dense, gated, _, two, four = cells["answers"]["rows"]
    assert [row["name"] for row in (dense, gated, two, four)] == [
        "dense",
        "gated",
        "lossless, 2 drafted",
        "lossless, 4 drafted",
    ]
    assert dense["tokens"] == 10  # nine digits, and an end
    assert dense["speed_up"] == dense["same"] == two["same"] == four["same"] == 1
    assert gated["verifications"] == 0 < four["verifications"] < two["verifications"]
    steps = cells["steps-small"]["rows"]
    assert len(steps) == 2 * 2 * 2  # shares, ways to spread them, numbers of tokens
    for row in steps:
        spent = row["drafted"] * row["draft_ms"] + row["verification_ms"]
        assert row["break_even"] == pytest.approx(spent / row["dense_ms"])
        assert row["at_best"] == pytest.approx((row["drafted"] + 1) / row["break_even"])
    said = capsys.readouterr().out
    assert "| lossless, 4 drafted |" in said
    assert "| 25% of layers, the same for all | 4 |" in said


def test_what_comes_after_the_prompt_is_timed() -> None:
    model = build("llava")
    attach(model, RouterConfig())
    batch, calls = inputs("llava", [[5, "image", 6, 7]]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    settings = {**batch, "do_sample": False, "max_new_tokens": 3}
    made, seconds = lossless.after_prompt(model, lambda: model.generate(**settings))
    assert torch.equal(made, build("llava").generate(**settings))
    assert len(calls) == 3
    assert 0 < seconds < 60
    assert len(model._forward_hooks) == 1
