"""Does the skippable set stay where it is while a model is fine-tuned? Profiled on the way: scripts/study stability.

The model is trained at a budget. Every few steps it is profiled on the same calibration rows with the same
draws, and the set that a static plan would skip, and the damages it is made from, are compared with those at the start.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipit.eval.statistics import spearman
from skipit.router import MODALITIES, find_router
from skipit.router.config import KVPolicy
from skipit.router.errors import InputError, SkipItError
from skipit.theory.plan import check_budget, skip_set
from skipit.theory.profile import Profile, profile
from skipit.train.config import TrainConfig

from .study import REFERENCE, Study, command, markdown, once

FILE = "stability.jsonl"


class Stability(TrainerCallback):
    """Profiles the model before training and every few steps, always on the same batches and with the same draws.

    Gates are ignored and nothing is skipped while it measures, so it shows the model and not the router. What differs
    between two measurements is the model alone: sampling noise is common to all.

    Args:
        batches: a few, with labels; kept in memory.
        out: folder that `stability.jsonl` is written into, such as the run's.
        every: steps between two measurements.
        budget: share of the dense FLOPs for which units are skipped, in (0, 1].
        kv: K/V policy of the skips.
        draws: of the profile.

    Raises:
        InputError: no batch, or `every` below 1.
    """

    def __init__(
        self,
        batches: Sequence[dict[str, Tensor]],
        out: str | Path,
        every: int,
        budget: float = 0.5,
        kv: KVPolicy = "retain",
        draws: int = 2,
    ) -> None:
        if not batches or every < 1:
            raise InputError(
                f"`batches` has {len(batches)} batches and `every` is {every}; expected at least 1 of each."
            )
        self.batches, self.path, self.every = list(batches), Path(out) / FILE, every
        self.budget, self.kv, self.draws = check_budget(budget), kv, draws
        self.start: Profile | None = None
        self.history: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the model that training starts from; after a resume, the step resumed from."""
        self._measure(model, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure every few steps."""
        if state.global_step % self.every == 0:
            self._measure(model, state)

    def _measure(self, model: nn.Module, state: TrainerState) -> None:
        found = profile(_without_wrappers(model), self.batches, draws=self.draws)
        self.start = self.start or found
        record = {"step": state.global_step, **drift(self.start, found, self.budget, self.kv)}
        self.history.append(record)
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def drift(start: Profile, now: Profile, budget: float, kv: KVPolicy = "retain") -> dict[str, Any]:
    """How far the skippable set has moved.

    Returns:
        `jaccard` of the two sets of skipped units (1 if both are empty), `skipped` now, `entered` and `left` as lists
        of [layer, modality], and the Spearman correlation of the damages, of `text`, `vision` and all units, None where
        it does not exist.
    """
    before, after = ~skip_set(start, budget, kv), ~skip_set(now, budget, kv)
    union = int((before | after).sum())
    old, new = start.damage[kv].unit, now.damage[kv].unit
    columns = {"all": (old, new)} | {name: (old[:, m], new[:, m]) for m, name in enumerate(MODALITIES)}
    return {
        "jaccard": int((before & after).sum()) / union if union else 1.0,
        "skipped": int(after.sum()),
        "entered": (after & ~before).nonzero().tolist(),
        "left": (before & ~after).nonzero().tolist(),
        **{f"spearman_{name}": _spearman(*pair) for name, pair in columns.items()},
    }


def _spearman(x: Tensor, y: Tensor) -> float | None:
    value = spearman(x.double().numpy(), y.double().numpy())
    return None if math.isnan(value) else value


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The transformers model inside what PEFT put around it, whose decoder can be found."""
    try:
        return find_router(model)[0]
    except SkipItError:
        inner = getattr(model, "get_base_model", None)
        return inner() if inner is not None else model


def one_run(study: Study, budget: float, every: int) -> dict[str, Any]:
    """Train once; how the set had moved at every step that was profiled."""
    with tempfile.TemporaryDirectory() as folder:
        follow = Stability(study.held_out, folder, every, budget)
        study.trained(study.config(budget), Path(folder) / "run", calibrated=False, callbacks=[follow])
    return {"units": 2 * len(study.costs.layers), "history": follow.history}


def table(cell: dict[str, Any]) -> str:
    """In Markdown, without the start, which is 1 everywhere."""
    figures = ("jaccard", "spearman_text", "spearman_vision", "spearman_all")
    rows = [
        [
            str(row["step"]),
            f"{row['skipped']} of {cell['units']}",
            *("-" if row[name] is None else f"{row[name]:.2f}" for name in figures),
        ]
        for row in cell["history"]
        if row["step"]
    ]
    return markdown(
        ["step", "skipped units", "Jaccard with step 0", "Spearman of damages: text", "vision", "all"], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print a table for each seed."""
    parser = command(
        __name__,
        __doc__,
        out=Path("runs/stability"),
        budget=0.5,
        seeds=[0],
        steps=100,
        batch_size=16,
        learning_rate=TrainConfig.learning_rate,
        calibration=48,
        profiled=192,
        model=REFERENCE,
    )
    parser.add_argument("--every", type=int, default=25, help="steps between profiles (default %(default)s)")
    given = parser.parse_args(argv)
    for seed in given.seeds:
        study = Study.of(given, seed)
        settings = {"budget": given.budget, "every": given.every, **study.settings()}
        cell = once(given.out, f"{given.budget:g}_{seed}", settings, partial(one_run, study, given.budget, given.every))
        print(f"seed {seed}:\n{table(cell)}")
