"""The folder that a verb makes: refused before hours of work, not after them."""

import os
from pathlib import Path

# What the folders that skipit makes hold; `--overwrite` replaces nothing else.
MADE = (
    "profile.json",
    "backbone.json",
    "plan.json",
    "train_config.json",
    "run.json",
    "router_config.json",
    "eval.json",
    "summary.json",
    "probes.json",
)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is not to be replaced or cannot be made.

    Raises:
        CheckpointError: it is there and not to be overwritten, holds what skipit did not make, or cannot be written.
    """
    from skipit.router.errors import CheckpointError

    if out.exists():
        if not overwrite:
            raise CheckpointError(f"{out} exists. Choose another --out, or pass --overwrite to replace it.")
        if not out.is_dir():
            raise CheckpointError(f"{out} is a file, expected a folder or nothing.")
        if any(out.iterdir()) and not any((out / name).exists() for name in MADE):
            raise CheckpointError(f"{out} holds nothing that skipit made. Delete it yourself or choose another --out.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: no permission to make a folder in {parent}.")
