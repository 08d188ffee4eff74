"""What a budget in time takes is measured against the dense run of the same prompts."""

from pathlib import Path

import pytest
from command_line import skipit

from studies import planned_time


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| `" in line]


def test_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    at, point = tmp_path / "profile", tmp_path / "fast"
    assert skipit("profile", "reference", "reference", "--samples", 4, "--draws", 1, "--out", at).code == 0
    assert skipit("bench", "reference", "--tokens", 45, "--seconds", 0.1).code == 0
    assert skipit("plan", at, "--latency", 0.5, "--out", tmp_path / "plan").code == 0
    assert skipit("export", tmp_path / "plan", "--model", "reference", "--out", point).code == 0
    assert skipit("calibrate", point, "reference", "--latency", 0.5, "--samples", 8).code == 0
    capsys.readouterr()
    options = ("--latency", "0.5", "--samples", "2", "--repeats", "3", "--checkpoints", str(point))
    planned_time.main([str(at), "--kv", "retain", *options])
    rows = table(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [["`retain`", name, "0.5"] for name in ("plan", "calibrated", "fast", "fast")]
    # At this size layers are left out for all tokens, which is far from 1 on any machine.
    assert all(0.2 < float(row[4]) < 0.8 for row in rows)
    assert all(row[6].endswith("%") for row in rows[2:])


def test_bench_small(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_time, "IMAGE_TOKENS", 16)
    size = ("--hidden", "64", "--layers", "2", "--seconds", "0", "--samples", "2", "--repeats", "1")
    for more in ((), ("--answer-tokens", "3")):
        planned_time.main([*size, "--latency", "0.99", "--kv", "evict", *more])
        rows = table(capsys.readouterr().out)
        assert [row[1] for row in rows] == ["plan", "calibrated"]
        assert all(float(row[4]) > 0 for row in rows)
