"""Ours against what peers do, on our engine, at equal measured FLOPs: scripts/study peers.

Same base (the reference VLM), rows, LoRA rank, steps, distillation and executor for all; peers are re-implemented from
their formulas. One JSON file per method, budget and seed; cells that are there are not repeated, so the sweep can be
interrupted. It ends in a Markdown table and two figures. A name with `+lora` is a fixed mask with LoRA trained around
it. A method that cannot spend as little as a budget says so, with what it spends at least.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skipit.eval.measure.latency import Subject, time_models
from skipit.eval.plots import plot_pareto
from skipit.router import InputError, running
from skipit.router.folders import load_json, provenance, save_json
from skipit.theory.plan import check_budget
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_data
from skipit.train.display import quiet
from skipit.train.trainer import TrainingError

from .choices import OutOfReachError, answers, right, same_rows
from .methods import METHODS, TRAINED, UNTRAINED, Lab, System, Systems

SETTINGS = ("steps", "rows", "calibration", "profiled", "batch_size", "lora_rank", "learning_rate")
REPEATS = 15


def run_cell(name: str, lab: Lab, budget: float, latency: bool = False) -> dict[str, Any]:
    """Make one method ready at a budget and measure it on the test rows.

    Returns:
        What a cell's file holds: figures of every system that was made, one per random draw, or why there are none.
    """
    started, worked = time.perf_counter(), time.process_time()
    cell: dict[str, Any] = {"method": name, "budget": budget, "seed": lab.seed}
    cell |= {key: getattr(lab, key) for key in SETTINGS}
    systems: Systems = {}
    try:
        systems = METHODS[name](lab, budget)
    except OutOfReachError as error:
        cell["floor"] = error.floor
    except TrainingError as error:
        cell["failed"] = str(error)
    made = time.perf_counter() - started
    cell["dense"] = lab_accuracy(lab)
    cell["results"] = {label: [measure(system, lab) for system in draws] for label, draws in systems.items()}
    if latency:
        for label, draws in systems.items():
            if draws[0].timed:
                cell["results"][label][0]["latency"] = clock(draws[0], lab)
    total, busy = time.perf_counter() - started, time.process_time() - worked
    cell["seconds"] = {"ready": round(made, 1), "total": round(total, 1), "cpu": round(busy, 1)}
    return {**cell, "threads": torch.get_num_threads(), "made_by": provenance()}


def lab_accuracy(lab: Lab) -> float:
    """Share of test rows that the dense model answers right."""
    return float(same_rows(lab.wanted, right(lab.test)).double().mean())


def measure(system: System, lab: Lab) -> dict[str, Any]:
    """Accuracy, the share of rows answered as the dense model does, and the executed share of FLOPs, on test rows."""
    found = answers(system.model, lab.test, system.options)
    return {
        "accuracy": found.same(right(lab.test)),
        "same_answer": found.same(lab.wanted),
        "compute": found.share(system.costs),
    }


def clock(system: System, lab: Lab) -> dict[str, Any]:
    """Milliseconds of a system and of the untouched dense model, in turn, on one row."""
    collate = Collator(lab.dense[1], with_completion=False)
    inputs = collate([load_data("reference", "test", 1, lab.seed)[0]])
    subjects = {
        "dense": Subject(lab.dense[0]),
        "this": Subject(system.model, lambda: running(**system.options({}))),
    }
    return {name: found.to_json() for name, found in time_models(subjects, inputs, repeats=REPEATS).items()}


def cell_path(out: Path, name: str, budget: float, seed: int) -> Path:
    """Where a cell is kept."""
    return out / "cells" / f"{name}_{budget:g}_{seed}.json"


def finished(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a cell is there.

    Raises:
        InputError: it was made with other settings.
    """
    if not path.exists():
        return False
    cell = load_json(path)
    if changed := [
        f"`{key}` was {cell.get(key)}, now {value}" for key, value in settings.items() if cell.get(key) != value
    ]:
        raise InputError(f"{path}: made with other settings: {', '.join(changed)}. Choose another --out.")
    return True


def save_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write a cell beside its place and rename it: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_json(part, cell)
    os.replace(part, path)


def load_cells(out: Path) -> list[dict[str, Any]]:
    """All finished cells in a folder."""
    return [load_json(path) for path in sorted((out / "cells").glob("*.json"))]


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
            for key in ("prefill_ms", "prefill_speed_up", "decode_speed_up"):
                entry[key] = statistics.mean(found[key] for found in times) if times else None
        entries.append(entry)
    return entries


def table(entries: Iterable[dict[str, Any]]) -> str:
    """The summary in Markdown; accuracy relative to dense, with its standard deviation over seeds and draws."""
    lines = [
        "| budget | method | tuned | seeds | runs | FLOPs | of dense accuracy | same answer | prefill, ms (speed-up) |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        start = f"| {entry['budget']:g} | {entry['system']} | {'yes' if entry['trained'] else ''} | {entry['seeds']} "
        if entry["runs"] == 0:
            why = "training failed" if entry["floor"] is None else f"cannot: spends {entry['floor']:.1%} at least"
            lines.append(f"{start}| 0 | | {why} | | |")
            continue
        speed = f"{entry['prefill_ms']:.2f} ({entry['prefill_speed_up']:.2f}x)" if entry["prefill_ms"] else ""
        spread = "" if entry["spread"] is None else f" ± {entry['spread']:.1%}"
        failed = f", {entry['failed']} failed" if entry["failed"] else ""
        found = f"{entry['compute']:.1%} | {entry['accuracy']:.1%}{spread} | {entry['same_answer']:.1%}"
        lines.append(f"{start}| {entry['runs']}{failed} | {found} | {speed} |")
    return "\n".join(lines)


def draw(entries: Sequence[dict[str, Any]], out: Path) -> None:
    """Accuracy against measured FLOPs, of what needs no training and of what was trained."""
    for trained, name in ((False, "untrained"), (True, "trained")):
        points = [
            (entry["system"], entry["compute"], entry["accuracy"], entry["spread"] or 0.0)
            for entry in entries
            if entry["runs"] and entry["trained"] == trained
        ]
        if points:
            plot_pareto(out / f"pareto_{name}.png", [("dense", 1.0, 1.0, 0.0), *points], "standard deviation")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), help="folder (default %(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.25], help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default %(default)s)")
    groups = {"untrained": list(UNTRAINED), "trained": list(TRAINED), "all": list(METHODS)}
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        choices=[*groups, *METHODS],
        metavar="METHOD",
        help=f"untrained, trained, all (default), or some of {', '.join(METHODS)}",
    )
    parser.add_argument("--steps", type=int, default=250, help="of training (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step (default %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=8, help="of every trained method (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of LoRA (default %(default)s)")
    parser.add_argument("--rows", type=int, default=600, help="held-out rows (default %(default)s)")
    parser.add_argument(
        "--calibration", type=int, default=96, help="rows on which budgets are met (default %(default)s)"
    )
    parser.add_argument("--latency", action="store_true", help="time every system against the untouched model")
    arguments = parser.parse_args(argv)
    quiet()
    for budget in arguments.budgets:
        check_budget(budget)
    names = list(dict.fromkeys(name for asked in arguments.methods for name in groups.get(asked, [asked])))
    for seed in arguments.seeds:
        lab = Lab(
            seed,
            arguments.steps,
            arguments.rows,
            arguments.calibration,
            batch_size=arguments.batch_size,
            lora_rank=arguments.lora_rank,
            learning_rate=arguments.learning_rate,
        )
        for name in names:
            for budget in [1.0] if name == "lora" else arguments.budgets:
                path = cell_path(arguments.out, name, budget, seed)
                if not finished(path, {key: getattr(lab, key) for key in SETTINGS}):
                    save_cell(path, cell := run_cell(name, lab, budget, arguments.latency))
                    print(_line(cell), flush=True)
    entries = summary(load_cells(arguments.out))
    save_json(arguments.out / "summary.json", {"entries": entries, "made_by": provenance()})
    (arguments.out / "table.md").write_text(table(entries) + "\n", encoding="utf-8")
    draw(entries, arguments.out)
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


if __name__ == "__main__":
    main()
