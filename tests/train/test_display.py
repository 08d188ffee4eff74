"""What a training shows while it runs: how far it is, what it gets right, and what it executes."""

import re
from typing import Any

from transformers import TrainerControl, TrainerState

from skipit.train.config import TrainConfig
from skipit.train.display import console, progress, training_progress

LOGS = {"loss": 1.0, "ce": 0.1234, "kl": 0.0456, "accuracy": 0.875, "budget": 0.6, "target": 0.6, "compute": 0.614}
FIGURES = "CE 0.123  KL 0.046  accuracy 87.5%  compute 61.4% of 60%"


def test_in_a_file_one_line_when_it_is_done(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(console, "width", 200)
    state, control = TrainerState(global_step=20), TrainerControl()
    with training_progress(TrainConfig(steps=20, budget=0.6)) as callback:
        callback.on_train_begin(None, TrainerState(), control)
        callback.on_log(None, state, control, logs=LOGS)
        callback.on_step_end(None, state, control)
        callback.on_log(None, state, control, logs={"train_runtime": 3.0})  # has no figures and hides none
    said = capsys.readouterr().err
    assert said.startswith("train      20/20")
    assert said.rstrip().endswith(FIGURES)


def test_in_a_file_a_line_every_few_seconds(capsys: Any, monkeypatch: Any) -> None:
    """Whoever looks into the log of an hour's work sees how far it is."""
    monkeypatch.setattr("skipit.train.display.EVERY", 0.0)
    with progress("eval", 3) as advance:
        assert list(advance.over("ab")) == ["a", "b"]
    lines = re.findall(r"^(\w+) +(\d/\d)  \d+ s$", capsys.readouterr().err, re.MULTILINE)
    assert lines == [("eval", "1/3"), ("eval", "2/3"), ("eval", "2/3")]


def test_on_a_terminal_a_bar_with_the_last_figures(monkeypatch: Any) -> None:
    seen: list[str] = []
    monkeypatch.setattr("skipit.train.display._bar", lambda *_, **__: _Fake(seen))
    with training_progress(TrainConfig(steps=20)) as callback:
        callback.on_log(None, TrainerState(), TrainerControl(), logs=LOGS)
    assert seen == [FIGURES]


class _Fake:
    """A bar that writes down what it is told to show."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __enter__(self) -> Any:
        return self, 0

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, task: int, **shown: Any) -> None:
        if "figures" in shown:
            self.seen.append(shown["figures"])
