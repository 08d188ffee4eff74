"""At how many layers should gates decide, and why? Accuracy, and how well gates predict: scripts/study decide.

Gates read the states that enter their layer, or those at the last decision point before it. Profile, plan and training
are made for each choice; after 0, 50 and all steps the threshold is calibrated so that gathered execution spends the
budget, and accuracy is measured there. The explanation that is tested: a profile is measured where nothing is skipped,
so a gate that reads a state which earlier skips have changed predicts worse than it was fitted to. R² says how well the
untrained gates predict the log damages of held-out rows' tokens from dense states, and from those that they meet at the
budget. One JSON file per cell; finished ones are not measured again.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipit.cli.profile import points
from skipit.router import MODALITIES, Decision, Gated, running
from skipit.router.call import Call
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.router.gates import TokenGate, normalize
from skipit.theory.measuring import frozen
from skipit.theory.plan import make_plan
from skipit.theory.profile_batch import BatchMeasurement, Draws
from skipit.theory.profile_sums import ProfileSums, groups
from skipit.train.data.sources import load_model
from skipit.train.gating import attach_plan

from .ablation import SIZES, one_run, table
from .study import Study, command, once

MILESTONES = (0, 50)
CHOICES = ("each", "0,1,2,5,8", "0,1,2", "0")
DRAWS = 2


class _Signals(ProfileSums):
    """Keeps what gates of all layers learn from: of each, the signal per policy, and the tokens' kinds."""

    kept: list[tuple[dict[KVPolicy, Float[Tensor, "1 batch seq"]], Int[Tensor, "batch seq"]]]

    def add_samples(self, group: int, x: Tensor, signal: dict[KVPolicy, Tensor], kinds: Tensor) -> None:
        """Keep the signal of the layer that is this group."""
        self.kept.append((signal, kinds))


@dataclass(frozen=True)
class _Reader(Gated):
    """The gates' own policy, and the states that they read in the last call."""

    read: dict[int, Tensor] = field(default_factory=dict)

    def decide(self, layers: range, hidden: Tensor, call: Call, gates: Sequence[TokenGate]) -> Decision:
        """Decide as the gates do."""
        self.read.update(dict.fromkeys(layers, hidden))
        return super().decide(layers, hidden, call, gates)


@dataclass(frozen=True)
class Decide(Study):
    """A study of one choice of decision points."""

    @cached_property
    def signals(self) -> list[list[tuple[dict[KVPolicy, Tensor], Tensor]]]:
        """Per batch of held-out rows and layer: what the profile would have regressed there."""
        model, found = self.gated, []
        _, _, layers = find_decoder(model)
        count, width = len(layers), model.config.text_config.hidden_size
        with running(mode="dense"), frozen(model):
            for number, batch in enumerate(self.held_out):
                sums = _Signals(count, width, torch.device("cpu"), groups(range(count), count))
                sums.kept = []
                BatchMeasurement(model, layers, frozenset(), Draws(DRAWS, 1.0, self.seed), sums).add(number, batch)
                found.append(sums.kept)
        return found


def explained(study: Decide, model: nn.Module, kv: KVPolicy, threshold: float) -> dict[str, float]:
    """R² of the profile's predictions within units, from the states that gates meet at a threshold, per modality."""
    ridge = study.profile.damage[kv].ridge
    wrong, spread = torch.zeros(2), torch.zeros(2)
    samples: dict[tuple[int, int], list[Tensor]] = {}
    for batch, kept in zip(study.held_out, study.signals, strict=True):
        reader = _Reader(threshold)
        with torch.no_grad(), running(policy=reader, kv=kv, mode="gathered"):
            model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
        for layer, (signal, kinds) in enumerate(kept):
            predicted = normalize(reader.read[layer]) @ ridge.weight[layer].T + ridge.bias[layer]
            for m in range(len(MODALITIES)):
                used = (signal[kv][0] > 0) & (kinds == m) & bool(ridge.bias[layer, m].isfinite())
                pairs = torch.stack([signal[kv][0][used].log(), predicted[..., m][used]])
                samples.setdefault((layer, m), []).append(pairs)
    for (_, m), parts in samples.items():
        true, predicted = torch.cat(parts, dim=-1)
        wrong[m] += (true - predicted).square().sum()
        spread[m] += (true - true.mean()).square().sum() if len(true) else 0
    return dict(zip(MODALITIES, (1 - wrong / spread).tolist(), strict=True))


def one_cell(study: Decide, budget: float, kv: KVPolicy) -> dict[str, Any]:
    """Train once: accuracy at each milestone; and how well the gates predicted before, without skips and with them."""
    ran = one_run(study, "theory", budget, kv, MILESTONES)
    model, _ = load_model("reference")
    attach_plan(model, make_plan(study.profile, budget, kv))
    thresholds = {"dense": -1e9, "skips": ran["at"]["0"]["threshold"]}
    return {**ran, "r2": {states: explained(study, model, kv, at) for states, at in thresholds.items()}}


def predictions(cells: Sequence[dict[str, Any]]) -> str:
    """R² on dense states and on those with skips before, mean over seeds, per budget and decision points."""
    lines = [
        f"{'budget':>8} {'decide':12} " + " ".join(f"{f'{m}, {s}':>14}" for m in MODALITIES for s in ("dense", "skips"))
    ]
    for budget, decide in sorted({(cell["budget"], cell["decide"]) for cell in cells}, reverse=True):
        chosen = [cell["r2"] for cell in cells if (cell["budget"], cell["decide"]) == (budget, decide)]
        means = (statistics.mean(r2[s][m] for r2 in chosen) for m in MODALITIES for s in ("dense", "skips"))
        lines.append(f"{budget:>8g} {decide:12} " + " ".join(f"{mean:14.3f}" for mean in means))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print both tables for each K/V policy."""
    parser = command(__name__, __doc__, out=Path("runs/decide"), **SIZES)
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=list(get_args(KVPolicy)))
    parser.add_argument("--decide", nargs="+", default=list(CHOICES), help="decision points (default %(default)s)")
    given = parser.parse_args(argv)
    cells = []
    for seed, decide in product(given.seeds, given.decide):
        study = Decide.of(given, seed, decide_at=points(decide))
        for kv, budget in product(given.kv, given.budgets):
            settings = {"decide": decide, "budget": budget, "kv": kv, **study.settings()}
            name = f"{decide}_{kv}_{budget:g}_{seed}"
            cells.append(once(given.out, name, settings, partial(one_cell, study, budget, kv)))
    for kv in given.kv:
        same = [cell for cell in cells if cell["kv"] == kv]
        print(f"{kv}: accuracy relative to dense\n{table(same, 'decide')}")
        print(f"R² of the untrained gates\n{predictions(same)}\n")
