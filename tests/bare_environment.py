"""A virtual environment that has what the tests' own has, but not skipit."""

import os
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def bare_python(folder: Path) -> Path:
    """Make the environment in `folder`; gives its interpreter.

    Packages are links to those of the running interpreter; what belongs to skipit, an editable install's `.pth` file
    too, is left out.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    (packages,) = folder.glob("lib/python*/site-packages")
    for place in site.getsitepackages():
        for path in Path(place).iterdir():
            if "skipit" not in path.name and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def bare_variables(**more: str) -> Mapping[str, str]:
    """Environment variables for it: none that would let Python find packages elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more
