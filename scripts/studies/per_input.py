"""Does it matter whether each input spends the budget, or the data in the mean: scripts/study per-input.

Gates of a plan, untrained and after a training, answer the same test rows twice: with one threshold, calibrated on
other rows' prompts (`data`), and with one per row, found from the prompt's own logits (`input`). Accuracy, and the
FLOPs that each prompt executed, and each with its answer, as shares of the dense decoder's. One JSON file per cell;
finished ones are not measured again.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

from skipit.router import Gated
from skipit.router.config import BudgetPer, KVPolicy
from skipit.theory.calibrate import calibrate
from skipit.theory.cost import trace_flops
from skipit.theory.labels import before_answer
from skipit.theory.plan import make_plan
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_model
from skipit.train.gating import attach_plan

from .answers import always, answers, right
from .study import Study, command, markdown, once


def both(study: Study, model: Any, budget: float, kv: KVPolicy) -> dict[str, Any]:
    """Accuracy and the shares of FLOPs of every row, per `data` and per `input`."""
    prompts = Collator(study.dense[1], with_completion=False)
    held_out = list(batches(study.rows("calibration", study.calibration), prompts, 48))
    threshold, _ = calibrate(model, held_out, study.costs, budget, kv)
    options: dict[BudgetPer, dict[str, Any]] = {
        "data": {"policy": Gated(threshold), "kv": kv},
        "input": {"budget_per": "input", "budget": budget, "kv": kv},
    }
    found: dict[str, Any] = {}
    for name, how in options.items():
        given = answers(model, study.test, always(how))
        shares: dict[str, list[float]] = {"prompt": [], "whole": []}
        for step, batch in zip(given.steps, study.test, strict=True):
            (executed,), (dense,) = trace_flops(study.costs, [step])
            for part, tokens in (("prompt", before_answer(batch["labels"])), ("whole", step.real)):
                shares[part] += ((executed * tokens).sum((0, 2)) / (dense * tokens).sum((0, 2))).tolist()
        found[name] = {"accuracy": given.same(right(study.test)), **shares}
    return found


def one_cell(study: Study, budget: float, kv: KVPolicy) -> dict[str, Any]:
    """A plan's gates before training, and after it."""
    model, _ = load_model("reference")
    attach_plan(model, make_plan(study.profile, budget, kv))
    found = {"0": both(study, model, budget, kv)}
    with tempfile.TemporaryDirectory() as folder:
        model, _ = study.trained(study.config(budget, kv), Path(folder) / "run", calibrated=False)
    found[str(study.steps)] = both(study, model, budget, kv)
    return {"dense": study.dense_accuracy, "after": found}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """In Markdown: accuracy and the spread of FLOPs over the rows of all seeds."""
    rows = []
    for kv, budget in dict.fromkeys((cell["kv"], cell["budget"]) for cell in cells):
        same = [cell for cell in cells if (cell["kv"], cell["budget"]) == (kv, budget)]
        for steps, per in product(same[0]["after"], get_args(BudgetPer)):
            found = [cell["after"][steps][per] for cell in same]
            accuracy = statistics.mean(one["accuracy"] for one in found)
            shares, whole = ([share for one in found for share in one[part]] for part in ("prompt", "whole"))
            spread = (
                statistics.mean(shares),
                statistics.pstdev(shares),
                min(shares),
                max(shares),
                statistics.mean(whole),
            )
            rows.append([kv, f"{budget:.0%}", steps, per, f"{accuracy:.1%}", *(f"{value:.2%}" for value in spread)])
    head = [
        "keys and values",
        "budget",
        "steps",
        "per",
        "right",
        "prompt: mean",
        "sd",
        "least",
        "most",
        "with answer: mean",
    ]
    return markdown(head, rows, text=(0, 3))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table."""
    parser = command(
        __name__,
        __doc__,
        out=Path("runs/per-input"),
        budgets=[0.5, 0.25],
        seeds=[0],
        steps=100,
        samples=480,
        calibration=96,
        profiled=192,
    )
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=list(get_args(KVPolicy)))
    given = parser.parse_args(argv)
    cells = []
    for seed in given.seeds:
        study = Study.of(given, seed)
        for kv, budget in product(given.kv, given.budgets):
            settings = {"budget": budget, "kv": kv, **study.settings()}
            cells.append(once(given.out, f"{kv}-{budget:g}-{seed}", settings, partial(one_cell, study, budget, kv)))
    print(table(cells))
