"""Does a run spend the budget it was asked for? Measured on rows that nothing has seen: scripts/study budget.

Every cell (budget, K/V policy, granularity, seed) is one short training of the reference model. Its threshold is
found on calibration rows as `skipit train` finds it; then the share of FLOPs that gathered execution spends is
measured on test rows, whose digits are other scans. A cell is one JSON file in the output folder, a finished one is
not repeated, and the profile of a seed is kept there too: what is interrupted goes on.
"""

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from skipit.router import find_router
from skipit.router.config import Granularity, KVPolicy
from skipit.router.folders import load_json, provenance
from skipit.theory.artefact import load_profile, save_profile
from skipit.theory.calibrate import measured_share
from skipit.theory.cost import CostModel
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data, load_model
from skipit.train.display import note, quiet, training_progress
from skipit.train.profiling import profile_model
from skipit.train.run import train
from skipit.train.run_folder import RUN_FILE

from .peers import save_cell

AIM = 0.01
LATE = 10  # steps at the end of a training, whose mean share says where training itself has come to


def one_cell(measured: Profile, config: TrainConfig, held: int, test: int) -> dict[str, Any]:
    """Train once; the shares of dense FLOPs at the end of training, on calibration rows and on test rows.

    Args:
        measured: profile of the reference model.
        config: settings of the run.
        held: calibration rows.
        test: test rows.
    """
    model, processor = load_model("reference")
    plan = make_plan(measured, config.budget, config.kv)
    rows = load_data("reference", "train", config.steps * config.batch_size, config.seed)
    calibration = load_data("reference", "calibration", held, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with training_progress(config) as callback:
            tuned = train(
                model,
                processor,
                rows,
                plan,
                config,
                run,
                calibration=calibration,
                base="reference",
                callbacks=[callback],
            )
        history = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
        calibrated = load_json(run / RUN_FILE)["calibrated_share"]
    unseen = batches(load_data("reference", "test", test, config.seed), Collator(processor), config.batch_size)
    threshold = find_router(tuned)[1].config.threshold
    return {
        "budget": config.budget,
        "kv": config.kv,
        "granularity": config.granularity,
        "seed": config.seed,
        "training": mean(figures["compute"] for figures in history[-LATE:]),
        "threshold": threshold,
        "calibrated": calibrated,
        "measured": measured_share(tuned, unseen, CostModel.of(model), config.kv, threshold),
    }


def profile_of(seed: int, folder: Path, samples: int) -> Profile:
    """The reference model's profile for a seed, measured once and kept in a folder."""
    place = folder / f"profile-{seed}"
    if not place.exists():
        model, processor = load_model("reference")
        save_profile(profile_model(model, processor, load_data("reference", "train", samples, seed), seed=seed), place)
    return load_profile(place)


def table(cells: list[dict[str, Any]]) -> str:
    """In Markdown: the measured share of each seed, and in points the largest distance from the budget."""
    lines = ["| keys and values | who decides | budget | measured on test rows | off by at most, points |"]
    lines.append("|---|---|---:|---:|---:|")
    keys = list(dict.fromkeys((c["kv"], c["granularity"], c["budget"]) for c in cells))
    for kv, granularity, budget in keys:
        same = [c for c in cells if (c["kv"], c["granularity"], c["budget"]) == (kv, granularity, budget)]
        shares = ", ".join(f"{c['measured']:.2%}" for c in sorted(same, key=lambda c: c["seed"]))
        off = 100 * max(abs(c["measured"] - budget) for c in same)
        lines.append(f"| {kv} | {granularity} | {budget:.0%} | {shares} | {off:.2f} |")
    return "\n".join(lines)


def summary(cells: list[dict[str, Any]]) -> str:
    """How many cells are within the aim, and how far off the worst is, in one line."""
    off = [abs(c["measured"] - c["budget"]) for c in cells]
    held = [abs(c["calibrated"] - c["budget"]) for c in cells]
    within = sum(distance <= AIM for distance in off)
    return (
        f"{within} of {len(cells)} runs are within {100 * AIM:g} point of their budget on test rows; off by "
        f"{100 * mean(off):.2f} points on average, {100 * max(off):.2f} at most ({100 * max(held):.2f} on calibration "
        "rows)."
    )


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="folder (default %(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="(default %(default)s)")
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=list(get_args(KVPolicy)))
    parser.add_argument("--granularity", nargs="+", choices=get_args(Granularity), default=list(get_args(Granularity)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of training (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step (default %(default)s)")
    parser.add_argument("--profile-samples", type=int, default=96, help="rows (default %(default)s)")
    parser.add_argument("--calibration-samples", type=int, default=192, help="rows (default %(default)s)")
    parser.add_argument("--samples", type=int, default=384, help="test rows (default %(default)s)")
    arguments = parser.parse_args()
    quiet()
    # Seed by seed: whoever stops early has every kind of cell.
    grid = list(product(arguments.seeds, arguments.kv, arguments.granularity, arguments.budgets))
    cells = []
    for number, (seed, kv, granularity, budget) in enumerate(grid, 1):
        file = arguments.out / f"{kv}-{granularity}-{budget:g}-{seed}.json"
        if not file.exists():
            note(f"{number} of {len(grid)}: {file.stem}")
            measured = profile_of(seed, arguments.out, arguments.profile_samples)
            config = TrainConfig(
                budget=budget,
                kv=kv,
                granularity=granularity,
                seed=seed,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
            )
            found = one_cell(measured, config, arguments.calibration_samples, arguments.samples)
            save_cell(file, {**found, "config": config.to_dict(), "made_by": provenance()})
        cells.append(load_json(file))
    print(table(cells))
    print(summary(cells))


if __name__ == "__main__":
    main()
