"""What docs/training.md tells users to type works as it stands there, and the errors it quotes are the code's."""

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipit.cli.main import build_parser, main, parse
from skipit.router.folders import load_json

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands(language: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(language) for line in block.strip().splitlines()]


RUN, SHOWN = commands("sh"), commands("bash")  # the second kind needs what a test has not: hosts, GPUs, the Hub


def verb_of(command: list[str]) -> list[str]:
    """The arguments of `skipit`, whatever launches it."""
    return command[command.index("skipit.cli" if "skipit.cli" in command else "skipit") + 1 :]


def write_files(folder: Path) -> None:
    """The YAML files of the page, by the names that the text gives them."""
    for name, block in zip(re.findall(r"This is `(\w+\.yaml)`", TEXT), blocks("yaml"), strict=True):
        (folder / name).write_text(block)


@pytest.mark.parametrize("command", [c for c in RUN + SHOWN if c[0] != "scripts/study"], ids=" ".join)
def test_commands_parse(command: list[str]) -> None:
    build_parser().parse_args(verb_of(command))


def test_the_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    parsed = parse(verb_of(RUN[0]))
    assert (parsed.budget, parsed.steps, parsed.learning_rate) == (0.6, 20, 5e-4)
    assert yaml.safe_load((tmp_path / "accelerate.yaml").read_text())["deepspeed_config"] == {"zero_stage": 2}


def test_links_lead_somewhere() -> None:
    folder = Path(__file__).parents[1] / "docs"
    anchors = {
        path: {
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        }
        for path in folder.glob("*.md")
    }
    for target, _, anchor in re.findall(r"\]\(((?!http)[^)#]*)(#([^)]+))?\)", TEXT):
        path = (folder / target).resolve() if target else folder / "training.md"
        assert path.exists(), target
        assert not anchor or anchor.lstrip("#") in anchors[path], anchor


def said() -> list[str]:
    """Every text in skipit's code, what is computed within one being `...`."""
    texts = []
    for folder in ("src/skipit", "train", "router", "theory"):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append(
                        "".join(
                            getattr(part, "value", "") if isinstance(part, ast.Constant) else "..."
                            for part in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def test_quoted_errors_are_those_of_the_code() -> None:
    table = TEXT.split("| what would happen | what is said |")[1].split("\n\n")[0]
    quoted = [re.split(r"(?<!\\)\|", line)[2].strip().strip("`").strip() for line in table.splitlines()[2:]]
    assert len(quoted) > 12
    texts = said()
    for error in quoted:
        assert any(error in text for text in texts), error


def make_data() -> None:
    (program,) = blocks("python")
    exec(compile(program, "docs/training.md", "exec"), {})


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Fewer steps than on the page."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    make_data()
    profile = next(c for c in RUN if c[:2] == ["skipit", "profile"])
    assert main([*profile[1:], "--samples", "8", "--draws", "1"]) == 0
    for out in ("runs/mine", "runs/stream"):
        command = next(c for c in RUN if c[-1] == out)
        assert main([*command[1:], "--steps", "6", "--calibration-samples", "8"]) == 0, capsys.readouterr().err
        named = re.findall(r"skipped: row \d+: image 0 cannot be read: .*train-3.png", capsys.readouterr().err)
        assert len(named) == 1
        assert load_json(Path(out) / "run.json")["skipped_rows"] == 1


@pytest.mark.slow
def test_commands_run(tmp_path: Path) -> None:
    """All of them, in their order, as a user would."""
    write_files(tmp_path)
    ran_python = False
    for command in RUN:
        if "my_data/train.jsonl" in command and not ran_python:
            subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, check=True, timeout=300)
            ran_python = True
        line = [str(BIN / command[0]), *command[1:]]
        if command[0] in ("deepspeed", "accelerate"):
            # Two tests may run side by side, and these launchers have one port.
            option = {"deepspeed": "--master_port", "accelerate": "--main_process_port"}[command[0]]
            where = 1 if command[0] == "deepspeed" else 2
            line[where:where] = [option, str(free_port())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert found.returncode == 0, (command, found.stdout[-2000:], found.stderr[-3000:])
    assert {load_json(path)["processes"] for path in (tmp_path / "runs").glob("*/run.json")} == {1, 2}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
