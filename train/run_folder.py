"""The folder of a training run: what it must not destroy, what is resumed from it, and what a finished run leaves."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skipit.router import find_router, gate_state
from skipit.router.checkpoint import save_router
from skipit.router.errors import CheckpointError, short
from skipit.router.folders import check_out, claimed, load_json, new_file, save_json, writing
from skipit.router.paths import check_there
from skipit.theory.sharded import unsharded

from .data.used import pack
from .launch import CHECKPOINTS, barrier
from .manifest import MANIFEST, find_damage

ADAPTER = "adapter"
RUN_FILE = "run.json"
ROWS = "rows"  # then -0, -1, ...: what each process has read so far
CONFIG_FILE = "train_config.json"
STATE_FILE = "skipit_state.json"  # in each checkpoint, written last
# A resumed run may not change these: its data, its weights or its schedule would be another run's.
FIXED = (
    "processes",
    "decide_at",
    "budget",
    "latency",
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


def read_record(run: Path) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises:
        CheckpointError: not a finished run, or it does not say of which model.
    """
    check_there(run)
    if not (run / RUN_FILE).is_file():
        hint = " Finish it with `skipit train ... --resume`." if (run / CONFIG_FILE).is_file() else ""
        raise CheckpointError(f"{run} is not a finished run: it has no {RUN_FILE}.{hint}")
    record = load_json(run / RUN_FILE)
    for key in ("base", "model"):
        if not isinstance(record.get(key), str):
            raise CheckpointError(f"{run / RUN_FILE}: `{key}`: got {short(record.get(key))}, expected a name.")
    return record


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


@contextmanager
def claimed_run(out: Path, main: bool, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep a run folder for the processes of one run, of which the main one holds its lock; see `check_folder`.

    Raises:
        CheckpointError: it is refused, or another run writes it.
    """

    def check() -> None:
        check_folder(out, resume=resume, overwrite=overwrite)

    check()
    with claimed(out, check) if main else nullcontext():
        yield


def has_checkpoint(out: Path) -> bool:
    """Whether a run that is not finished can be resumed."""
    return last_checkpoint(out / CHECKPOINTS) is not None


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
        settings: of the run, with its base, its number of processes, and its plan's decision points.
        main: whether this process is the one that writes; all of them call every method.
    """

    path: Path
    settings: dict[str, Any]
    main: bool

    def prepare(self, resume: bool, note: Callable[[str], None] = lambda text: None) -> Path | None:
        """The checkpoint to continue from, or None and a fresh folder with the settings in it.

        Args:
            resume: whether there is one.
            note: called with what is wrong with a checkpoint that is passed over.

        Raises:
            CheckpointError: a setting that a resumed run must keep has changed, no checkpoint is whole, or the folder
                cannot be written.
        """
        if resume:
            self._check_settings()
        barrier()  # every process has looked at the folder
        if self.main:
            self._make(resume, note)
        barrier()
        return last_checkpoint(self.path / CHECKPOINTS) if resume else None

    def _check_settings(self) -> None:
        before, now = load_json(self.path / CONFIG_FILE), json.loads(json.dumps(self.settings))
        if changed := [name for name in FIXED if before.get(name) != now[name]]:
            what = ", ".join(f"`{name}` was {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise CheckpointError(f"{self.path} cannot be resumed with other settings: {what}. Use the old ones.")

    def _make(self, resume: bool, note: Callable[[str], None]) -> None:
        if resume:
            self._keep_whole(note)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        save_json(self.path / CONFIG_FILE, self.settings)

    def _keep_whole(self, note: Callable[[str], None]) -> None:
        """Leave no checkpoint beyond the last that is whole: `Trainer` would count it as one to keep."""
        found = sorted((self.path / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
        damaged: list[tuple[Path, str]] = []
        for checkpoint in found:
            if not (checkpoint / STATE_FILE).is_file():
                continue  # a save that was killed
            if not (checkpoint / MANIFEST).is_file():
                note(f"{checkpoint.name} has no {MANIFEST}: an older skipit wrote it, and it cannot be verified.")
                break
            if (problem := find_damage(checkpoint)) is None:
                break
            damaged.append((checkpoint, problem))
        else:
            raise CheckpointError(
                f"{self.path} cannot be resumed, no checkpoint is whole: "
                f"{'; '.join(f'{path.name}: {problem}' for path, problem in damaged)}. "
                "Put the file back, or start anew with --overwrite."
            )
        for path, problem in damaged:
            shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            path.rename(aside)
            note(f"{path.name} is damaged, {problem}: it is now {aside.name}, and {checkpoint.name} is resumed.")
        for path in found[: found.index(checkpoint)]:
            shutil.rmtree(path, ignore_errors=True)

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

        Raises:
            CheckpointError: something cannot be written; the checkpoints stay.
        """
        with unsharded(parameter for parameter in model.parameters() if parameter.requires_grad):
            if self.main:
                with writing(self.path / ADAPTER):
                    model.save_pretrained(self.path / ADAPTER)
                gates = {name: value.float() for name, value in gate_state(model).items()}
                save_router(self.path, find_router(model)[1].config, gates)
        if self.main:
            with new_file(self.path / "history.jsonl") as file:
                file.write_text("".join(json.dumps(figures) + "\n" for figures in history), encoding="utf-8")
            save_json(self.path / RUN_FILE, record)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            for notes in self.path.glob(f"{ROWS}-*"):
                notes.unlink()
        barrier()
