"""Does the skippable set stay where it is while a model is fine-tuned? A trainer callback that profiles as it goes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipit.router import MODALITIES, find_router
from skipit.router.config import KVPolicy
from skipit.router.errors import InputError, SkipItError
from skipit.theory.plan import check_budget, skip_set
from skipit.theory.profile import Profile, profile

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
    there = x.isfinite() & y.isfinite()
    a, b = x[there], y[there]
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The transformers model inside what PEFT put around it, whose decoder can be found."""
    try:
        return find_router(model)[0]
    except SkipItError:
        inner = getattr(model, "get_base_model", None)
        return inner() if inner is not None else model


__all__ = ["FILE", "Stability", "drift"]
