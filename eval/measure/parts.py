"""What an evaluation has done so far, on disk, so that one that is stopped goes on: answers of models, and figures.

The folder holds `partial.json`, which says what is measured, and for every part that is done its JSON, beside that of
answers their tensors. A part's JSON is written last: a run may be killed at any moment.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from skipit.router.call import ImageStates
from skipit.router.folders import load_json, load_tensors, new_directory, save_json, save_tensors
from skipit.theory.partial import RECORD, check_same, check_unfinished

from .recorded import Record, Recorded
from .runner import Outcome

VERSION = 1


class Parts:
    """Keeps every part of an evaluation once it is done.

    Args:
        folder: such as `E.partial` beside the output `E`.
        resume: go on from what the folder holds.
        overwrite: forget what it holds.

    Raises:
        CheckpointError: there is nothing to resume, or something that would be lost.
    """

    def __init__(self, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        check_unfinished(folder, "evaluation", resume=resume, overwrite=overwrite)
        self.folder, self.resume = folder, resume
        self._record: dict[str, Any] = {}

    def begin(self, of: dict[str, Any]) -> None:
        """Start, or go on.

        Args:
            of: what is measured, plain JSON; must be the same as when the evaluation began.

        Raises:
            CheckpointError: it is not, and the message says what differs.
        """
        self._record = {"version": VERSION, **of}
        if self.resume:
            check_same(self.folder, self._record)
        else:
            self.remove()

    def holds(self, name: str) -> bool:
        """Whether a part is done."""
        return (self.folder / f"{name}.json").is_file()

    def values(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part that is JSON: what is kept of it, or what is made now, and kept."""
        if self.holds(name):
            return load_json(self.folder / f"{name}.json")
        made = make()
        self._save(name, made)
        return made

    def outcome(self, name: str, make: Callable[[], Outcome]) -> Outcome:
        """A part that is a model's answers: those that are kept, or those of now, which are kept."""
        if self.holds(name):
            return _unpacked(load_json(self.folder / f"{name}.json"), load_tensors(self.folder / f"{name}.safetensors"))
        made = make()
        self._save(name, *_packed(made))
        return made

    def _save(self, name: str, values: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        def save(folder: Path) -> None:
            if tensors is not None:
                save_tensors(folder / f"{name}.safetensors", tensors)
            save_json(folder / f"{name}.json", values)

        if self.folder.exists():
            save(self.folder)
            return
        with new_directory(self.folder) as folder:
            save_json(folder / RECORD, self._record)
            save(folder)

    def remove(self) -> None:
        """Delete the folder, once the evaluation itself is written."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _packed(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Tensor]]:
    recorded = outcome.recorded
    tensors = {name: getattr(recorded, name) for name in ("right", "log_probability", "tokens")}
    tensors |= {name: getattr(outcome, name) for name in ("compute_by_unit", "skip_rate")}
    records = []
    for number, record in enumerate(recorded.records):
        tensors |= {f"{number}.{name}": getattr(record, name) for name in ("run", "stratum", "real")}
        tensors |= {f"{number}.kinds.{name}": mask for name, mask in record.kinds.items()}
        kept = {name: getattr(record, name) for name in ("kv", "unit", "images", "decided")}
        records.append({"kinds": list(record.kinds), **kept})
    figures = {name: getattr(outcome, name) for name in ("accuracy", "by_kind", "compute", "scored_by")}
    return {**figures, "answers": recorded.answers, "records": records}, tensors


def _unpacked(values: dict[str, Any], tensors: dict[str, Tensor]) -> Outcome:
    records = [
        Record(
            **{name: tensors[f"{number}.{name}"] for name in ("run", "stratum", "real")},
            kinds={name: tensors[f"{number}.kinds.{name}"] for name in record["kinds"]},
            kv=record["kv"],
            unit=record["unit"],
            images=ImageStates(*record["images"]),
            decided=record.get("decided", True),  # parts kept by a version before have no such figure
        )
        for number, record in enumerate(values["records"])
    ]
    recorded = Recorded(values["answers"], tensors["right"], tensors["log_probability"], tensors["tokens"], records)
    figures = (values["accuracy"], values["by_kind"], values["compute"])
    return Outcome(recorded, *figures, tensors["compute_by_unit"], tensors["skip_rate"], values["scored_by"])
