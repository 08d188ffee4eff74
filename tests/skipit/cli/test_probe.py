"""`skipit probe` on the reference model: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from command_line import skipit

from skipit.theory.pooling import SITES

LINE = ("probe", "reference", "reference", "--samples", 150, "--splits", 1)


def test_table_and_file_agree(tmp_path: Path) -> None:
    code, out, err = skipit(*LINE, "--out", tmp_path / "probes")
    assert code == 0, err
    saved = json.loads((tmp_path / "probes" / "probes.json").read_text())
    assert saved["sites"] == list(SITES)
    assert saved["about"]["rows"] == 150
    assert {"made_by", "model", "version"} <= set(saved)
    assert "150 rows, 1 splits in halves, penalty 0.01, seed 0" in out
    lines = [line.split("│") for line in out.splitlines() if "last token" in line]
    assert len(lines) == 12
    cells = [cell.strip() for cell in lines[-1][1:-1]]
    assert cells[0] == "11"
    assert cells[2:4] == [f"{saved['accuracy'][layer][2]:.1%}" for layer in (11, 12)]
    assert cells[5:7] == [f"{saved['information'][layer][2]:.3f}" for layer in (11, 12)]
    assert cells[7] == f"{saved['gain'][11][2]:+.3f} ± {saved['gain_error'][11][2]:.3f}"
    assert f"last: {saved['classes'][2]} answers in {saved['rows'][2]} rows" in out
    again = skipit(*LINE, "--out", tmp_path / "probes")
    assert again[0] == 1
    assert "exists. Choose another --out, or pass --overwrite" in again[2]


@pytest.mark.parametrize("line", ["--penalty 0", "--penalty -1", "--splits 0", "--samples 0"])
def test_wrong_arguments(line: str, tmp_path: Path) -> None:
    code, out, err = skipit(*LINE[:3], *line.split(), "--out", tmp_path / "x")
    assert (code, out) == (2, "")
    assert f"argument {line.split()[0]}: got '{line.split()[1]}', expected a" in err


def test_too_few_rows(tmp_path: Path) -> None:
    code, _, err = skipit("probe", "reference", "reference", "--samples", 12, "--out", tmp_path / "x")
    assert code == 1
    assert "skipit: probes on `text`: of 12 rows with" in err
    assert not (tmp_path / "x").exists()
