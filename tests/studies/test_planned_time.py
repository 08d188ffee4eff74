"""What a plan in time takes is measured against the dense run of the same prompts."""

from pathlib import Path

import pytest
from command_line import skipit

from studies import planned_time


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    at = tmp_path / "profile"
    assert skipit("profile", "reference", "reference", "--samples", 4, "--draws", 1, "--out", at).code == 0
    assert skipit("bench", "reference", "--tokens", 45, "--seconds", 0.1).code == 0
    planned_time.main([str(at), "--latency", "0.5", "--samples", "2", "--repeats", "3"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "| `" in line]
    assert [(row[0].strip(), float(row[1])) for row in rows] == [("`retain`", 0.5), ("`evict`", 0.5)]
    # At this size layers are left out for all tokens, which is far from 1 on any machine.
    assert all(0.2 < float(row[3]) < 0.8 for row in rows)
