"""Rows of measurements in a run that has so many minutes, and may be cut off before."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skipit.router.folders import load_json, provenance, save_json

from .options import markdown


class Report:
    """Rows of a run that may end at any time, and go on in another.

    Args:
        file: JSON, written after every row. Rows that it has already are kept, and not measured again.
        minutes: after which no row is begun.
        **about: what the file says beside the rows.

    Raises:
        ValueError: the file is about something else.
    """

    def __init__(self, file: Path, minutes: float, **about: Any) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        self.about = {**about, "minutes": minutes, "made_by": provenance()}
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            before = load_json(file)
            for name, value in about.items():
                if before.get(name) != value:
                    was = before.get(name)
                    raise ValueError(f"{file}: `{name}` is {was!r} there, here {value!r}. Write to another.")
            self.rows = [row for row in before["rows"] if "left_out" not in row and "failed" not in row]

    def add(self, measure: Callable[[], dict[str, Any]], by: float = 1.0, **what: Any) -> None:
        """Measure a row, unless the time has run out.

        Args:
            measure: gives its figures.
            by: share of all the time by which it must begin.
            **what: names it.
        """
        if any(what.items() <= row.items() for row in self.rows):
            return
        in_time = self.end - time.monotonic() > (1 - by) * 60 * self.about["minutes"]
        try:
            row = {**what, **(measure() if in_time else {"left_out": "no time"})}
        except Exception as error:  # the rows after it are worth having, whatever this one ran into
            row = {**what, "failed": f"{type(error).__name__}: {error}"[:300]}
        self.rows.append(row)
        save_json(self.file, {**self.about, "rows": self.rows})
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def tables(self) -> str:
        """Everything as Markdown: a table for each kind of row, and what is not in one."""
        parts = []
        for kind in dict.fromkeys(row["kind"] for row in self.rows):
            rows = [row for row in self.rows if row["kind"] == kind]
            good = [row for row in rows if "failed" not in row and "left_out" not in row]
            if good:
                head = [name for name in good[0] if name != "kind"]
                lines = [[_cell(row.get(name)) for name in head] for row in good]
                parts.append(markdown([name.replace("_", " ") for name in head], lines))
            for what in ("failed", "left_out"):
                parts += [f"{what.replace('_', ' ')}: {row}" for row in rows if what in row]
        return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
