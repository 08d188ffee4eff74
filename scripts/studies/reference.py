"""Accuracy, executed FLOPs and milliseconds at several budgets on the reference: scripts/study reference.

Each budget is one demo-sized training from the same profile. Everything is compared with the untouched transformers
model, in the same run, on held-out scans.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from skipit.eval.compare import Comparison, compare
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile
from skipit.train.config import TrainConfig
from skipit.train.data.sources import load_data, load_model
from skipit.train.display import progress, quiet, training_progress
from skipit.train.export import merge_run
from skipit.train.profiling import profile_model
from skipit.train.run import train


def trained(measured: Profile, budget: float, kv: KVPolicy, init: Any, steps: int, seed: int, folder: Path) -> Any:
    """One training at a budget; returns the gated model, LoRA merged."""
    model, processor = load_model("reference")
    plan = make_plan(measured, budget, kv, init)
    config = TrainConfig(budget=budget, kv=kv, steps=steps, seed=seed)
    rows = load_data("reference", "train", steps * config.batch_size, seed)
    held_out = load_data("reference", "calibration", 192, seed)
    with training_progress(config) as callback:
        train(
            model, processor, rows, plan, config, folder, calibration=held_out, base="reference", callbacks=[callback]
        )
    return merge_run(folder)[0]


def bench(budgets: list[float], kvs: list[KVPolicy], steps: int, samples: int, seed: int) -> Comparison:
    """Train one model per budget and K/V policy and compare all with the dense one."""
    dense, processor = load_model("reference")
    measured = profile_model(dense, processor, load_data("reference", "train", 192, seed), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        gated = {
            f"{kv} {budget:g}": trained(measured, budget, kv, "theory", steps, seed, Path(folder) / f"{kv}-{budget:g}")
            for kv in kvs
            for budget in budgets
        }
    test = load_data("reference", "test", samples, seed)
    with progress("eval", len(test) * (1 + len(gated))) as advance:
        return compare(dense, gated, processor, test, measured, progress=advance)


def main() -> None:
    """Print a table and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.15], help="(default %(default)s)")
    parser.add_argument(
        "--kv", nargs="+", choices=("retain", "evict"), default=["retain"], help="(default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps per budget (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1200, help="held-out rows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    quiet()
    result = bench(arguments.budgets, arguments.kv, arguments.steps, arguments.samples, arguments.seed)
    print(result.table())
    print(f"{torch.get_num_threads()} threads; accuracy relative to dense:")
    dense = result.outcomes["dense"].accuracy
    for name, outcome in result.outcomes.items():
        print(f"  {name:14} {outcome.accuracy / dense:7.2%} at {outcome.compute:.1%} of the decoder's FLOPs")
    if arguments.out is not None:
        save_json(arguments.out, {"results": result.to_json(), "made_by": provenance()})


if __name__ == "__main__":
    main()
