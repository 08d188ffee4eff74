"""Evaluating a gated checkpoint: everything that eval.json holds, and the report made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skipit.eval.claims.alignment import align
from skipit.eval.claims.controlled_skipping import controlled_skipping
from skipit.eval.claims.pattern import outer_layers
from skipit.eval.claims.spending import asked_cells, measure_spending
from skipit.eval.claims.tracking import track
from skipit.eval.measure.answer import depth_examples
from skipit.eval.measure.latency import hardware
from skipit.eval.measure.runner import Outcome, answerable, run_dataset
from skipit.eval.report.sweeps import load_baselines, load_transfer
from skipit.eval.report.whole import report
from skipit.eval.statistics import paired_difference
from skipit.router import find_router
from skipit.router.checkpoint import ROUTER_FILE
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, new_directory, provenance, save_json
from skipit.theory.artefact import load_profile
from skipit.theory.cost import CostModel
from skipit.theory.profile import Profile
from skipit.train.adapter import load, load_with_dense
from skipit.train.card import ADAPTER_CONFIG, EVALUATION, PROVENANCE_FILE
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Broken, Rows, readable
from skipit.train.data.sources import load_data
from skipit.train.display import loading, note, progress
from skipit.train.export import check_profile

from .compare import Comparison, compare, theory_skips, theory_tables

REPORT = "report.html"
SWEEPS = {"baselines": "the comparison with baselines", "transfer": "the study of transfer"}


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        checkpoint: made by `skipit export`, with or without `--adapter`.
        data: what `load_data` takes.
        split: of the data.
        samples: rows to answer.
        seed: of the data.
        base: dense model to compare with; None is the checkpoint's own weights, of an adapter its base.
        budget: an operating point; None is the trained one.
        profile: folder of the theory's measurements.
        repeats: of the timing.
        also: further routers by name, made from the same base; names may repeat.
        baselines: folder of `scripts/study peers`.
        transfer: folder of `scripts/study transfer`.
        controlled_samples: rows of controlled skipping; 0 leaves it out, and spending by input and calibration.
        max_broken_rows: rows that may be unreadable; they are named and left out.
    """

    checkpoint: Path
    data: str
    split: str = "test"
    samples: int = 300
    seed: int = 0
    base: str | None = None
    budget: float | str | None = None
    profile: Path | None = None
    repeats: int = 15
    also: Sequence[tuple[str, Path]] = ()
    baselines: Path | None = None
    transfer: Path | None = None
    controlled_samples: int = 48
    max_broken_rows: int = 0


@dataclass
class _Bench:
    """What all parts of an evaluation share."""

    request: Request
    model: Any
    processor: Any
    dense: Any
    rows: Any
    profile: Profile | None
    made: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(request: Request, out: Path, overwrite: bool = False) -> Comparison:
    """Measure everything that was asked for, and write eval.json and report.html into a new folder.

    Raises:
        SkipItError: something cannot be read, or does not belong together; nothing is written.
    """
    # What is cheap to refuse comes first.
    sweeps: dict[str, Any] = {}
    if request.baselines is not None:
        sweeps["baselines"] = load_baselines(request.baselines)
    if request.transfer is not None:
        sweeps["transfer"] = load_transfer(request.transfer)
    for _, path in request.also:
        _check_further(path, request.checkpoint)
    measured = load_profile(request.profile) if request.profile else None
    with loading("loading"):
        model, processor, dense = load_with_dense(request.checkpoint, request.base, budget=request.budget)
        rows = load_data(request.data, request.split, request.samples, request.seed)
        check = answerable(Collator(processor, with_completion=False))
        rows = readable(rows, check, Broken(request.max_broken_rows, note))
    if measured is not None:
        check_profile(measured, request.checkpoint, dense)
    bench = _Bench(request, model, processor, dense, rows, measured)
    with progress("eval", 2 * len(rows)) as advance:
        result = compare(
            dense,
            {"gated": model},
            processor,
            rows,
            measured,
            repeats=request.repeats,
            kinds=asked_cells(model.config) if request.controlled_samples else None,
            progress=advance,
        )
    values, pictures = _values(bench, result)
    made = {"eval": made_now(request.seed), "checkpoint": made_checkpoint(request.checkpoint, "the checkpoint")}
    if request.profile is not None and measured is not None:
        made["profile"] = made_profile(request.profile, measured)
    values |= {**sweeps, "made": {**made, **made_sweeps(sweeps), **bench.made}, "made_by": provenance()}
    with new_directory(out, overwrite) as folder:
        save_json(folder / EVALUATION, values)
        # From the file: the page can show nothing that is not in it.
        (folder / REPORT).write_text(report(load_json(folder / EVALUATION), pictures), encoding="utf-8")
    return result


def _values(bench: _Bench, result: Comparison) -> tuple[dict[str, Any], list[Any]]:
    """Everything that is measured here, and the images of the examples."""
    request, profile = bench.request, bench.profile
    config = find_router(bench.model)[1].config
    values: dict[str, Any] = result.to_json()
    dense, gated = result.outcomes["dense"], result.outcomes["gated"]
    kinds = [str(row.get("kind", "all")) for row in Rows(bench.rows)]
    values["gated"]["difference"] = _differences(dense, gated, kinds)
    values["also"] = [_further(bench, name, path, dense, kinds) for name, path in request.also]
    if profile is not None:
        values["theory"] = {name: table.tolist() for name, table in theory_tables(profile, config.kv).items()}
    rates: Any = gated.skip_rate[:, 1].numpy()
    if request.controlled_samples:
        rows: Any = Rows(bench.rows)
        costs = CostModel.of(bench.model)
        with progress("spending", len(rows)) as advance:
            spending = measure_spending(
                dense.recorded, gated.recorded, bench.dense, bench.processor, rows, costs, progress=advance
            )
        rates = spending.skip_rates.numpy()
        values |= {"adaptivity": spending.adaptivity.to_json(), "calibration": spending.confidence.to_json()}
        if profile is not None:
            skips = torch.from_numpy(theory_skips(profile, gated, config.kv))
            values["alignment"] = align(gated.recorded.records, skips).to_json()
    if profile is not None and (pattern := outer_layers(profile, rates)) is not None:
        values["pattern"] = pattern
    few = Rows(bench.rows.select(range(min(request.controlled_samples, len(bench.rows)))))
    if request.controlled_samples and profile is not None:
        values |= controlled_skipping(bench.dense, bench.processor, few, profile, config.kv)
    values["examples"], pictures = depth_examples(bench.model, bench.processor, Rows(bench.rows), request.budget)
    record = checkpoint_record(request.checkpoint)
    values["settings"] = {
        "checkpoint": str(request.checkpoint),
        "data": request.data,
        "split": request.split,
        "seed": request.seed,
        "base": request.base or record.get("base") or str(request.checkpoint),
        # A gated checkpoint holds fine-tuned weights: without gates they are not the model that was fine-tuned.
        "dense": "without gates" if request.base is None and not _is_adapter(request.checkpoint) else "untouched",
        "budget": str(request.budget or "as trained"),
        "kv": config.kv,
        "init": record.get("init"),
        "controlled_samples": request.controlled_samples,
    }
    return values, pictures


def _further(bench: _Bench, name: str, path: Path, dense: Outcome, kinds: Sequence[str]) -> dict[str, Any]:
    """A further router on the same rows: loaded, measured and let go, so that never more than one more is in memory."""
    with loading(f"loading {name}"):
        model, processor = load(path, bench.request.base if _is_adapter(path) else None)
    kv = find_router(model)[1].config.kv
    collate, costs = Collator(processor, with_completion=False), CostModel.of(bench.dense)
    rows: Any = Rows(bench.rows)
    with progress(name[:10], len(rows)) as advance:
        outcome = run_dataset(model, processor, rows, collate, costs, kv, progress=advance)
    router: dict[str, Any] = {
        "name": name,
        "checkpoint": str(path),
        "init": checkpoint_record(path).get("init"),
        **outcome.to_json(),
    }
    same = [a == b for a, b in zip(outcome.answers, dense.answers, strict=True)]
    router["same_answer"] = sum(same) / len(same)
    router["difference"] = _differences(dense, outcome, kinds)
    router["tracking"] = None
    if bench.profile is not None:
        tables, skips = theory_tables(bench.profile, kv), theory_skips(bench.profile, outcome, kv)
        router["tracking"] = track(outcome.skip_rate.numpy(), tables, skips).to_json()
    router["made"] = f"also-{len(bench.made) + 1}"
    bench.made[router["made"]] = made_checkpoint(path, f"router {name!r}")
    return router


def _check_further(path: Path, checkpoint: Path) -> None:
    """Refuse a further router that is none, or was made from another model, before hours of work."""
    if not (path / ROUTER_FILE).is_file():
        raise CheckpointError(f"{path} has no {ROUTER_FILE}: it is no gated checkpoint. Make one with `skipit export`.")
    ours, theirs = checkpoint_record(checkpoint).get("model"), checkpoint_record(path).get("model")
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{path} was made from a model with fingerprint {theirs}, {checkpoint} from one with {ours}. "
            "Routers are compared on one base: leave it out of --also."
        )


def _differences(dense: Outcome, other: Outcome, kinds: Sequence[str]) -> dict[str, Any]:
    """Of the accuracy over all rows, and of every kind."""
    first, second = dense.recorded.right.tolist(), other.recorded.right.tolist()
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        here = [number for number, of in enumerate(kinds) if of == kind]
        pairs = ([first[i] for i in here], [second[i] for i in here])
        by_kind[kind] = paired_difference(*pairs).to_json()
    return {"all": paired_difference(first, second).to_json(), "kinds": by_kind}


def _is_adapter(checkpoint: Path) -> bool:
    return (checkpoint / ADAPTER_CONFIG).is_file()


def checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of how it was made; empty if it says nothing."""
    path = checkpoint / PROVENANCE_FILE
    return load_json(path) if path.is_file() else {}


def made_now(seed: int) -> dict[str, Any]:
    """This evaluation itself.

    Args:
        seed: of its rows.
    """
    note = "Seed of the rows; intervals and p-values have seed 0."
    return {"title": "this evaluation", **provenance(), "seed": seed, "hardware": hardware(), "note": note}


def made_checkpoint(path: Path, title: str) -> dict[str, Any]:
    """A gated checkpoint, from its record."""
    record = checkpoint_record(path)
    config = record.get("config") or {}
    made = record.get("made_by") or record.get("exported_by") or {}
    steps = f"{config['steps']} steps, " if config.get("steps") else ""
    began = f"gates began as {record['init']!r}" if record.get("init") else "no record of how its gates began"
    return {"title": title, **made, "seed": config.get("seed"), "note": f"{path}: {steps}{began}."}


def made_profile(path: Path, profile: Profile) -> dict[str, Any]:
    """The theory's measurements, from their record."""
    about = profile.about
    record = load_json(path / "profile.json").get("made_by") or {}
    note = f"{path}: {about.get('rows')} rows, {about.get('draws')} draws of answers per row."
    return {"title": "the theory's profile", **record, "seed": about.get("seed"), "note": note}


def made_sweeps(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Studies that were read, not measured."""
    note = "Read from its folder, not measured again."
    return {name: {"title": SWEEPS[name], **sweep["made_by"], "note": note} for name, sweep in sweeps.items()}
