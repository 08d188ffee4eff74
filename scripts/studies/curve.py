"""Can one training serve every budget? Accuracy against budget, from one checkpoint: scripts/study curve.

One router is trained for several budgets in turn (`--more-budgets` of `skipit train`), and one for each budget of
`--budgets` alone, with as many steps each. Then every checkpoint's threshold is found on calibration rows for the
budgets of `--at`, trained for or not, and test rows are answered there. One JSON file per cell; finished ones are not
measured again.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

from skipit.router import Gated
from skipit.router.config import KVPolicy
from skipit.theory.calibrate import calibrate
from skipit.theory.plan import check_budget

from .ablation import SIZES
from .answers import always, answers, right
from .study import Study, command, markdown, once

AT = tuple(round(tenth / 10, 1) for tenth in range(1, 11))


def one_cell(study: Study, trained_for: Sequence[float], at: Sequence[float], kv: KVPolicy) -> dict[str, Any]:
    """A training for one budget or several, and accuracy and executed share at every budget asked for."""
    first, *more = trained_for
    with tempfile.TemporaryDirectory() as folder:
        config = study.config(first, kv, more_budgets=tuple(more))
        model, _ = study.trained(config, Path(folder) / "run", calibrated=False)
    points = {}
    for budget in at:
        threshold, _ = calibrate(model, study.held_out, study.costs, budget, kv)
        given = answers(model, study.test, always({"policy": Gated(threshold), "kv": kv}))
        points[f"{budget:g}"] = {"accuracy": given.same(right(study.test)), "share": given.share(study.costs)}
    return {"dense": study.dense_accuracy, "points": points}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """In Markdown: accuracy of each training, in % of dense, at each budget; mean and spread over seeds."""
    kinds = list(dict.fromkeys((cell["kv"], tuple(cell["trained_for"])) for cell in cells))
    budgets = sorted({point for cell in cells for point in cell["points"]}, key=float)
    rows = []
    for budget in budgets:
        row = [f"{float(budget):.0%}"]
        for kind in kinds:
            same = [cell for cell in cells if (cell["kv"], tuple(cell["trained_for"])) == kind]
            found = [100 * c["points"][budget]["accuracy"] / c["dense"] for c in same if budget in c["points"]]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            row.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        rows.append(row)
    heads = [f"{kv}, trained for {', '.join(f'{b:.0%}' for b in trained)}" for kv, trained in kinds]
    return markdown(["budget", *heads], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table."""
    parser = command(__name__, __doc__, out=Path("runs/curve"), **SIZES)
    parser.add_argument(
        "--at", nargs="+", type=float, default=list(AT), help="budgets to answer at (default %(default)s)"
    )
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=["retain"], help="(default %(default)s)")
    given = parser.parse_args(argv)
    for budget in given.at:
        check_budget(budget)
    cells = []
    for seed, kv in product(given.seeds, given.kv):
        study = Study.of(given, seed)
        alone = [((budget,), [budget]) for budget in given.budgets]
        for trained_for, at in ((tuple(given.budgets), sorted({*given.at, *given.budgets})), *alone):
            settings = {"trained_for": trained_for, "at": at, "kv": kv, **study.settings()}
            name = f"{kv}-{'-'.join(f'{budget:g}' for budget in trained_for)}-{seed}"
            cells.append(once(given.out, name, settings, partial(one_cell, study, trained_for, at, kv)))
    print(table(cells))
