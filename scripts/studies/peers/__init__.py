"""Ours against what peers do, on our engine, at equal measured FLOPs: scripts/study peers.

Same base (the reference VLM, or the documents model by --model documents), rows, LoRA rank, steps, distillation and
executor for all; peers are re-implemented from their formulas, each kind beside a random control that spends as much.
A name with `+lora` is a fixed choice with LoRA trained around it. One with gates and a pruner, as `theory-evict+dart`,
is one budget over dropping tokens where the decoder begins and skipping layers, split where calibration rows say; its
cell has every split that was tried. A method that cannot spend as little as a budget says so, with what it spends at
least. One JSON file per method, budget and seed; finished ones are not measured again, so the sweep can be interrupted.
It ends in a Markdown table and figures of what was asked for: all untrained, all trained, each combination beside each
of its parts alone.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from skipit.eval.measure.latency import Subject, time_models
from skipit.eval.plots import plot_pareto
from skipit.router import running
from skipit.router.folders import provenance, save_json
from skipit.theory.plan import check_budget
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator
from skipit.train.trainer import TrainingError
from studies.answers import answers, right
from studies.study import REFERENCE, command, markdown, once

from .choices import OutOfReachError
from .lab import Lab, System, Systems
from .methods import METHODS, TRAINED, UNTRAINED

REPEATS = 15


def run_cell(name: str, lab: Lab, budget: float, latency: bool = False) -> dict[str, Any]:
    """Make one method ready at a budget and measure it on the test rows.

    Returns:
        Figures of every system that was made, one per random draw, or why there are none.
    """
    started, worked = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"method": name, "budget": budget, "seed": lab.seed}
    systems: Systems = {}
    try:
        systems = METHODS[name](lab, budget)
    except OutOfReachError as error:
        found["floor"] = error.floor
    except TrainingError as error:
        found["failed"] = str(error)
    made = time.perf_counter() - started
    found["dense"] = lab.dense_accuracy
    found["results"] = {label: [measure(system, lab) for system in draws] for label, draws in systems.items()}
    if latency:
        found["timed"] = True
        for label, draws in systems.items():
            if draws[0].timed:
                found["results"][label][0]["latency"] = clock(draws[0], lab)
    total, busy = time.perf_counter() - started, time.process_time() - worked
    found["seconds"] = {"ready": round(made, 1), "total": round(total, 1), "cpu": round(busy, 1)}
    print(_line(found), flush=True)
    return found


def measure(system: System, lab: Lab) -> dict[str, Any]:
    """On test rows: accuracy, the share answered as the dense model does, the executed share of FLOPs; and choices."""
    found = answers(system.model, lab.test, system.options)
    return {
        "accuracy": found.same(right(lab.test)),
        "same_answer": found.same(lab.wanted),
        "compute": found.share(system.costs),
        **({"chosen": dict(system.chosen)} if system.chosen else {}),
    }


def clock(system: System, lab: Lab) -> dict[str, Any]:
    """Milliseconds of a system and of the untouched dense model, in turn, on one row."""
    collate = Collator(lab.dense[1], with_completion=False)
    inputs = collate([lab.rows("test", 1)[0]])
    subjects = {
        "dense": Subject(lab.dense[0]),
        "this": Subject(system.model, lambda: running(**system.options({}))),
    }
    return {name: found.to_json() for name, found in time_models(subjects, inputs, repeats=REPEATS).items()}


def summary(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and random draws, one entry per system and budget: what the table and the figures show."""
    groups: dict[tuple[float, bool, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        for label, draws in (cell["results"] or {cell["method"]: [{}]}).items():
            keys = ("method", "seed", "dense", "floor", "failed")
            known = {key: cell.get(key) for key in keys}
            groups[(cell["budget"], cell["method"] in TRAINED, label)] += [{**known, **draw} for draw in draws]
    entries = []
    for (budget, trained, label), runs in sorted(groups.items(), key=lambda item: (-item[0][0], *item[0][1:])):
        measured = [run for run in runs if "accuracy" in run]
        entry: dict[str, Any] = {"system": label, "budget": budget, "trained": trained, "runs": len(measured)}
        entry["seeds"] = len({run["seed"] for run in measured})
        entry["floor"] = next((run["floor"] for run in runs if run["floor"] is not None), None)
        entry["failed"] = sum(run["failed"] is not None for run in runs)
        if measured:
            relative = [run["accuracy"] / run["dense"] for run in measured]
            entry |= {
                "accuracy": statistics.mean(relative),
                "spread": statistics.stdev(relative) if len(relative) > 1 else None,
            }
            entry |= {key: statistics.mean(run[key] for run in measured) for key in ("compute", "same_answer")}
            times = [run["latency"]["this"] for run in measured if "latency" in run]
            kept = [run["chosen"]["keep"] for run in measured if "keep" in run.get("chosen", {})]
            entry["keep"] = statistics.mean(kept) if kept else None
            for key in ("prefill_ms", "prefill_speed_up", "decode_speed_up"):
                entry[key] = statistics.mean(found[key] for found in times) if times else None
        entries.append(entry)
    return entries


def table(entries: Iterable[dict[str, Any]]) -> str:
    """The summary in Markdown; accuracy relative to dense, with its standard deviation over seeds and draws."""
    head = ["budget", "method", "tuned", "seeds", "runs", "FLOPs", "of dense accuracy", "same answer"]
    return markdown([*head, "prefill, ms (speed-up)"], map(_row, entries), text=(1, 2))


def _row(entry: dict[str, Any]) -> list[str]:
    stays = f", {entry['keep']:.0%} of image tokens stay" if entry.get("keep") is not None else ""
    start = [f"{entry['budget']:g}", entry["system"] + stays, "yes" if entry["trained"] else "", str(entry["seeds"])]
    if entry["runs"] == 0:
        why = "training failed" if entry["floor"] is None else f"cannot: spends {entry['floor']:.1%} at least"
        return [*start, "0", "", why, "", ""]
    return [
        *start,
        str(entry["runs"]) + (f", {entry['failed']} failed" if entry["failed"] else ""),
        f"{entry['compute']:.1%}",
        f"{entry['accuracy']:.1%}" + ("" if entry["spread"] is None else f" ± {entry['spread']:.1%}"),
        f"{entry['same_answer']:.1%}",
        f"{entry['prefill_ms']:.2f} ({entry['prefill_speed_up']:.2f}x)" if entry["prefill_ms"] else "",
    ]


def draw(entries: Sequence[dict[str, Any]], out: Path) -> None:
    """Accuracy against measured FLOPs: of what needs no training, of what was trained, of each combination."""
    measured = [entry for entry in entries if entry["runs"]]
    figures = {
        f"pareto_{name}": [entry for entry in measured if entry["trained"] == trained]
        for trained, name in ((False, "untrained"), (True, "trained"))
    }
    for name in {entry["system"] for entry in measured}:
        gates, _, pruner = name.partition("+")
        alone = {gates, pruner, f"{pruner}+lora"} & {entry["system"] for entry in measured}
        if {gates, pruner} <= alone:
            figures[f"frontier_{name}"] = [entry for entry in measured if entry["system"] in {name, *alone}]
    for name, chosen in figures.items():
        points = [(e["system"], e["compute"], e["accuracy"], e["spread"] or 0.0) for e in chosen]
        if points:
            plot_pareto(out / f"{name}.png", [("dense", 1.0, 1.0, 0.0), *points], "standard deviation")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table and the figures."""
    parser = command(
        __name__,
        __doc__,
        out=Path("runs/baselines"),
        budgets=[0.7, 0.5, 0.25],
        seeds=[0, 1, 2],
        steps=250,
        batch_size=16,
        lora_rank=8,
        learning_rate=TrainConfig.learning_rate,
        model=REFERENCE,
        samples=600,
        calibration=96,
        profiled=192,
    )
    groups = {"untrained": list(UNTRAINED), "trained": list(TRAINED), "all": list(METHODS)}
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        choices=[*groups, *METHODS],
        metavar="METHOD",
        help=f"untrained, trained, all (default), or some of {', '.join(METHODS)}",
    )
    parser.add_argument("--latency", action="store_true", help="time every system against the untouched model")
    given = parser.parse_args(argv)
    for budget in given.budgets:
        check_budget(budget)
    names = dict.fromkeys(name for asked in given.methods for name in groups.get(asked, [asked]))
    cells = []
    for seed in given.seeds:
        lab = Lab.of(given, seed)
        for name in names:
            for budget in [1.0] if name == "lora" else given.budgets:
                cells.append(
                    once(
                        given.out,
                        f"{name}_{budget:g}_{seed}",
                        {"method": name, "budget": budget, **lab.settings()},
                        partial(run_cell, name, lab, budget, given.latency),
                        needs=("timed",) if given.latency else (),
                    )
                )
    entries = summary(cells)
    save_json(given.out / "summary.json", {"entries": entries, "made_by": provenance()})
    (given.out / "table.md").write_text(table(entries) + "\n", encoding="utf-8")
    draw(entries, given.out)
    print(table(entries))


def _line(cell: dict[str, Any]) -> str:
    start = f"{cell['method']} {cell['budget']:g} seed {cell['seed']} ({cell['seconds']['total']:.0f} s):"
    if not cell["results"]:
        return f"{start} {cell.get('failed') or 'cannot spend less than ' + format(cell['floor'], '.1%')}"
    parts = []
    for label, draws in cell["results"].items():
        accuracy, compute = (statistics.mean(found[key] for found in draws) for key in ("accuracy", "compute"))
        parts.append(f"{label} {accuracy / cell['dense']:.1%} of dense at {compute:.1%} of FLOPs")
    return f"{start} {'; '.join(parts)}"
