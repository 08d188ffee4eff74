"""Does the theory predict what skipping does? Profile against controlled skipping: scripts/study prediction.

Predictions come from the calibration split, the truth from the same rows and, out of sample, from the test split.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipit.eval.claims.prediction import (
    SCOPES,
    RankCorrelation,
    by_scope,
    growing_sets,
    layer_contribution,
    predictors,
    random_sets,
    rank_correlation,
    set_damages,
)
from skipit.eval.measure.controlled import Effect, effects, one_unit_skipped, skipping_table
from skipit.eval.plots import plot_scatter
from skipit.router import attach
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.theory.profile import profile
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data, load_model

KINDS: tuple[KVPolicy, ...] = ("retain", "evict")
LC_ROWS = 40  # as many as ShortV uses


def main() -> None:
    """Print rank correlations, and optionally save JSON and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192, help="rows of each split (default %(default)s)")
    parser.add_argument("--set-samples", type=int, default=48, help="rows for sets of units (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=24, help="random pairs of units (default %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="of the profile (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder for figures and JSON")
    arguments = parser.parse_args()
    results = bench(arguments)
    if arguments.out is not None:
        save_json(arguments.out / "prediction.json", {"results": results, "made_by": provenance()})


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, print it, draw it, and return it."""
    model, processor = load_model("reference")
    collate = Collator(processor)

    def rows(split: str, samples: int) -> list[dict[str, Tensor]]:
        return list(batches(load_data("reference", split, samples, arguments.seed), collate, 32))

    splits = {"same rows": rows("calibration", arguments.samples), "new rows": rows("test", arguments.samples)}
    measured = profile(model, splits["same rows"], draws=arguments.draws, seed=arguments.seed)
    attach(model)
    contribution = layer_contribution(model, rows("calibration", LC_ROWS))
    few = rows("test", arguments.set_samples)
    results: dict[str, Any] = {}
    for kv in KINDS:
        truth = {
            name: skipping_table([max(0.0, e.kl) for e in effects(model, data, one_unit_skipped(model), kv)])
            for name, data in splits.items()
        }
        tables = predictors(measured, kv) | {"ShortV-LC": contribution}
        figures = {
            name: {kind: by_scope(table, true) for kind, true in truth.items()} for name, table in tables.items()
        }
        figures["truth on the other rows"] = {"new rows": by_scope(truth["same rows"], truth["new rows"])}
        _show(kv, figures)
        results[kv] = {
            "truth": {name: true.tolist() for name, true in truth.items()},
            "predicted": {name: table.tolist() for name, table in tables.items()},
            "spearman": _json(figures),
            "sets": _sets(tables["damage"], kv, arguments, partial(effects, model, few, kv=kv)),
        }
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            labels = ("predicted damage (nats per answer token)", f"KL of skipping, {kv} (nats per answer token)")
            plot_scatter(arguments.out / f"damage_{kv}.png", tables["damage"], truth["new rows"], labels, diagonal=True)
    return results


def _sets(
    damage: Tensor, kv: str, arguments: argparse.Namespace, skip: Callable[[list[Tensor]], list[Effect]]
) -> dict[str, Any]:
    """Pairs and growing sets of units: predicted from their single damages, and measured."""
    results: dict[str, Any] = {}
    groups = {"pairs": random_sets(damage, 2, arguments.pairs, arguments.seed), "growing sets": growing_sets(damage)}
    for name, plans in groups.items():
        true = torch.tensor([max(0.0, effect.kl) for effect in skip(plans)], dtype=torch.float64)
        for rule, predicted in set_damages(damage, plans).items():
            found = rank_correlation(predicted, true)
            ratio = (true / predicted).nanmedian().item()
            print(f"{kv:7} {name:13} {rule:8} Spearman {_cell(found)}, median of true / predicted {ratio:.2f}")
            results[f"{name}, {rule}"] = {**found.to_json(), "median_ratio": ratio}
    return results


def _show(kv: str, figures: Mapping[str, Mapping[str, Mapping[str, RankCorrelation]]]) -> None:
    for name, kinds in figures.items():
        for kind, scopes in kinds.items():
            cells = "   ".join(f"{scope} {_cell(scopes[scope])}" for scope in SCOPES)
            print(f"{kv:7} {name:24} {kind:10} {cells}", flush=True)


def _cell(found: RankCorrelation) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _json(figures: Mapping[str, Mapping[str, Mapping[str, RankCorrelation]]]) -> dict[str, Any]:
    return {
        name: {kind: {scope: found.to_json() for scope, found in scopes.items()} for kind, scopes in kinds.items()}
        for name, kinds in figures.items()
    }


if __name__ == "__main__":
    main()
