"""Does a router hold on new types of question and on shifted images? Two are trained: scripts/study transfer.

Two routers are trained alike, one on half of the reference's question types, one on all of them; profile, plan,
training rows and calibration rows of the first hold its own types only. Both are measured on all types, and on images
that are noisy, darker, brighter, paler, moved or turned, beside the untouched dense model. That the digits are other
scans needs no extra test: no scan of the test split is in the training split. What is finished is not measured again.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipit.router.folders import provenance, save_json
from skipit.theory.plan import check_budget
from skipit.train.data.collate import Collator, batches
from skipit.train.reference.digits import CELL, GRID
from skipit.train.reference.questions import KINDS, Kind

from .answers import always, answers, right, same_rows
from .study import Study, command, digest, markdown, once

Pixels = NDArray[np.uint8]  # [height, width, 3]
Shift = Callable[[Pixels, np.random.Generator], Pixels]

HALF: tuple[Kind, ...] = KINDS[::2]  # by default every other one: cell, grid, sum; held out are row, compare, count


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


def measure(study: Study, budget: float | None, folder: Path) -> dict[str, Any]:
    """Every row's answer and executed FLOPs, by type of question and by shift of the image.

    Args:
        study: settings.
        budget: of the router that is trained; None measures the dense model.
        folder: of the training.

    Returns:
        For each type, and for each shift over all types: whether each row was answered right, what was answered, and
        the executed share of FLOPs.
    """
    model, processor = study.dense if budget is None else study.trained(study.config(budget), folder)
    options = always({"mode": "dense"} if budget is None else {})
    rows = list(study.rows("test", study.samples))

    def measured(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        read = list(batches(chosen, Collator(processor), 48))
        found = answers(model, read, options)
        return {
            "right": same_rows(found.predicted, right(read)).tolist(),
            "answers": [row[row >= 0].tolist() for part in found.predicted for row in part],
            "compute": found.share(study.costs),
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
        head = [title, "dense: accuracy"]
        for name in systems:
            head += [f"{name}: accuracy", "same answer", "FLOPs"]
        rows = []
        for name, by in found[part].items():
            new = part == "types" and name not in kinds
            rows.append([f"**{name}** (new)" if new else name, f"{by['dense']['accuracy']:.1%}"])
            for system in systems:
                rows[-1] += [
                    f"{by[system][key]:.1%}" if system in by else "" for key in ("accuracy", "same", "compute")
                ]
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write and print the tables."""
    parser = command(
        __name__,
        __doc__,
        out=Path("runs/transfer"),
        budget=0.5,
        seeds=[0],
        steps=250,
        batch_size=16,
        samples=480,
        calibration=96,
        profiled=192,
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(HALF), help="types of the first router (default %(default)s)"
    )
    given = parser.parse_args(argv)
    check_budget(given.budget)
    systems = {"dense": [], "trained on " + ", ".join(given.kinds): given.kinds, "trained on all": KINDS}
    cells = []
    for seed in given.seeds:
        for system, kinds in systems.items():
            study = Study.of(given, seed, kinds=tuple(kinds) or KINDS)
            cells.append(_cell(study, system, "-".join(kinds) or "dense", given.budget if kinds else None))
    found = summary(cells)
    files = [cell["file"] for cell in cells]
    summarized = {"figures": found, "kinds": given.kinds, "cells": files, "made_by": provenance()}
    save_json(given.out / "summary.json", summarized)
    (given.out / "table.md").write_text(table(found, given.kinds) + "\n", encoding="utf-8")
    print(table(found, given.kinds))


def _cell(study: Study, system: str, name: str, budget: float | None) -> dict[str, Any]:
    """What was measured of a system; a training goes on where it stopped, and serves any number of test rows."""
    assert study.out is not None
    settings = {"system": system, "budget": budget, **study.settings()}
    run = digest({key: value for key, value in settings.items() if key != "samples"})
    folder = study.out / "runs" / f"{name}_{study.seed}_{run}"
    return once(study.out, f"{name}_{study.seed}", settings, lambda: {"results": measure(study, budget, folder)})


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
