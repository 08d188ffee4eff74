"""Does the theory's initialization help? Accuracy at equal steps, seeds and executed FLOPs: scripts/study ablation.

Gates are initialized in four ways and trained alike. After 0, 50, 200 and all steps the threshold is calibrated on
held-out rows so that gathered execution spends exactly the budget, and accuracy is measured there. Results are appended
to a JSONL file, one line per run, and finished runs are not repeated: the sweep can be interrupted.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipit.router import Gated, running
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance
from skipit.theory.calibrate import calibrate
from skipit.theory.cost import CostModel
from skipit.theory.labels import IGNORE
from skipit.theory.plan import Init, Plan, make_plan
from skipit.theory.profile import Profile
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data, load_model
from skipit.train.profiling import profile_model
from skipit.train.run import train


@torch.no_grad()
def exact_match_at(model: nn.Module, rows: list[dict[str, Tensor]], kv: KVPolicy, threshold: float | None) -> float:
    """Share of rows answered right, teacher-forced (as greedy generation would); threshold None is the dense model."""
    right = total = 0
    options: dict[str, Any] = {"mode": "dense"} if threshold is None else {"policy": Gated(threshold), "kv": kv}
    for batch in rows:
        labels = batch["labels"][:, 1:]
        with running(**{"mode": "gathered", **options}):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        right += int(((logits.argmax(-1) == labels) | (labels == IGNORE)).all(-1).sum())
        total += len(labels)
    return right / total


class _Measure(TrainerCallback):
    """Calibrates and measures at given steps, without touching the training."""

    def __init__(
        self, steps: set[int], kv: KVPolicy, budget: float, held_out: Any, test: Any, costs: CostModel
    ) -> None:
        self.steps, self.kv, self.budget = steps, kv, budget
        self.held_out, self.test, self.costs = held_out, test, costs
        self.found: dict[int, dict[str, float]] = {}

    def measure(self, model: nn.Module, step: int) -> None:
        was_training = model.training
        model.eval()
        threshold, share = calibrate(model, self.held_out, self.costs, self.budget, self.kv)
        accuracy = exact_match_at(model, self.test, self.kv, threshold)
        self.found[step] = {"accuracy": accuracy, "share": share, "threshold": threshold}
        model.train(was_training)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if 0 in self.steps:
            self.measure(model, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step in self.steps:
            self.measure(model, state.global_step)


def one_run(
    measured: Profile, init: Init, budget: float, kv: KVPolicy, seed: int, steps: int, rows: int
) -> dict[str, Any]:
    """Train once from an initialization; returns accuracy and measured compute at each milestone."""
    model, processor = load_model("reference")
    collate = Collator(processor)
    held_out = list(batches(load_data("reference", "calibration", 96, seed), collate, 48))
    test = list(batches(load_data("reference", "test", rows, seed), collate, 64))
    dense = exact_match_at(model, test, kv, None)
    plan: Plan = make_plan(measured, budget, kv, init)
    milestones = {0, 50, 200, steps}
    callback = _Measure({s for s in milestones if s <= steps}, kv, budget, held_out, test, CostModel.of(model))
    config = TrainConfig(budget=budget, kv=kv, steps=steps, seed=seed, save_steps=10 * steps)
    data = load_data("reference", "train", steps * config.batch_size, seed)
    with tempfile.TemporaryDirectory() as folder:
        train(model, processor, data, plan, config, Path(folder) / "run", base="reference", callbacks=[callback])
    return {
        "init": init,
        "budget": budget,
        "kv": kv,
        "seed": seed,
        "steps": steps,
        "dense": dense,
        "at": {str(step): values for step, values in sorted(callback.found.items())},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Mean accuracy relative to dense, with the spread over seeds, per budget, initialization and milestone."""
    import statistics

    steps = sorted({int(step) for line in lines for step in line["at"]})
    out = [f"{'budget':>8} {'init':12} {'seeds':>5} " + " ".join(f"{f'{step} steps':>16}" for step in steps)]
    keys = sorted({(line["kv"], line["budget"], line["init"]) for line in lines}, reverse=True)
    for kv, budget, init in keys:
        chosen = [line for line in lines if (line["kv"], line["budget"], line["init"]) == (kv, budget, init)]
        cells = []
        for step in steps:
            values = [line["at"][str(step)]["accuracy"] / line["dense"] for line in chosen if str(step) in line["at"]]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):9.1%} ±{spread:5.1%}" if values else " " * 16)
        out.append(f"{budget:>8g} {init:12} {len(chosen):>5} " + " ".join(cells))
    return "\n".join(out)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.jsonl"), help="(default %(default)s)")
    parser.add_argument("--inits", nargs="+", choices=get_args(Init), default=list(get_args(Init)))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kv", choices=get_args(KVPolicy), default="retain")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=480, help="held-out rows (default %(default)s)")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    keys = ("init", "budget", "kv", "seed", "steps")
    finished = {tuple(line[key] for key in keys) for line in done}
    measured: dict[int, Profile] = {}
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for init in arguments.inits:
                if (init, budget, arguments.kv, seed, arguments.steps) in finished:
                    continue
                if seed not in measured:
                    model, processor = load_model("reference")
                    rows = load_data("reference", "train", 192, seed)
                    measured[seed] = profile_model(model, processor, rows, seed=seed)
                result = one_run(measured[seed], init, budget, arguments.kv, seed, arguments.steps, arguments.samples)
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**result, "made_by": provenance()}) + "\n")
                done.append(result)
                print(table(done), flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
