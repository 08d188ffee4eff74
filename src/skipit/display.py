"""Progress on a terminal; nothing when the output is not one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

console = Console(stderr=True)


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
    with Progress(
        TextColumn(f"{what:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    ) as bar:
        yield Advance(bar, bar.add_task(what, total=total))


class _TrainingBar(TrainerCallback):
    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "compute" in logs:
            figures = f"CE {logs['ce']:.3f}  KL {logs['kl']:.3f}  compute {logs['compute']:.1%}"
            self._bar.update(self._task, completed=state.global_step, figures=figures)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.update(self._task, completed=state.global_step)


@contextmanager
def training_progress(config: Any) -> Iterator[TrainerCallback]:
    """A trainer callback that shows steps, losses and the compute executed beside its budget."""
    with Progress(
        TextColumn("train     "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    ) as bar:
        task = bar.add_task("train", total=config.steps, figures=f"budget {config.budget:.0%}")
        yield _TrainingBar(bar, task)
