"""What every study takes on its command line, and the tables that it prints."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from skipit.train.data.sources import BUILT_IN


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """A table in Markdown: `text` columns are on the left, numbers on the right.

    Example:
        >>> print(markdown(["", "ms"], [["dense", "7.1"]]))
        | | ms |
        |---|---:|
        | dense | 7.1 |
    """
    rule = "".join("|---" if column in text else "|---:" for column in range(len(head))) + "|"
    lines = ("| " + "".join(f"{text} | " if text else "| " for text in row).rstrip() for row in (head, *rows))
    first, *rest = lines
    return "\n".join([first, rule, *rest])


_OPTIONS: dict[str, tuple[str, type, str]] = {
    "budget": ("--budget", float, "share of FLOPs"),
    "budgets": ("--budgets", float, "shares of FLOPs"),
    "seed": ("--seed", int, "of rows, training and random choices"),
    "seeds": ("--seeds", int, "of rows, training and random choices"),
    "steps": ("--steps", int, "of training"),
    "batch_size": ("--batch-size", int, "rows of a training step"),
    "lora_rank": ("--lora-rank", int, "of every training"),
    "learning_rate": ("--learning-rate", float, "of LoRA"),
    "samples": ("--samples --rows", int, "test rows"),
    "calibration": ("--calibration --calibration-samples", int, "rows on which budgets are met"),
    "profiled": ("--profiled --profile-samples", int, "rows of the profile"),
    "model": ("--model", str, "and its rows"),
    "repeats": ("--repeats", int, "of everything that is timed; the median counts"),
    "out": ("--out", Path, "folder; what is finished there is not measured again"),
    "file": ("--out", Path, "JSON file to write"),
}


def command(module: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The parser of a study, with those of the shared options that it takes.

    Args:
        module: its `__name__`, which is its command's.
        doc: its `__doc__`.
        **defaults: of the options, by where their values go; a list takes several.
    """
    name = module.removeprefix("studies.").replace("_", "-")
    parser = argparse.ArgumentParser(
        f"scripts/study {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for value, default in defaults.items():
        flags, kind, what = _OPTIONS[value]
        parser.add_argument(
            *flags.split(),
            dest=value,
            type=kind,
            choices=BUILT_IN if value == "model" else None,
            nargs="+" if isinstance(default, list) else None,
            default=default,
            help=what if default is None else f"{what} (default %(default)s)",
        )
    return parser
