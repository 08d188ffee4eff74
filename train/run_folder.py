"""The folder of a training run: what it must not destroy, what is resumed from it, and what a finished run leaves."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skipit.router import find_router, gate_state
from skipit.router.checkpoint import save_router
from skipit.router.errors import CheckpointError
from skipit.router.folders import check_out, load_json, save_json
from skipit.theory.sharded import unsharded

from .data.used import pack
from .launch import CHECKPOINTS, barrier

ADAPTER = "adapter"
RUN_FILE = "run.json"
ROWS = "rows"  # then -0, -1, ...: what each process has read so far
CONFIG_FILE = "train_config.json"
STATE_FILE = "skipit_state.json"  # in each checkpoint, written last
# A resumed run may not change these: its data, its weights or its schedule would be another run's.
FIXED = (
    "processes",
    "budget",
    "more_budgets",
    "kv",
    "unit",
    "granularity",
    "steps",
    "batch_size",
    "accumulation",
    "lora_rank",
    "lora_alpha",
    "seed",
    "precision",
    "deepspeed",
)


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that would lose something, or from which nothing can be resumed.

    Raises:
        CheckpointError: says which.
    """
    last, finished = last_checkpoint(out / CHECKPOINTS), (out / RUN_FILE).is_file()
    if resume and finished:
        raise CheckpointError(f"{out} is finished. Next: `skipit export {out} --out DIR`.")
    if resume and last is None:
        raise CheckpointError(f"{out} has no checkpoint to resume from. Start without --resume.")
    if resume:
        return
    # A run that was stopped before its first checkpoint has nothing to lose.
    stopped = (out / CONFIG_FILE).is_file() and last is None and not finished
    if not overwrite and not stopped and out.is_dir() and any(out.iterdir()):
        hint = "continue with --resume, " if last else ""
        raise CheckpointError(
            f"{out} exists and is not empty; {hint}choose another --out, or pass --overwrite to replace it."
        )
    check_out(out, overwrite=True, made=(CONFIG_FILE,), foreign=f"is not a run: it has no {CONFIG_FILE}")


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder, or None."""
    saved = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}")]
    return max(saved, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class RunFolder:
    """Where one process of a run reads and, if it is the first, writes.

    Attributes:
        path: the folder.
        settings: of the run, with its base and its number of processes.
        main: whether this process is the one that writes; all of them call every method.
    """

    path: Path
    settings: dict[str, Any]
    main: bool

    def prepare(self, resume: bool) -> Path | None:
        """The checkpoint to continue from, or None and a fresh folder with the settings in it.

        Raises:
            CheckpointError: a setting that a resumed run must keep has changed, or the folder cannot be written.
        """
        checkpoint = last_checkpoint(self.path / CHECKPOINTS) if resume else None
        if checkpoint is not None:
            self._check_settings()
        barrier()  # every process has looked at the folder
        if self.main:
            self._make(checkpoint)
        barrier()
        return checkpoint

    def _check_settings(self) -> None:
        before, now = load_json(self.path / CONFIG_FILE), json.loads(json.dumps(self.settings))
        if changed := [name for name in FIXED if before.get(name) != now[name]]:
            what = ", ".join(f"`{name}` was {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise CheckpointError(f"{self.path} cannot be resumed with other settings: {what}. Use the old ones.")

    def _make(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            for unfinished in list((self.path / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                if _step(unfinished) > _step(checkpoint):
                    shutil.rmtree(unfinished)  # a save that was killed; `Trainer` would count it as one to keep
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_json(self.path / CONFIG_FILE, self.settings)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error

    def rows_file(self, process: int, fresh: bool) -> Path:
        """Where a process notes the rows that it reads; a run that goes on without one never gets one."""
        path = self.path / f"{ROWS}-{process}"
        if fresh:
            path.write_bytes(b"")
        return path

    def rows_read(self, processes: int) -> str | None:
        """The rows that all processes noted, packed; None where one has no note of all."""
        files = [self.path / f"{ROWS}-{process}" for process in range(processes)]
        return pack(b"".join(file.read_bytes() for file in files)) if all(file.is_file() for file in files) else None

    def finish(self, model: Any, history: list[dict[str, float]], record: dict[str, Any]) -> None:
        """Write the results: adapter in PEFT's format, router settings and gates, history and record.

        Args:
            model: the trained PEFT model.
            history: figures of every step.
            record: what run.json says of the run.
        """
        with unsharded(parameter for parameter in model.parameters() if parameter.requires_grad):
            if self.main:
                model.save_pretrained(self.path / ADAPTER)
                gates = {name: value.float() for name, value in gate_state(model).items()}
                save_router(self.path, find_router(model)[1].config, gates)
        if self.main:
            lines = "".join(json.dumps(figures) + "\n" for figures in history)
            (self.path / "history.jsonl").write_text(lines, encoding="utf-8")
            save_json(self.path / RUN_FILE, record)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            for notes in self.path.glob(f"{ROWS}-*"):
                notes.unlink()
        barrier()
