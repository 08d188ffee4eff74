"""Does the theory predict what skipping does? Profile against controlled skipping: scripts/study prediction.

Predictions come from the calibration split, the truth from the same rows and, out of sample, from the test split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.eval.claims.prediction import (
    SCOPES,
    RankCorrelation,
    by_scope,
    plan_without,
    rank_correlation,
    set_damages,
)
from skipit.eval.measure.controlled import Effect, effects, one_unit_skipped, skipping_table
from skipit.eval.plots import plot_scatter
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.theory.profile import Profile, profile
from skipit.theory.redundancy import prox

from .contribution import layer_contribution
from .study import REFERENCE, Study, command

KINDS: tuple[KVPolicy, ...] = ("retain", "evict")
LC_ROWS = 40  # as many as ShortV uses
DISTANCES = (0.001, 0.01, 0.1)


@dataclass(frozen=True)
class Prediction(Study):
    """A study of what the theory predicts; its test rows are as many as its calibration rows.

    Attributes:
        set_samples: rows for sets of units.
        pairs: random pairs of units.
        draws: of the profile.
    """

    set_samples: int = 48
    pairs: int = 24
    draws: int = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Print rank correlations, and optionally save JSON and figures."""
    parser = command(__name__, __doc__, out=None, samples=192, seed=0, model=REFERENCE)
    sizes = {"set-samples": "rows for sets of units", "pairs": "random pairs of units", "draws": "of the profile"}
    for name, what in sizes.items():
        default = getattr(Prediction, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default %(default)s)")
    given = parser.parse_args(argv)
    study = Prediction.of(given, given.seed)
    if study.out is not None:
        study.out.mkdir(parents=True, exist_ok=True)
    results = bench(study)
    if study.out is not None:
        save_json(study.out / "prediction.json", {"results": results, "made_by": provenance()})


def bench(study: Prediction) -> dict[str, Any]:
    """Measure everything, print it, draw it, and return it."""
    model = study.gated
    splits = {
        "same rows": study.read("calibration", study.samples),
        "new rows": study.read("test", study.samples),
    }
    measured = profile(study.dense[0], splits["same rows"], draws=study.draws, seed=study.seed)
    contribution = layer_contribution(model, study.read("calibration", min(LC_ROWS, study.samples)))
    few = study.read("test", study.set_samples)
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
            "sets": _sets(tables["damage"], kv, study, partial(effects, model, few, kv=kv)),
        }
        if study.out is not None:
            labels = ("predicted damage (nats per answer token)", f"KL of skipping, {kv} (nats per answer token)")
            plot_scatter(study.out / f"damage_{kv}.png", tables["damage"], truth["new rows"], labels, diagonal=True)
    return results


def predictors(profile: Profile, kv: KVPolicy) -> dict[str, Float[Tensor, "layers modality"]]:
    """What a profile says about skipping each unit, small where redundant.

    Args:
        profile: of the model.
        kv: policy of the skips to predict; only the damage knows it.

    Returns:
        `damage`, `geometric`, `relative update`, `proximal t` at a few t, `block influence` (ShortGPT: the geometric
        redundancy of all tokens together, hence equal for both modalities) and `VAR` (of vision units).
    """
    attention = profile.var_text.double()
    return {
        "damage": profile.damage[kv].unit.double(),
        "geometric": profile.geometric.double(),
        "relative update": profile.update.double(),
        **{f"proximal {t:g}": prox(profile.histogram, t) for t in DISTANCES},
        "block influence": profile.block_influence[:, None].expand(-1, 2),
        "VAR": torch.stack([torch.full_like(attention, torch.nan), attention], dim=-1),
    }


def growing_sets(damage: Float[Tensor, "layers modality"]) -> list[Bool[Tensor, "layers modality"]]:
    """Plans (True runs) that skip the unit of least damage, the two of least damage, and so on up to all."""
    order = damage.flatten().nan_to_num(torch.inf).argsort().tolist()
    return [plan_without(order[: size + 1], len(damage)) for size in range(int(damage.isfinite().sum()))]


def random_sets(
    damage: Float[Tensor, "layers modality"], size: int, number: int, seed: int = 0
) -> list[Bool[Tensor, "layers modality"]]:
    """Plans (True runs) that skip `size` units drawn at random, such as pairs."""
    generator = torch.Generator().manual_seed(seed)
    units = damage.flatten().isfinite().nonzero()[:, 0]
    drawn = [units[torch.randperm(len(units), generator=generator)[:size]].tolist() for _ in range(number)]
    return [plan_without(chosen, len(damage)) for chosen in drawn]


def _sets(damage: Tensor, kv: str, study: Prediction, skip: Callable[[list[Tensor]], list[Effect]]) -> dict[str, Any]:
    """Pairs and growing sets of units: predicted from their single damages, and measured."""
    results: dict[str, Any] = {}
    groups = {"pairs": random_sets(damage, 2, study.pairs, study.seed), "growing sets": growing_sets(damage)}
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
