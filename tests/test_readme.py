"""What the README says about the repository is true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from skipit.cli.main import RUNS
from skipit.cli.options import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("src/skipit", "router", "theory", "train", "train/zero", "train/reference", "eval", "eval/report", "scripts")


def test_every_file_has_its_line_in_the_tree() -> None:
    tree = README.split("## Files", 1)[1].split("```", 2)[1]
    listed: dict[str, set[str]] = {}
    folder = ""
    for line in tree.strip("\n").splitlines():
        if not line.startswith(" "):
            folder = line.split()[0].rstrip("/")
        else:
            listed.setdefault(folder, set()).add(line.split()[0])
    for folder in FOLDERS:
        files = {
            path.name
            for path in (ROOT / folder).iterdir()
            if path.is_file() and path.name not in ("__init__.py", "py.typed")
        }
        assert listed[folder] == files, folder


def test_every_line_of_the_tree_says_something() -> None:
    tree = README.split("## Files", 1)[1].split("```", 2)[1]
    assert all(len(line.split()) > 2 for line in tree.strip("\n").splitlines() if line.startswith(" "))


@pytest.mark.parametrize("command", re.findall(r"^(skipit [^#\n]+)", README, flags=re.MULTILINE))
def test_commands_parse(command: str) -> None:
    build_parser(RUNS).parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("script", re.findall(r"^(scripts/\w+)", README, flags=re.MULTILINE))
def test_scripts_exist_and_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
