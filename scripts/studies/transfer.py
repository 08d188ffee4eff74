"""Does a router hold on new types of question and on shifted images? Measured by scripts/study transfer.

Two routers are trained alike, one on half of the reference's question types, one on all of them; profile, plan,
training rows and calibration rows of the first hold its own types only. Both are measured on all types, and on images
that are noisy, darker, brighter, paler, moved or turned, beside the untouched dense model. That the digits are other
scans needs no extra test: no scan of the test split is in the training split. Finished cells are not repeated.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skipit.router.folders import provenance, save_json
from skipit.theory.cost import CostModel
from skipit.theory.plan import check_budget, make_plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_model
from skipit.train.display import quiet, training_progress
from skipit.train.export import merge_run
from skipit.train.launch import CHECKPOINTS
from skipit.train.profiling import profile_model
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.digits import CELL, GRID, Split
from skipit.train.reference.questions import KINDS, Kind
from skipit.train.run import train
from skipit.train.run_folder import RUN_FILE
from studies.peers.choices import answers, right, same_rows

from .peers import finished, save_cell

Pixels = NDArray[np.uint8]  # [height, width, 3]
Shift = Callable[[Pixels, np.random.Generator], Pixels]

HALF: tuple[Kind, ...] = KINDS[::2]  # by default every other one: cell, grid, sum; held out are row, compare, count
SETTINGS = ("budget", "steps", "rows", "calibration", "profiled", "batch_size")


@dataclass(frozen=True)
class Study:
    """What all cells of one seed share.

    Attributes:
        seed: of rows, training and shifts.
        budget: share of the dense decoder's FLOPs.
        steps: of training.
        rows: test rows.
        calibration: held-out rows, on which the threshold is found.
        profiled: rows of the theory's profile.
        batch_size: rows of a training step.
    """

    seed: int = 0
    budget: float = 0.5
    steps: int = 250
    rows: int = 480
    calibration: int = 96
    profiled: int = 192
    batch_size: int = 16

    def settings(self, kinds: Sequence[Kind]) -> dict[str, Any]:
        """What a cell must have been made with."""
        return {"kinds": list(kinds), **{name: getattr(self, name) for name in SETTINGS}}


def noisy(sigma: float, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Gaussian noise of standard deviation `sigma`, in grey levels of 255, alike in all colours."""
    return _levels(pixels + rng.normal(0.0, sigma, pixels.shape[:2])[..., None])


def brighter(offset: float, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Every pixel lighter by `offset` grey levels, darker if it is negative."""
    return _levels(pixels.astype(np.float64) + offset)


def paler(factor: float, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Contrast times `factor`, around middle grey."""
    return _levels(127.5 + factor * (pixels - 127.5))


def moved(most: int, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Every digit moved inside its cell, up to `most` pixels down or up and right or left; what leaves is lost."""

    def move(cell: Pixels) -> Pixels:
        down, across = rng.integers(-most, most + 1, size=2)
        padded = np.pad(cell, ((most, most), (most, most), (0, 0)))
        return padded[most - down : most - down + CELL, most - across : most - across + CELL]

    return _each_cell(move, pixels)


def turned(degrees: float, pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Every digit turned about the middle of its cell, by `degrees` to one side or the other."""
    from PIL import Image

    def turn(cell: Pixels) -> Pixels:
        angle = degrees if rng.random() < 0.5 else -degrees
        return np.asarray(Image.fromarray(cell).rotate(angle, Image.Resampling.BILINEAR))

    return _each_cell(turn, pixels)


SHIFTS: dict[str, Shift] = {
    **{f"noise, sigma {sigma}": partial(noisy, sigma) for sigma in (20, 40, 80)},
    "darker by 60": partial(brighter, -60),
    "brighter by 60": partial(brighter, 60),
    **{f"contrast x {factor}": partial(paler, factor) for factor in (0.5, 0.25)},
    **{f"digits moved, up to {most} px": partial(moved, most) for most in (1, 2)},
    **{f"digits turned by {degrees} degrees": partial(turned, degrees) for degrees in (10, 20)},
}


def shifted(rows: Iterable[Mapping[str, Any]], shift: Shift, seed: int) -> list[dict[str, Any]]:
    """Rows whose images went through a shift; every row has a random generator of its own."""
    from PIL import Image

    out = []
    for number, row in enumerate(rows):
        rng = np.random.default_rng([seed, number])
        images = [Image.fromarray(shift(np.asarray(image.convert("RGB")), rng)) for image in row["images"]]
        out.append({**row, "images": images})
    return out


def trained(study: Study, kinds: Sequence[Kind], folder: Path) -> tuple[Any, Any]:
    """A router trained on some types of question and calibrated on held-out rows of the same, LoRA merged.

    Args:
        study: settings.
        kinds: of the rows of profile, training and calibration.
        folder: of the run; a finished one is read, an interrupted one goes on.
    """
    if not (folder / RUN_FILE).is_file():
        model, processor = load_model("reference")

        def rows(split: Split, size: int) -> Any:
            return reference_dataset(split, size, study.seed, kinds)

        measured = profile_model(model, processor, rows("train", study.profiled), seed=study.seed)
        plan = make_plan(measured, study.budget)
        config = TrainConfig(
            budget=study.budget, steps=study.steps, batch_size=study.batch_size, seed=study.seed, save_steps=50
        )
        data, held_out = rows("train", study.steps * study.batch_size), rows("calibration", study.calibration)
        begun = any((folder / CHECKPOINTS).glob("checkpoint-*"))
        with training_progress(config) as callback:
            train(
                model,
                processor,
                data,
                plan,
                config,
                folder,
                calibration=held_out,
                base="reference",
                resume=begun,
                callbacks=[callback],
            )
    return merge_run(folder)


def measure(model: Any, processor: Any, study: Study, dense: bool) -> dict[str, Any]:
    """Every row's answer and executed FLOPs, by type of question and by shift of the image.

    Returns:
        For each type, and for each shift over all types: whether each row was answered right, what was answered, and
        the executed share of FLOPs.
    """
    costs, collate = CostModel.of(model), Collator(processor)
    options: dict[str, Any] = {"mode": "dense"} if dense else {}
    rows = list(reference_dataset("test", study.rows, study.seed))

    def measured(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        read = list(batches(chosen, collate, 48))
        found = answers(model, read, lambda batch: options)
        return {
            "right": same_rows(found.predicted, right(read)).tolist(),
            "answers": [row[row >= 0].tolist() for part in found.predicted for row in part],
            "compute": found.share(costs),
        }

    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    return {
        "types": {kind: measured([row for row in rows if row["kind"] == kind]) for kind in kinds},
        "shifts": {
            "none": measured(rows),
            **{name: measured(shifted(rows, shift, study.seed)) for name, shift in SHIFTS.items()},
        },
    }


def summary(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Means over seeds, by part (`types`, `shifts`), name and system: accuracy, of dense, same answer, compute."""
    cells = list(cells)
    dense = {cell["seed"]: cell["results"] for cell in cells if cell["system"] == "dense"}
    out: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for part in ("types", "shifts"):
        names = dict.fromkeys(name for found in dense.values() for name in found[part])
        out[part] = {name: {} for name in names}
        for name in names:
            for system in dict.fromkeys(cell["system"] for cell in cells):
                runs = [
                    _figures(cell["results"][part][name], dense[cell["seed"]][part][name])
                    for cell in cells
                    if cell["system"] == system and cell["seed"] in dense and name in cell["results"][part]
                ]
                if runs:
                    out[part][name][system] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return out


def table(found: Mapping[str, Any], kinds: Sequence[Kind]) -> str:
    """The summary in Markdown; the type of question is marked where the first router was not trained on it."""
    parts = []
    for part, title in (("types", "question"), ("shifts", "images")):
        systems = [name for name in dict.fromkeys(s for by in found[part].values() for s in by) if name != "dense"]
        head = "".join(f" {name}: accuracy | same answer | FLOPs |" for name in systems)
        lines = [f"| {title} | dense: accuracy |{head}", "|---|---:|" + "---:|" * 3 * len(systems)]
        for name, by in found[part].items():
            new = part == "types" and name not in kinds
            cells = "".join(
                f" {by[s]['accuracy']:.1%} | {by[s]['same']:.1%} | {by[s]['compute']:.1%} |" if s in by else " | | |"
                for s in systems
            )
            lines.append(f"| {f'**{name}** (new)' if new else name} | {by['dense']['accuracy']:.1%} |{cells}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="of training (default %(default)s)")
    parser.add_argument("--budget", type=float, default=0.5, help="share of FLOPs (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default %(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(HALF), help="types of the first router (default %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=480, help="test rows (default %(default)s)")
    parser.add_argument("--calibration", type=int, default=96, help="rows for the threshold (default %(default)s)")
    parser.add_argument("--profiled", type=int, default=192, help="rows of the profile (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step (default %(default)s)")
    arguments = parser.parse_args(argv)
    quiet()
    check_budget(arguments.budget)
    cells = []
    for seed in arguments.seeds:
        study = Study(seed, **{name: getattr(arguments, name) for name in SETTINGS})
        cells += [_cell(study, system, kinds, arguments.out) for system, kinds in _systems(arguments.kinds).items()]
    found = summary(cells)
    save_json(arguments.out / "summary.json", {"figures": found, "kinds": arguments.kinds, "made_by": provenance()})
    (arguments.out / "table.md").write_text(table(found, arguments.kinds) + "\n", encoding="utf-8")
    print(table(found, arguments.kinds))


def _systems(kinds: Sequence[Kind]) -> dict[str, Sequence[Kind]]:
    """What is measured, and the types of question each was trained on."""
    return {"dense": [], "trained on " + ", ".join(kinds): list(kinds), "trained on all": list(KINDS)}


def _cell(study: Study, system: str, kinds: Sequence[Kind], out: Path) -> dict[str, Any]:
    """Read a cell, or make it and write it."""
    from skipit.router.folders import load_json

    name = f"{'-'.join(kinds) or 'dense'}_{study.seed}"
    path = out / "cells" / f"{name}.json"
    if not finished(path, study.settings(kinds)):
        print(f"{system}, seed {study.seed} ...", flush=True)
        model, processor = trained(study, kinds, out / "runs" / name) if kinds else load_model("reference")
        results = measure(model, processor, study, dense=not kinds)
        cell = {"system": system, "seed": study.seed, **study.settings(kinds), "results": results}
        save_cell(path, {**cell, "threads": torch.get_num_threads(), "made_by": provenance()})
    return load_json(path)


def _figures(mine: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float]:
    same = [a == b for a, b in zip(mine["answers"], dense["answers"], strict=True)]
    return {
        "accuracy": statistics.mean(map(float, mine["right"])),
        "of_dense": statistics.mean(map(float, mine["right"])) / max(statistics.mean(map(float, dense["right"])), 1e-9),
        "same": statistics.mean(map(float, same)),
        "compute": mine["compute"],
    }


def _each_cell(change: Callable[[Pixels], Pixels], pixels: Pixels) -> Pixels:
    out = pixels.copy()
    for row in range(GRID):
        for column in range(GRID):
            place = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
            out[place] = change(pixels[place])
    return out


def _levels(values: NDArray[np.floating[Any]]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
