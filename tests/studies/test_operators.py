"""Operators are grouped and counted: gates pack where they skip, and enter fewer linear maps."""

import json
from pathlib import Path
from typing import Any

import pytest

from studies import operators


def calls(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {row["group"]: row["calls"] for row in rows}


def test_small(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "IMAGE_TOKENS", 16)
    size = ("--model", "small", "--hidden", "64", "--layers", "3", "--repeats", "1")
    operators.main([*size, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["small"]
    prefill = calls(found["prompt"])
    assert prefill["attention"]["untouched"] == prefill["attention"]["gates decide, all run"]
    assert prefill["packing and copies"]["evict, 50% skipped"] > prefill["packing and copies"]["untouched"]
    assert all(ms >= 0 for row in found["token"] for ms in row["ms"].values())
    assert capsys.readouterr().out.count("| *sum* |") == 2


def test_reference() -> None:
    cases, inputs = operators.reference(4)
    assert list(cases)[2:] == ["retain, half of the FLOPs", "evict, half of the FLOPs"]
    found = operators.measure(cases, inputs, 1)
    for rows in (calls(found["prompt"]), calls(found["token"])):
        # The gates' logits are linear maps, too.
        assert rows["linear maps"]["untouched"] < rows["linear maps"]["gates decide, all run"]
