"""Does a run spend the budget it was asked for? Measured on rows that nothing has seen: scripts/study budget.

Every cell (budget, K/V policy, granularity, seed) is one short training of the reference model. Its threshold is
found on calibration rows as `skipit train` finds it; then the share of FLOPs that gathered execution spends is
measured on test rows, whose digits are other scans. A cell is one JSON file in the output folder, a finished one is
not measured again, and the profile of a seed is kept there too: what is interrupted goes on.
"""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from skipit.router import find_router
from skipit.router.config import Granularity, KVPolicy
from skipit.router.folders import load_json
from skipit.theory.calibrate import measured_share
from skipit.train.config import TrainConfig
from skipit.train.run_folder import RUN_FILE

from .study import Study, command, markdown, once

AIM = 0.01
LATE = 10  # steps at the end of a training, whose mean share says where training itself has come to


def one_cell(study: Study, config: TrainConfig) -> dict[str, Any]:
    """Train once; the shares of dense FLOPs at the end of training, on calibration rows and on test rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        model, _ = study.trained(config, run)
        history = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
        calibrated = load_json(run / RUN_FILE)["calibrated_share"]
    threshold = find_router(model)[1].config.threshold
    unseen = study.read("test", study.samples, config.batch_size)
    return {
        "training": mean(figures["compute"] for figures in history[-LATE:]),
        "threshold": threshold,
        "calibrated": calibrated,
        "measured": measured_share(model, unseen, study.costs, config.kv, threshold),
        "config": config.to_dict(),
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """In Markdown: the measured share of each seed, and in points the largest distance from the budget."""
    rows = []
    for kv, granularity, budget in dict.fromkeys((c["kv"], c["granularity"], c["budget"]) for c in cells):
        same = [c for c in cells if (c["kv"], c["granularity"], c["budget"]) == (kv, granularity, budget)]
        shares = ", ".join(f"{c['measured']:.2%}" for c in sorted(same, key=lambda c: c["seed"]))
        off = 100 * max(abs(c["measured"] - budget) for c in same)
        rows.append([kv, granularity, f"{budget:.0%}", shares, f"{off:.2f}"])
    head = ["keys and values", "who decides", "budget", "measured on test rows", "off by at most, points"]
    return markdown(head, rows, text=(0, 1))


def summary(cells: Sequence[dict[str, Any]]) -> str:
    """How many cells are within the aim, and how far off the worst is, in one line."""
    off = [abs(c["measured"] - c["budget"]) for c in cells]
    held = [abs(c["calibrated"] - c["budget"]) for c in cells]
    within = sum(distance <= AIM for distance in off)
    return (
        f"{within} of {len(cells)} runs are within {100 * AIM:g} point of their budget on test rows; off by "
        f"{100 * mean(off):.2f} points on average, {100 * max(off):.2f} at most ({100 * max(held):.2f} on calibration "
        "rows)."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table."""
    parser = command(
        __name__,
        __doc__,
        out=Path("runs/budget"),
        budgets=[0.3, 0.5, 0.7, 0.9],
        seeds=[0, 1, 2],
        steps=40,
        batch_size=8,
        profiled=96,
        calibration=192,
        samples=384,
    )
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=list(get_args(KVPolicy)))
    parser.add_argument("--granularity", nargs="+", choices=get_args(Granularity), default=list(get_args(Granularity)))
    given = parser.parse_args(argv)
    cells = []
    for seed in given.seeds:  # whoever stops early has every kind of cell
        study = Study.of(given, seed)
        for kv, granularity, budget in product(given.kv, given.granularity, given.budgets):
            settings = {"budget": budget, "kv": kv, "granularity": granularity, **study.settings()}
            config = study.config(budget, kv, granularity=granularity)
            name = f"{kv}-{granularity}-{budget:g}-{seed}"
            cells.append(once(given.out, name, settings, partial(one_cell, study, config)))
    print(table(cells))
    print(summary(cells))
