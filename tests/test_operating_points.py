"""What docs/operating-points.md tells users to type works, in its order."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from skipit.cli.main import build_parser, main
from skipit.train.reference.data import reference_dataset

TEXT = (Path(__file__).parents[1] / "docs" / "operating-points.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command: list[str]) -> None:
    build_parser().parse_args(command)


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))  # where `skipit bench` writes
    reference_dataset("test", 1)[0]["images"][0].save("photo.jpg")
    for command in COMMANDS:
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert "With confidence 0.95 at most 0.05 of new answers do" in capsys.readouterr().out
