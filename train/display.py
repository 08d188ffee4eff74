"""What the command line shows: progress on standard error, and nothing that other libraries have to say.

On a terminal these are bars; in a file or a pipe, a line every few seconds, and one per step when it is done.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

console = Console(stderr=True)
EVERY = 10.0  # seconds between lines


class Advance:
    """Moves a progress bar: call it with the number of items done, or iterate `over` items."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def __call__(self, items: int) -> None:
        """Count items as done."""
        self._bar.advance(self._task, items)

    def over(self, items: Any) -> Iterator[Any]:
        """Yield items, counting each as done when the next is asked for."""
        for item in items:
            yield item
            self(1)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A spinner while something without a known length happens."""
    with console.status(what):
        yield


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A progress bar of `total` items."""
    with _bar(what, total) as (bar, task):
        yield Advance(bar, task)


def on_one_process(number: int) -> None:
    """Of several processes, only the first shows anything."""
    console.quiet = number > 0


def note(text: str) -> None:
    """Say something on standard error, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TrainingBar(ProgressCallback):
    def __init__(self, bar: Progress, task: Any, counted: str) -> None:
        super().__init__()
        self._bar, self._task, self._counted = bar, task, counted

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    on_train_begin = on_step_end  # a run that goes on begins at its step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "compute" in logs:
            figures = (
                f"CE {logs['ce']:.3f}  KL {logs['kl']:.3f}  accuracy {logs['accuracy']:.1%}  "
                f"{self._counted} {logs['compute']:.1%} of {logs['target']:.0%}"
            )
            self._bar.update(self._task, figures=figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.update(self._task, description="calibrate")


@contextmanager
def training_progress(config: Any) -> Iterator[ProgressCallback]:
    """A trainer callback that shows steps, losses and the compute or time spent beside its budget."""
    budget = next(iter(config.points.values()))
    with _bar("train", config.steps, figures=f"budget {budget:.0%} of {config.counted}") as (bar, task):
        yield _TrainingBar(bar, task, config.counted)


@contextmanager
def _bar(what: str, total: int, figures: str = "") -> Iterator[tuple[Progress, Any]]:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with (Progress if console.is_terminal else _Lines)(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, figures=figures)
        yield bar, task
    if isinstance(bar, _Lines):
        bar.say(what)


class _Lines(Progress):
    """A bar for a file or a pipe."""

    def __init__(self, *columns: Any, console: Console) -> None:
        super().__init__(*columns, console=console, disable=True)
        self._started = self._said = time.perf_counter()

    def advance(self, task_id: Any, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say_sometimes()

    def update(self, task_id: Any, **shown: Any) -> None:
        super().update(task_id, **shown)
        self._say_sometimes()

    def _say_sometimes(self) -> None:
        if time.perf_counter() - self._said >= EVERY:
            self.say(self.tasks[0].description)

    def say(self, what: str) -> None:
        """How far the one task is, in a line."""
        done, self._said = self.tasks[0], time.perf_counter()
        line = f"{what:<10} {done.completed:.0f}/{done.total:.0f}  {self._said - self._started:.0f} s"
        console.print(f"{line}  {done.fields['figures']}".rstrip(), markup=False, highlight=False, soft_wrap=True)


def quiet() -> ExitStack:
    """Keep other libraries from writing to the terminal, from now on; closing what is returned undoes it.

    Errors still come through, and so do the bars of downloads.
    """
    undo = ExitStack()
    undo.enter_context(warnings.catch_warnings())
    # peft asks transformers for an attribute that will be renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    undo.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
    transformers_logging.set_verbosity_error()
    downloads = not are_progress_bars_disabled()
    if transformers_logging.is_progress_bar_enabled():
        undo.callback(transformers_logging.enable_progress_bar)
    transformers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # the line before the last has switched these off too
    # Says at import which accelerator it found.
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.addFilter(_errors_only)
    undo.callback(deepspeed.removeFilter, _errors_only)
    return undo


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
