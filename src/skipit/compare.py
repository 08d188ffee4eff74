"""A dense model and gated ones on the same rows: accuracy, executed FLOPs, milliseconds, agreement with the theory."""

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from skipit.eval.latency import Latency, Subject, time_models
from skipit.eval.metrics import agreement
from skipit.eval.runner import Outcome, run_dataset
from skipit.eval.tracking import Tracking, track
from skipit.router import find_router
from skipit.theory.cost import CostModel
from skipit.theory.plan import skip_set
from skipit.theory.profile import Profile
from skipit.train.collate import Collator


@dataclass(frozen=True)
class Comparison:
    """Figures by model name; "dense" is the untouched model.

    Attributes:
        outcomes: answers, accuracy and executed FLOPs.
        latency: of one row.
        same_answer: share of rows answered as the dense model does.
        tracking: of the skips against the theory; empty without a profile.
    """

    outcomes: dict[str, Outcome]
    latency: dict[str, Latency]
    same_answer: dict[str, float]
    tracking: dict[str, Tracking]

    def to_json(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {
            name: {
                **outcome.to_json(),
                "same_answer": self.same_answer[name],
                "latency": self.latency[name].to_json(),
                "tracking": self.tracking[name].to_json() if name in self.tracking else None,
            }
            for name, outcome in self.outcomes.items()
        }

    def table(self) -> str:
        """The figures as a text table, one column per model."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="held-out rows", title_justify="left")
        table.add_column("")
        for name in self.outcomes:
            table.add_column(name, justify="right")
        for label, values in self._lines():
            table.add_row(label, *values)
        console = Console(file=io.StringIO(), width=100)
        console.print(table)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    def _lines(self) -> list[tuple[str, list[str]]]:
        outcomes = list(self.outcomes.values())
        lines = [("accuracy", [f"{o.accuracy:.1%}" for o in outcomes])]
        lines += [(f"  {kind}", [f"{o.by_kind[kind]:.1%}" for o in outcomes]) for kind in outcomes[0].by_kind]
        lines.append(("same answer as dense", [f"{self.same_answer[name]:.1%}" for name in self.outcomes]))
        lines.append(("decoder FLOPs executed", [f"{o.compute:.1%}" for o in outcomes]))
        for part in ("prefill", "decode"):
            times = [self.latency[name] for name in self.outcomes]
            cells = [f"{getattr(t, f'{part}_ms'):.2f} ({getattr(t, f'{part}_speed_up'):.2f}x)" for t in times]
            lines.append((f"{part}, ms (speed-up)", cells))
        if self.tracking:
            first = next(iter(self.tracking.values()))
            for table in first.tables:
                values = [
                    f"{self.tracking[name].tables[table]['all'].spearman.value:+.2f}" if name in self.tracking else "-"
                    for name in self.outcomes
                ]
                lines.append((f"rank corr., skips and {table}", values))
        return lines


def compare(
    dense: Any,
    gated: Mapping[str, Any],
    processor: Any,
    rows: Any,
    profile: Profile | None,
    *,
    batch_size: int = 32,
    repeats: int = 15,
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Comparison:
    """Answer the same rows with an untouched dense model and with gated ones.

    Args:
        dense: without gates.
        gated: models with gates by name.
        processor: of all of them.
        rows: in the conversational vision format, with `answer` and optionally `kind`.
        profile: of the dense model; its tables are compared with the learned skips.
        batch_size: rows per call of `generate`.
        repeats: of the timing.
        contexts: what a gated model runs in, such as `lambda: running(budget=0.5)`.
        progress: called with the number of rows of each finished batch.
    """
    collate = Collator(processor, with_completion=False)
    costs = CostModel.of(dense)
    contexts = contexts or {}
    outcomes = {"dense": run_dataset(dense, processor, rows, collate, costs, "retain", batch_size=batch_size, progress=progress)}
    subjects = {"dense": Subject(dense)}
    tracking = {}
    for name, model in gated.items():
        kv = find_router(model)[1].config.kv
        subjects[name] = Subject(model, contexts[name]) if name in contexts else Subject(model)
        with subjects[name].context():
            outcomes[name] = run_dataset(
                model, processor, rows, collate, costs, kv, batch_size=batch_size, progress=progress
            )
        if profile is not None:
            tracking[name] = track(outcomes[name].skip_rate.numpy(), theory_tables(profile, kv), _theory_skips(profile, outcomes[name], kv))
    latency = time_models(subjects, collate([rows[0]]), repeats=repeats)
    same = {name: agreement(outcomes["dense"].answers, outcome.answers) for name, outcome in outcomes.items()}
    return Comparison(outcomes, latency, same, tracking)


def theory_tables(profile: Profile, kv: str) -> dict[str, Any]:
    """The profile's tables that predict skips, small where redundant; cross-attention belongs to vision units."""
    tables = profile.tables
    var = tables["var_text"][:, None].expand(-1, 2).clone()
    var[:, 0] = float("nan")  # the notion is about vision keys
    return {
        "damage": tables[f"damage_{kv}"].numpy(),
        "geometric": tables["geometric"].numpy(),
        "cross-attention": var.numpy(),
    }


def _theory_skips(profile: Profile, outcome: Outcome, kv: Any) -> Any:
    return (~skip_set(profile, min(1.0, max(outcome.compute, 1e-3)), kv)).numpy()
