"""The tests that need vLLM, and the laws under its versions of torch and transformers, in the environment it needs."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
LAWS = ["tests/test_laws.py", "-m", "not slow", "-k", "llava or qwen2.5-vl or gemma3"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is not None, reason="this is the environment with vLLM"),
]


@pytest.fixture(scope="module")
def python() -> Path:
    made = subprocess.run([ROOT / "tests" / "environments" / "vllm", ENVIRONMENT], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the environment with vLLM cannot be made here: {made.stderr[-500:]}")
    return ENVIRONMENT / "bin" / "python"


# vLLM changes classes of transformers where it runs a model: each file has a process of its own.
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/serving/test_gated.py", "-m", "slow"],
        ["tests/serving/test_server.py", "-m", "slow"],
        LAWS,
        ["tests/skipit/vllm"],
    ],
    ids=["gated", "server", "laws", "parts"],
)
def test_in_the_environment_of_vllm(python: Path, tests: list[str]) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    ran = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]
    assert " passed" in ran.stdout.splitlines()[-1]
