"""Every example in a docstring runs and prints what it says; decimals are compared as far as they are written."""

import doctest
import importlib
import pkgutil
import re

import pytest

import skipit

MODULES = ["skipit", *(info.name for info in pkgutil.walk_packages(skipit.__path__, "skipit."))]
PLUGINS = {"skipit.lmms": "lmms_eval", "skipit.vllm.model": "vllm"}  # of packages that may not be installed
DECIMAL = re.compile(r"[-+]?\d+\.(\d*)(?:[eE][-+]?\d+)?")


class RoundedChecker(doctest.OutputChecker):
    """Takes 0.0999999 for 0.1, as a reader would."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        expected = list(DECIMAL.finditer(want))
        if len(expected) == len(DECIMAL.findall(got)):
            remaining = iter(expected)

            def as_written(found: re.Match[str]) -> str:
                wanted = next(remaining)
                tolerance = 0.5 * 10 ** -len(wanted[1]) if wanted[1] else 1e-6
                return wanted[0] if abs(float(wanted[0]) - float(found[0])) <= tolerance else found[0]

            got = DECIMAL.sub(as_written, got)
        return super().check_output(want, got, optionflags)


def run_examples(name: str) -> doctest.TestResults:
    runner = doctest.DocTestRunner(RoundedChecker(), optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(importlib.import_module(name), name):
        runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    pytest.importorskip(PLUGINS.get(name, "skipit"))
    assert run_examples(name).failed == 0


def test_examples_are_found() -> None:
    assert run_examples("skipit.train.reference.data").attempted == 2


@pytest.mark.parametrize(
    ("want", "got", "same"),
    [
        ("0.1\n", "0.0999999988824129\n", True),
        ("0.1\n", "0.16\n", False),
        ("[0.5, -8.0]\n", "[0.5000001, -7.99999]\n", True),
        ("tensor([3., 2.])\n", "tensor([3.2, 2.])\n", False),
        ("3\n", "2\n", False),
    ],
)
def test_decimals_are_compared_as_far_as_they_are_written(want: str, got: str, same: bool) -> None:
    assert RoundedChecker().check_output(want, got, 0) is same
