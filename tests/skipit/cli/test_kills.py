"""SIGKILL at fifty moments, some of them inside a save: the next run gives the result of one that was never killed."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "kill_worker.py"
KILLS = {"profile": 13, "export": 13, "eval": 12, "calibrate": 12}


@pytest.mark.slow
@pytest.mark.parametrize("verb", KILLS)
def test_killed_and_run_again(verb: str, chain: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(WORKER), verb, str(KILLS[verb]), str(chain)]
    found = subprocess.run(program, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]
    assert f"{verb}: killed {KILLS[verb]} times" in found.stdout
