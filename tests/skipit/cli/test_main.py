"""The command itself: help that answers at once, folders and interrupts, whatever the verb."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import refused, skipit

from skipit.cli.main import VERBS, parse
from skipit.router.lock import locked

HEAVY = {"torch", "transformers", "datasets", "matplotlib", "rich", "yaml"}


class TestHelp:
    def test_help_answers_at_once(self) -> None:
        code = "import sys; from skipit.cli.main import main; print(main(['--help']), *sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        help_, _, rest = result.stdout.rpartition("\n0 ")
        assert all(re.search(rf"^ +{verb}\b", help_, re.MULTILINE) for verb in VERBS)
        assert not HEAVY & set(rest.split())

    def test_every_verbs_help_answers_at_once(self) -> None:
        code = "import sys; from skipit.cli.main import VERBS, main; [main([verb, '--help']) for verb in VERBS]"
        command = [sys.executable, "-c", f"{code}; print(*sys.modules)"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.count("usage: skipit ") == len(VERBS)
        assert not HEAVY & set(result.stdout.splitlines()[-1].split())

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_help_ends_in_an_example_that_parses(self, verb: str) -> None:
        result = skipit(verb, "--help")
        assert result.code == 0
        example = result.out.rstrip().splitlines()[-1]
        name, *argv = shlex.split(example)
        assert name == "skipit"
        assert parse(argv).verb == verb

    def test_version(self) -> None:
        assert re.fullmatch(r"skipit \d+\.\d+\.\d+\n", skipit("--version").out)


def test_other_libraries_are_silent_and_hear_nothing_of_it(chain: Path, recwarn: Any) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    result = skipit("export", chain / "run", "--out", chain / "again", "--overwrite")
    assert (result.code, result.err) == (0, "")
    assert not recwarn.list
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestExistingFolders:
    LINES = (
        "profile reference reference",
        "plan {chain}/profile",
        "train reference reference --plan {chain}/plan",
        "export {chain}/run",
        "eval {chain}/checkpoint reference",
        "demo",
    )

    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(*_: Any, **__: Any) -> None:
            raise AssertionError("worked before it refused")

        # Modules are imported by the first line that names them: before what they take from `sources` is replaced.
        sources = ("train.data.sources.load_model", "train.data.sources.load_data")
        for name in ("demo.demo", "train.export.merge_run", *sources):
            monkeypatch.setattr(f"skipit.{name}", work)
        monkeypatch.setattr("skipit.router.checkpoint.load", work)
        monkeypatch.setattr("skipit.theory.artefact.load_profile", work)
        monkeypatch.setattr("skipit.theory.artefact.load_plan", work)

    @pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
    def test_are_refused_before_any_work(self, chain: Path, tmp_path: Path, line: str) -> None:
        argv = line.format(chain=chain).split()
        (tmp_path / "thesis.tex").write_text("years of work")
        assert re.search("exists.* or pass --overwrite to replace it", refused(*argv, "--out", tmp_path))
        said = refused(*argv, "--out", tmp_path, "--overwrite")
        assert "Delete it yourself or choose another --out." in said
        assert "is a file, expected a folder" in refused(*argv, "--out", tmp_path / "thesis.tex", "--overwrite")
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    @pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("train")])
    def test_that_cannot_be_made(self, chain: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda *_: False)
        said = refused(*line.format(chain=chain).split(), "--out", "/no/permission/here")
        assert said == "skipit: /no/permission/here cannot be written: no permission to make a folder in /.\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_stops_as_ctrl_c_does(number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        assert (tmp_path / ".x.skipit-lock").exists()
        os.kill(os.getpid(), number)
        time.sleep(9)

    # A job in the background of a shell begins with some of them ignored.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    began = signal.signal(number, before)
    monkeypatch.setattr("skipit.train.profiling.profile", work)
    line = ("profile", "reference", "reference", "--samples", 2, "--out", tmp_path / "x")
    assert refused(*line, code=code) == "skipit: interrupted; nothing was written.\n"
    assert not list(tmp_path.iterdir())
    assert signal.signal(number, began) == before


@pytest.mark.parametrize("verb", ["profile", "plan", "probe", "export", "eval", "demo"])
def test_every_verb_keeps_its_folder_from_others_before_any_work(verb: str, chain: Path, tmp_path: Path) -> None:
    lines = {
        "profile": ("reference", "reference"),
        "plan": (chain / "profile",),
        "probe": ("reference", "reference"),
        "export": (chain / "run",),
        "eval": (chain / "checkpoint", "reference"),
        "demo": (),
    }
    with ThreadPoolExecutor(1) as pool, locked(tmp_path / "x"):
        said = pool.submit(skipit, verb, *lines[verb], "--out", tmp_path / "x").result()
    assert said.code == 1
    assert f"{tmp_path}/x is in use: another skipit is writing it." in said.err
    assert not list(tmp_path.iterdir())


def test_what_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    monkeypatch.setattr("skipit.train.profiling.profile", full)
    said = refused("profile", "reference", "reference", "--samples", 2, "--out", tmp_path / "x")
    assert said == "skipit: [Errno 28] No space left on device: '/tmp/somewhere'\n"


def test_an_interrupted_profile_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipit.train.profiling.profile", interrupt)
    assert "interrupted; nothing was written" in refused(
        "profile", "reference", "reference", "--samples", 2, "--out", tmp_path / "x", code=130
    )
    assert not list(tmp_path.iterdir())
