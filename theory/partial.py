"""An unfinished profile on disk: what is being measured and the sums so far, so that a killed run can go on.

The folder holds `partial.json`, which says what is measured, and `sums.safetensors`. Both appear in one step, and later
the sums are replaced in one: a run may be killed at any moment.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipit.router.errors import CheckpointError, InputError
from skipit.router.folders import load_json, load_tensors, new_directory, save_json, save_tensors

VERSION = 4
RECORD, SUMS = "partial.json", "sums.safetensors"


def check_unfinished(folder: Path, what: str, *, resume: bool, overwrite: bool) -> None:
    """Refuse to lose what was done, or to go on where nothing was.

    Args:
        folder: that keeps what was done; beside it, its record.
        what: is unfinished, in a word.
        resume: go on from what the folder holds.
        overwrite: forget what it holds.

    Raises:
        CheckpointError: there is nothing to resume, or something that would be lost.
    """
    here = (folder / RECORD).is_file()
    if resume and not here:
        raise CheckpointError(f"{folder} does not hold an unfinished {what}. Start without --resume.")
    if here and not resume and not overwrite:
        raise CheckpointError(
            f"{folder} holds an unfinished {what}. Go on with --resume, or pass --overwrite to start anew."
        )
    if folder.exists() and not here:
        raise CheckpointError(f"{folder} exists and is no unfinished {what}. Delete it yourself.")


def check_same(folder: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that a folder's record holds.

    Raises:
        CheckpointError: the message says what differs.
    """
    before = load_json(folder / RECORD)
    differs = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differs:
        raise CheckpointError(
            f"{folder} cannot be resumed, what is measured differs: {'; '.join(differs)}. "
            "Give the same arguments, or start anew with --overwrite."
        )


class Partial:
    """Where a profile keeps its sums while it is measured.

    Args:
        folder: such as `P.partial` beside the output `P`; its parent is made.
        every: batches between two saves.
        resume: go on from what the folder holds.
        overwrite: forget what it holds.
        of: what else must be the same when a run goes on, such as the data's name and the batch size; plain JSON.

    Raises:
        InputError: `every` is below 1.
        CheckpointError: there is nothing to resume, or something that would be lost.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 16,
        resume: bool = False,
        overwrite: bool = False,
        of: dict[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise InputError(f"`every` is {every}, expected a number of batches, at least 1.")
        self.folder, self.every, self.of = Path(folder), every, dict(of or {})
        self.resume, self.done, self._digest, self._seen = resume, 0, b"", b""
        self._record: dict[str, Any] = {}
        check_unfinished(self.folder, "profile", resume=resume, overwrite=overwrite)

    def begin(self, of: dict[str, Any]) -> dict[str, Tensor] | None:
        """Start, or go on: returns the sums so far, None where there are none.

        Args:
            of: what is measured; must be the same as when the run began.

        Raises:
            CheckpointError: it is not, and the message says what differs; or the folder is damaged.
        """
        self._record = {"version": VERSION, **of, **self.of}
        if not self.resume:
            self.remove()
            return None
        check_same(self.folder, self._record)
        state = load_tensors(self.folder / SUMS)
        try:
            self.done = int(state.pop("batches"))
            self._digest = bytes(state.pop("digest").tolist())
        except KeyError as error:
            raise CheckpointError(f"{self.folder / SUMS} is damaged: it has no {error}.") from error
        return state

    def unmeasured(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Number and yield batches, without those whose sums are there; these are read and compared.

        Raises:
            CheckpointError: they are not the ones that were measured.
        """
        expected, seen = self._digest, 0
        for number, batch in enumerate(batches):
            self._seen, seen = digest(batch, self._seen), number + 1
            if seen == self.done and self._seen != expected:
                break
            if seen > self.done:
                yield number, batch
        if seen < self.done or (seen == self.done and self._seen != expected):
            raise CheckpointError(
                f"{self.folder} cannot be resumed: the first {self.done} batches of the data are not those that were "
                "measured. Give the same data, or start anew with --overwrite."
            )

    def save(self, number: int, state: Callable[[], dict[str, Tensor]]) -> None:
        """Keep the sums after a batch, if it is time to.

        Raises:
            CheckpointError: they cannot be written.
        """
        if (number + 1) % self.every:
            return
        place = {"batches": torch.tensor(number + 1), "digest": torch.tensor(list(self._seen), dtype=torch.uint8)}
        sums = {**state(), **place}
        if not self.folder.exists():
            with new_directory(self.folder) as folder:
                save_json(folder / RECORD, self._record)
                save_tensors(folder / SUMS, sums)
            return
        save_tensors(self.folder / SUMS, sums)

    def remove(self) -> None:
        """Delete the folder, once the profile itself is written."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def digest(tensors: dict[str, Tensor], before: bytes = b"") -> bytes:
    """A hash of tensors with their names, and of what came before them."""
    found = hashlib.sha256(before)
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
