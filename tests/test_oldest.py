"""The laws hold and training works with the oldest torch and transformers that are declared."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import skipit

ROOT = Path(__file__).parent.parent
MADE_IN = 1800  # seconds, of which most are a download
LAWS = ("tests/test_laws.py", "tests/test_lossless_laws.py")
TRAINING = "tests/train/test_train.py"
FAMILIES = "(llava or qwen2.5-vl or gemma3) and not next and not onevision"


@pytest.mark.slow
def test_the_laws_with_the_oldest_versions() -> None:
    made = subprocess.run(
        [ROOT / "tests" / "environments" / "oldest"], capture_output=True, text=True, timeout=MADE_IN, check=False
    )
    if made.returncode:
        pytest.skip(f"no environment with the oldest versions can be made: {made.stderr.strip()[-300:]}")
    python = ROOT / ".venv-oldest" / "bin" / "python"
    declared = dict(re.findall(r'"(torch|transformers)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    asked = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    # The package as it is run here; skipit itself is not installed there.
    env = {**os.environ, "PYTHONPATH": str(Path(skipit.__file__).parents[1])}
    has = subprocess.run([python, "-c", asked], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert [".".join(version.split(".")[:2]) for version in has] == [declared["torch"], declared["transformers"]]
    for number, asked in ((500, [*LAWS, "-k", FAMILIES]), (30, [TRAINING, "-k", "not tensorboard"])):
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *asked],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > number
