"""`skipit` as a test types it."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from skipit.cli.main import main

# So little of both that each takes seconds.
TRAIN = ("--steps", 4, "--batch-size", 4, "--calibration-samples", 8, "--lora-rank", 2)
EVAL = ("--samples", 12, "--repeats", 2, "--no-compiled", "--controlled-samples", 2)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def skipit(*argv: Any) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in argv])
    return Result(code, out.getvalue(), err.getvalue())


def refused(*argv: Any, code: int = 1) -> str:
    """Run a command line that must be refused; returns what it says."""
    result = skipit(*argv)
    assert result.code == code, result
    assert result.out == ""
    return result.err
