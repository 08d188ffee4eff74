"""Kills a verb again and again, at random moments and inside its saves, and checks what the next run makes of it.

Run by tests/skipit/cli/test_kills.py: VERB KILLS CHAIN, in a folder of its own. Children are forked with everything
imported, so that moments fall into the work and not into imports.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 - imported once, for all children
import datasets  # noqa: F401
import peft  # noqa: F401
import torch

from skipit.cli.main import main

verb, kills, chain = sys.argv[1], int(sys.argv[2]), sys.argv[3]
LINES = {
    "profile": "profile reference reference --samples 16 --batch-size 2 --draws 1 --save-every 1 --out",
    "export": f"export {chain}/run --overwrite --out",
    "eval": f"eval {chain}/checkpoint reference --samples 8 --repeats 1 --controlled-samples 2 --no-compiled "
    f"--profile {chain}/profile --out",
    "calibrate": "calibrate reference --budget 0.7 --samples 16 --overwrite",
}


def line(out: Path) -> list[str]:
    given = LINES[verb].split()
    if verb == "calibrate":
        return [given[0], str(out), *given[1:]]
    resume = ["--resume"] if verb in ("profile", "eval") and out.with_name(f"{out.name}.partial").is_dir() else []
    return [*given, str(out), *resume]


def live(out: Path, before: Callable[[], None] = lambda: None) -> int:
    child = os.fork()
    if child == 0:
        before()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the child
        sys.stderr = open("said", "w")  # noqa: SIM115
        code = main(line(out))
        Path("syncs").write_text(str(count))
        os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


count, usual = 0, os.fsync


def die_at(number: int) -> Callable[[], None]:
    """Die in the save in which the process syncs for the given time."""

    def sync(descriptor: int) -> None:
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(descriptor)

    return lambda: setattr(os, "fsync", sync)


def contents(out: Path) -> dict[str, Any]:
    """What a result says, without clocks."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            for name in ("made", "made_by", "exported_by"):
                values.pop(name, None)
            for name in ("dense", "gated") if path.name == "eval.json" else ():
                values[name].pop("latency")
            found[str(path.relative_to(out))] = values
        elif path.suffix != ".html":
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def start(out: Path) -> None:
    """What is there before the verb runs."""
    if verb == "calibrate" and not out.exists():
        shutil.copytree(Path(chain) / "checkpoint", out)


def finish(out: Path, whole: dict[str, Any]) -> None:
    """The next run, which is not killed, gives the right result and leaves nothing else."""
    partial = out.with_name(f"{out.name}.partial")
    # Whoever is killed while it tells of its result has written it, and the next run would refuse the folder.
    locks = [f".{out.name}.skipit-lock"]
    if not (verb in ("profile", "eval") and out.exists() and not partial.exists()):
        assert ended(live(out)) == 0, Path("said").read_text()
        locks = []
    assert contents(out) == whole
    assert [path.name for path in out.parent.glob(".*")] + list(out.parent.glob("*.partial")) in ([], locks)
    if verb != "export":  # which is to be killed while it replaces one
        shutil.rmtree(out)


torch.set_num_threads(1)
random.seed(0)
Path("at").mkdir()
start(Path("whole"))
began = time.perf_counter()
assert ended(live(Path("whole"), die_at(-1))) == 0, Path("said").read_text()
seconds, syncs = time.perf_counter() - began, int(Path("syncs").read_text())
whole = contents(Path("whole"))
out, killed, within = Path("at/out"), 0, 0
while killed < kills:
    start(out)
    if killed % 2:
        status = ended(live(out, die_at(random.randint(1, syncs))))
        within += status != 0
    else:
        child = live(out)
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        status = ended(child)
    assert status in (0, -signal.SIGKILL), Path("said").read_text()
    killed += status != 0
    goes_on = status != 0 and verb in ("profile", "eval") and random.random() < 0.7  # killed again after it is resumed
    if not goes_on:
        if status == 0 and verb != "export":
            assert contents(out) == whole
            shutil.rmtree(out)
        else:
            finish(out, whole)
start(out)
if verb != "export" or not out.exists():
    finish(out, whole)
print(f"{verb}: killed {killed} times, {within} within a save", flush=True)
assert within
