"""Does the theory's initialization help? Accuracy at equal steps, seeds and executed FLOPs: scripts/study ablation.

Gates are initialized in four ways and trained alike. After 0, 50, 200 and all steps the threshold is calibrated on
held-out rows so that gathered execution spends exactly the budget, and accuracy is measured there. One JSON file per
run; finished ones are not measured again, so the sweep can be interrupted.
"""

import statistics
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipit.router import Gated
from skipit.router.config import KVPolicy
from skipit.theory.calibrate import calibrate
from skipit.theory.measuring import evaluating
from skipit.theory.plan import Init
from skipit.train.config import TrainConfig

from .answers import always, answers, right
from .study import Study, command, once

MILESTONES = (0, 50, 200)
# Unless told otherwise.
SIZES: dict[str, Any] = {
    "budgets": [0.5, 0.25, 0.15],
    "seeds": [0, 1, 2],
    "steps": TrainConfig.steps,
    "learning_rate": TrainConfig.learning_rate,
    "samples": 480,
    "calibration": 96,
    "profiled": 192,
}


class _Measure(TrainerCallback):
    """Calibrates and measures at given steps, without touching the training."""

    def __init__(self, study: Study, budget: float, kv: KVPolicy, steps: Collection[int]) -> None:
        self.study, self.budget, self.kv, self.steps = study, budget, kv, {*steps, study.steps}
        self.found: dict[str, dict[str, float]] = {}

    def measure(self, model: nn.Module, step: int) -> None:
        if step not in self.steps:
            return
        with evaluating(model):
            threshold, share = calibrate(model, self.study.held_out, self.study.costs, self.budget, self.kv)
            found = answers(model, self.study.test, always({"policy": Gated(threshold), "kv": self.kv}))
        accuracy = found.same(right(self.study.test))
        self.found[str(step)] = {"accuracy": accuracy, "share": share, "threshold": threshold}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.measure(model, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.measure(model, state.global_step)


def one_run(
    study: Study, init: Init, budget: float, kv: KVPolicy, milestones: Collection[int] = MILESTONES
) -> dict[str, Any]:
    """Train once from an initialization; accuracy and measured compute at each milestone and at the end, by step."""
    callback = _Measure(study, budget, kv, milestones)
    with tempfile.TemporaryDirectory() as folder:
        study.trained(study.config(budget, kv), Path(folder) / "run", init, calibrated=False, callbacks=[callback])
    return {"dense": study.dense_accuracy, "at": callback.found}


def table(cells: Sequence[dict[str, Any]], by: str = "init") -> str:
    """Mean accuracy relative to dense, with the spread over seeds, per budget, what is compared, and milestone."""
    steps = sorted({int(step) for cell in cells for step in cell["at"]})
    out = [f"{'budget':>8} {by:12} {'seeds':>5} " + " ".join(f"{f'{step} steps':>16}" for step in steps)]
    keys = sorted({(cell["budget"], cell[by]) for cell in cells}, reverse=True)
    for budget, value in keys:
        chosen = [cell for cell in cells if (cell["budget"], cell[by]) == (budget, value)]
        columns = []
        for step in steps:
            values = [cell["at"][str(step)]["accuracy"] / cell["dense"] for cell in chosen if str(step) in cell["at"]]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            columns.append(f"{statistics.mean(values):9.1%} ±{spread:5.1%}" if values else " " * 16)
        out.append(f"{budget:>8g} {value:12} {len(chosen):>5} " + " ".join(columns))
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table."""
    parser = command(__name__, __doc__, out=Path("runs/ablation"), **SIZES)
    parser.add_argument("--inits", nargs="+", choices=get_args(Init), default=list(get_args(Init)))
    parser.add_argument("--kv", choices=get_args(KVPolicy), default="retain")
    given = parser.parse_args(argv)
    cells = []
    for seed in given.seeds:
        study = Study.of(given, seed)
        for budget, init in product(given.budgets, given.inits):
            settings = {"init": init, "budget": budget, "kv": given.kv, **study.settings()}
            name = f"{init}_{given.kv}_{budget:g}_{seed}"
            cells.append(once(given.out, name, settings, partial(one_run, study, init, budget, given.kv)))
    print(table(cells))
