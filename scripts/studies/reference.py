"""Accuracy, executed FLOPs and milliseconds at several budgets on the reference: scripts/study reference.

Each budget is one demo-sized training from the same profile. Everything is compared with the untouched transformers
model, in the same run, on held-out scans.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from skipit.eval.compare import Comparison, compare
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.train.display import progress

from .study import Study, command


def bench(study: Study, budgets: Sequence[float], kvs: Sequence[KVPolicy]) -> Comparison:
    """Train one model per budget and K/V policy and compare all with the dense one."""
    with tempfile.TemporaryDirectory() as folder:
        gated = {
            f"{kv} {budget:g}": study.trained(study.config(budget, kv), Path(folder) / f"{kv}-{budget:g}")[0]
            for kv in kvs
            for budget in budgets
        }
    test = study.rows("test", study.samples)
    with progress("eval", len(test) * (1 + len(gated))) as advance:
        return compare(study.dense[0], gated, study.dense[1], test, study.profile, progress=advance)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and optionally write JSON."""
    parser = command(
        __name__,
        __doc__,
        file=None,
        budgets=[0.5, 0.25, 0.15],
        seed=0,
        steps=250,
        samples=1200,
        calibration=192,
        profiled=192,
    )
    parser.add_argument(
        "--kv", nargs="+", choices=("retain", "evict"), default=["retain"], help="(default %(default)s)"
    )
    given = parser.parse_args(argv)
    result = bench(Study.of(given, given.seed), given.budgets, given.kv)
    print(result.table())
    print(f"{torch.get_num_threads()} threads; accuracy relative to dense:")
    dense = result.outcomes["dense"].accuracy
    for name, outcome in result.outcomes.items():
        print(f"  {name:14} {outcome.accuracy / dense:7.2%} at {outcome.compute:.1%} of the decoder's FLOPs")
    if given.file is not None:
        save_json(given.file, {"results": result.to_json(), "made_by": provenance()})
