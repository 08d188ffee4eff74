"""A dense model and gated ones on the same rows: accuracy, executed FLOPs, milliseconds, agreement with the theory."""

import io
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from skipit.eval.claims.tracking import Tracking, track
from skipit.eval.measure.latency import COMPILED, Latency, Subject, compiled_subject, time_models
from skipit.eval.measure.recorded import Kinds
from skipit.eval.measure.runner import Outcome, run_dataset
from skipit.eval.metrics import agreement
from skipit.eval.metrics.vqa import Metric
from skipit.router import find_router
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel
from skipit.theory.inputs import to_model
from skipit.theory.plan import skip_set
from skipit.theory.profile import Profile
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Rows
from skipit.train.data.used import HeldOut


@dataclass(frozen=True)
class Comparison:
    """Figures by model name; "dense" is the untouched model.

    Attributes:
        outcomes: answers, accuracy and executed FLOPs.
        latency: of one row.
        same_answer: share of rows answered as the dense model does.
        tracking: of the skips against the theory; empty without a profile.
        held_out: whether the rows are, as far as is known; None where nobody asked.
        compiled: latency of the dense model, its decoder compiled; or why it could not be; None where nobody asked.
    """

    outcomes: dict[str, Outcome]
    latency: dict[str, Latency]
    same_answer: dict[str, float]
    tracking: dict[str, Tracking]
    held_out: HeldOut | None = None
    compiled: Latency | str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the answers."""
        found = {
            name: {
                **outcome.to_json(),
                "same_answer": self.same_answer[name],
                "latency": self.latency[name].to_json(),
                "tracking": self.tracking[name].to_json() if name in self.tracking else None,
            }
            for name, outcome in self.outcomes.items()
        }
        found["dense"]["compiled"] = self.compiled.to_json() if isinstance(self.compiled, Latency) else self.compiled
        return found

    def table(self) -> str:
        """The figures as a text table, one column per model, with what they mean below."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        rows = len(next(iter(self.outcomes.values())).answers)
        title = f"{rows} held-out rows" if self.held_out and self.held_out.known else f"{rows} rows"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in self.outcomes:
            table.add_column(escape(name), justify="right")
        for label, values in self._figures():
            table.add_row(escape(label), *values)
        if self.tracking:
            table.add_section()
            for label, values in self._agreement():
                table.add_row(label, *values)
        text = io.StringIO()
        Console(file=text, width=max(100, 40 + 16 * len(self.outcomes))).print(table)
        drawn = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
        return "\n".join([drawn, *self._notes()])

    def _figures(self) -> list[tuple[str, list[str]]]:
        outcomes = list(self.outcomes.values())
        lines = [("accuracy", [f"{o.accuracy:.1%}" for o in outcomes])]
        if len(outcomes[0].by_kind) > 1:
            lines += [(f"  {kind}", [f"{o.by_kind[kind]:.1%}" for o in outcomes]) for kind in outcomes[0].by_kind]
        lines.append(("same answer as dense", [f"{self.same_answer[name]:.1%}" for name in self.outcomes]))
        lines.append(("decoder FLOPs executed", [f"{o.compute:.1%}" for o in outcomes]))
        times = [self.latency[name] for name in self.outcomes]
        lines.append(("prefill, ms (speed-up)", [f"{t.prefill_ms:.2f} ({t.prefill_speed_up:.2f}x)" for t in times]))
        if isinstance(best := self.compiled, Latency):
            over = [f"{t.prefill_speed_up / best.prefill_speed_up:.2f}x" for t in times]
            lines.append((f"  over dense compiled, {best.prefill_ms:.2f} ms", over))
        lines.append(("decode step, ms (speed-up)", [f"{t.decode_ms:.2f} ({t.decode_speed_up:.2f}x)" for t in times]))
        if isinstance(best, Latency):
            over = [f"{t.decode_speed_up / best.decode_speed_up:.2f}x" for t in times]
            lines.append((f"  over dense compiled, {best.decode_ms:.2f} ms", over))
        lines.append(("  ideal speed-up", [f"{t.decode_ideal:.2f}x" for t in times]))
        return lines

    def _agreement(self) -> list[tuple[str, list[str]]]:
        def line(label: str, cell: Callable[[Tracking], str]) -> tuple[str, list[str]]:
            return label, [cell(self.tracking[name]) if name in self.tracking else "" for name in self.outcomes]

        def correlation(table: str) -> Callable[[Tracking], str]:
            return lambda tracking: _number(tracking.tables[table]["all"].spearman.value, "+.2f")

        def p_values(tracking: Tracking) -> str:
            estimate = tracking.tables["damage"]["all"].spearman
            return ", ".join("<0.001" if p < 0.001 else _number(p, ".3f") for p in (estimate.p, estimate.p_shift))

        return [
            line("rank corr. of skips and damage", correlation("damage")),
            line("  p, p_shift", p_values),
            line("  with geometric redundancy", correlation("geometric")),
            line("  with cross-attention", correlation("cross-attention")),
            line("  AUROC of theory's skip set", lambda t: _number(t.theory_set["all"].value, ".2f")),
        ]

    def _notes(self) -> list[str]:
        repeats = next(iter(self.latency.values())).repeats
        notes = [] if self.held_out is None else [f"{self.held_out.sentence().capitalize()}."]
        first = next(iter(self.outcomes.values()))
        notes += [f"Accuracy: {first.scored_by}."] if first.scored_by != "exact match" else []
        notes += [f"ms: medians of {repeats} interleaved repeats of one row. Speed-up: over dense, pair by pair."]
        if self.compiled is None:
            notes += ["Dense is as transformers runs it; `skipit eval` compares with it compiled (torch.compile), too."]
        elif isinstance(self.compiled, str):
            notes += [f"Not compared with the dense model compiled: {self.compiled}"]
        notes += ["Ideal: the decoder's layers over those that a decoding step of this row enters."]
        if self.tracking:
            notes += [
                "Rank corr.: Spearman over (layer, modality) units; negative: redundant units are skipped more.",
                "p: against random orders of units; p_shift: against shifts along depth, which keep neighbours.",
                "AUROC: do the most skipped units separate the theory's skip set at equal FLOPs? 0.5 is chance.",
            ]
        return notes


def _number(value: float, style: str) -> str:
    return "undefined" if math.isnan(value) else format(value, style)


def compare(
    dense: Any,
    gated: Mapping[str, Any],
    processor: Any,
    rows: Any,
    profile: Profile | None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    metric: Metric = "usual",
    repeats: int = 15,
    compile_dense: bool = False,
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    kinds: Kinds | None = None,
    keep: Callable[[str, Callable[[], Outcome]], Outcome] = lambda name, answer: answer(),
    progress: Callable[[int], None] = lambda rows: None,
    held_out: HeldOut | None = None,
) -> Comparison:
    """Answer the same rows with an untouched dense model and with gated ones.

    Args:
        dense: without gates.
        gated: models with gates by name.
        processor: of all of them.
        rows: in the conversational vision format; optionally with `answer`, instead of the completion, and `kind`.
        profile: of the dense model; its tables are compared with the learned skips.
        batch_size: rows per call of `generate`.
        max_new_tokens: longest answer.
        metric: by which answers are scored.
        repeats: of the timing.
        compile_dense: time the dense model compiled, too, which takes minutes.
        contexts: what a gated model runs in, such as `lambda: running(budget=0.5)`.
        kinds: of tokens that are recorded of gated models, for `measure_spending`.
        keep: gives a model's answers by its name, from where they are kept or by asking it.
        progress: called with the number of rows of each finished batch.
        held_out: what is known of the rows.

    Raises:
        InputError: a row cannot be read or has neither an answer nor a completion; the message names it.
    """
    rows = Rows(rows)
    collate = Collator(processor, with_completion=False)
    costs = CostModel.of(dense)
    contexts = contexts or {}
    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "metric": metric}
    ask: Callable[..., Outcome] = partial(
        run_dataset, processor=processor, rows=rows, collate=collate, costs=costs, **how
    )
    outcomes = {"dense": keep("dense", lambda: ask(dense, kv="retain", progress=progress))}
    subjects = {"dense": Subject(dense)}
    tracking = {}
    for name, model in gated.items():
        kv = find_router(model)[1].config.kv
        subjects[name] = Subject(model, contexts[name]) if name in contexts else Subject(model)
        with subjects[name].context():
            outcomes[name] = keep(name, partial(ask, model, kv=kv, kinds=kinds, progress=progress))
        if profile is not None:
            skip_rate = outcomes[name].skip_rate.numpy()
            tracking[name] = track(skip_rate, theory_tables(profile, kv), theory_skips(profile, outcomes[name], kv))
    first = to_model(collate([rows[0]]), dense)
    fast = compiled_subject(dense, first) if compile_dense else None
    latency = time_models(subjects | ({COMPILED: fast} if isinstance(fast, Subject) else {}), first, repeats=repeats)
    same = {name: agreement(outcomes["dense"].answers, outcome.answers) for name, outcome in outcomes.items()}
    best = latency.pop(COMPILED) if isinstance(fast, Subject) else fast
    return Comparison(outcomes, latency, same, tracking, held_out, best)


def theory_tables(profile: Profile, kv: KVPolicy) -> dict[str, Any]:
    """The profile's tables that predict skips, small where redundant; cross-attention belongs to vision units."""
    var = profile.var_text[:, None].expand(-1, 2).clone()
    var[:, 0] = float("nan")  # the notion is about vision keys
    return {
        "damage": profile.damage[kv].unit.numpy(),
        "geometric": profile.geometric.numpy(),
        "cross-attention": var.numpy(),
    }


def theory_skips(profile: Profile, outcome: Outcome, kv: Any) -> Any:
    """The units that the theory would skip to spend what a model spent, bool [layers, modalities]."""
    return (~skip_set(profile, min(1.0, max(outcome.compute, 1e-3)), kv)).numpy()
