"""Run one study by its name: scripts/study NAME [options]."""

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from skipit.router import SkipItError

FOLDER = Path(__file__).parent


def studies() -> dict[str, str]:
    """What every study asks, by name: the first line of a file or folder here that names its command there."""
    found = {}
    for module in iter_modules([str(FOLDER)]):
        path = FOLDER / module.name / "__init__.py" if module.ispkg else FOLDER / f"{module.name}.py"
        name = module.name.replace("_", "-")
        what, command, _ = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition(
            f": scripts/study {name}"
        )
        if command:
            found[name] = what
    return found


def main(argv: Sequence[str]) -> int:
    """Run a study; returns the exit status."""
    found = studies()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, found)) + 2
        lines = (f"  {name:{width}}{what}" for name, what in found.items())
        print("\n".join(["scripts/study NAME [options], where NAME is:", *lines]))
        return 0
    name, *rest = argv
    if name not in found:
        near = "".join(f" Did you mean {other}?" for other in get_close_matches(name, found, 1))
        print(f"scripts/study: got {name!r}, expected one of {', '.join(found)}.{near}", file=sys.stderr)
        return 2
    from skipit.train.display import quiet

    quiet()
    try:
        import_module(f"studies.{name.replace('-', '_')}").main(rest)
    except SkipItError as error:
        print(f"scripts/study {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
