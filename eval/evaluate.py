"""Evaluating a gated checkpoint: everything that eval.json holds, and the report made of it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipit.eval.claims.alignment import align
from skipit.eval.claims.controlled_skipping import controlled_skipping
from skipit.eval.claims.pattern import outer_layers, row_skip_rates
from skipit.eval.claims.spending import asked_cells, measure_spending
from skipit.eval.claims.tracking import track
from skipit.eval.measure.answer import depth_examples
from skipit.eval.measure.latency import hardware
from skipit.eval.measure.parts import Parts
from skipit.eval.measure.recorded import Recorded
from skipit.eval.measure.runner import Outcome, answerable, right_answer, run_dataset
from skipit.eval.metrics.vqa import Metric
from skipit.eval.report.sweeps import load_baselines, load_transfer
from skipit.eval.report.whole import report
from skipit.eval.statistics import paired_difference
from skipit.router import RouterConfig, find_router
from skipit.router.checkpoint import ROUTER_FILE, gates_file
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, new_directory, provenance, save_json
from skipit.router.paths import check_there
from skipit.theory.artefact import load_profile, profile_tables
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.partial import digest
from skipit.theory.plan import points_text
from skipit.theory.profile import Profile
from skipit.train.adapter import load, load_with_dense
from skipit.train.card import ADAPTER_CONFIG, EVALUATION, checkpoint_record
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Broken, Rows, readable
from skipit.train.data.sources import load_data, name_data, on_gpu
from skipit.train.data.used import held_out
from skipit.train.display import loading, note, progress
from skipit.train.export import check_exported, check_profile
from skipit.train.lora import ADAPTER_WEIGHTS

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
        columns: the data's own names of `images`, `prompt`, `completion` and `answer`, where they differ.
        max_broken_rows: rows that may be unreadable; they are named and left out.
        max_new_tokens: longest answer.
        metric: by which answers are scored.
        compiled: time the dense model compiled, too.
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
    columns: Mapping[str, str] | None = None
    max_broken_rows: int = 0
    max_new_tokens: int = 64
    metric: Metric = "usual"
    compiled: bool = True


@dataclass
class _Bench:
    """What all parts of an evaluation share."""

    request: Request
    model: Any
    processor: Any
    dense: Any
    rows: Rows
    profile: Profile | None
    parts: Parts
    made: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(request: Request, out: Path, overwrite: bool = False, resume: bool = False) -> Comparison:
    """Measure everything that was asked for, and write eval.json and report.html into a new folder.

    Every part that is done is kept beside the folder, in `OUT.partial`, until it is whole.

    Args:
        request: what to evaluate.
        out: folder to make.
        overwrite: replace it, and forget what is kept.
        resume: go on from what is kept of an evaluation that was stopped.

    Raises:
        SkipItError: something cannot be read or written, or does not belong together; what is done is kept.
    """
    # What is cheap to refuse comes first.
    check_exported(request.checkpoint)
    parts = Parts(out.parent / f"{out.name}.partial", resume=resume, overwrite=overwrite)
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
        model, dense = on_gpu(model), on_gpu(dense)
        found = load_data(request.data, request.split, request.samples, request.seed, columns=request.columns)
        collate = Collator(processor, with_completion=False)
        found = readable(found, answerable(collate), Broken(request.max_broken_rows, note))
    # Pictures may be files, bytes or one without a list: whoever asks for a row finds them open.
    rows = Rows(found, collate.checked)
    if measured is not None:
        check_profile(measured, request.checkpoint, dense)
    held, _ = held_out(checkpoint_record(request.checkpoint), rows)
    bench = _Bench(request, model, processor, dense, rows, measured, parts)
    parts.begin(_settings(bench))
    with progress("eval", 2 * len(rows)) as advance:

        def keep(name: str, answer: Callable[[], Outcome]) -> Outcome:
            if parts.holds(name):
                advance(len(rows))
            return parts.outcome(name, answer)

        result = compare(
            dense,
            {"gated": model},
            processor,
            rows,
            measured,
            repeats=request.repeats,
            compile_dense=request.compiled,
            max_new_tokens=request.max_new_tokens,
            metric=request.metric,
            kinds=asked_cells(model.config) if request.controlled_samples else None,
            keep=keep,
            progress=advance,
            held_out=held,
        )
    values, pictures = _values(bench, result)
    values["held_out"] = held.to_json()
    config = find_router(model)[1].config
    made = {"eval": made_now(request.seed), "checkpoint": made_checkpoint(request.checkpoint, "the checkpoint", config)}
    if request.profile is not None and measured is not None:
        made["profile"] = made_profile(request.profile, measured)
    values |= {**sweeps, "made": {**made, **made_sweeps(sweeps), **bench.made}, "made_by": provenance()}
    with new_directory(out, overwrite) as folder:
        save_json(folder / EVALUATION, values)
        # From the file: the page can show nothing that is not in it.
        (folder / REPORT).write_text(report(load_json(folder / EVALUATION), pictures), encoding="utf-8")
    parts.remove()
    return result


def _settings(bench: _Bench) -> dict[str, Any]:
    """What must be the same when an evaluation goes on: the request, the models, their gates and the rows.

    Raises:
        InputError: a row cannot be read or has no answer, which is better found before hours of work.
    """
    request = bench.request
    settings = {**asdict(request), "data": name_data(request.data), "rows": _fingerprint(bench.rows)}
    routers = {"gated": request.checkpoint, **{name: path for name, path in request.also}}
    settings["routers"] = {name: _gates(path) for name, path in routers.items()}
    settings["models"] = [fingerprint(model) for model in (bench.dense, bench.model)]
    if bench.profile is not None:
        settings["tables"] = digest(profile_tables(bench.profile)).hex()
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _fingerprint(rows: Rows) -> str:
    """A hash of everything that rows hold."""
    found = hashlib.sha256()
    with progress("read", len(rows)) as advance:
        for number, row in enumerate(rows):
            right_answer(row, number)
            media = [np.asarray(item) for name in ("images", "videos") for item in row.get(name) or ()]
            rest = {name: value for name, value in row.items() if name not in ("images", "videos")}
            found.update(repr((rest, [(item.shape, str(item.dtype)) for item in media])).encode())
            for item in media:
                found.update(np.ascontiguousarray(item).data)
            advance(1)
    return found.hexdigest()


def _gates(checkpoint: Path) -> str:
    """A hash of a checkpoint's gates, their settings, and its adapter's tensors."""
    files = (checkpoint / ROUTER_FILE, gates_file(checkpoint), checkpoint / ADAPTER_WEIGHTS)
    contents = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _values(bench: _Bench, result: Comparison) -> tuple[dict[str, Any], list[Any]]:
    """Everything that is measured here, and the images of the examples."""
    request, profile = bench.request, bench.profile
    config = find_router(bench.model)[1].config
    values: dict[str, Any] = result.to_json()
    dense, gated = result.outcomes["dense"], result.outcomes["gated"]
    rows: Any = bench.rows
    kinds = [str(row.get("kind", "all")) for row in rows]
    values["gated"]["difference"] = _differences(dense, gated, kinds)
    values["also"] = [_further(bench, name, path, dense, kinds) for name, path in request.also]
    if profile is not None:
        values["theory"] = {name: table.tolist() for name, table in theory_tables(profile, config.kv).items()}
    rates: Any = gated.skip_rate[:, 1].numpy()
    if request.controlled_samples:
        values |= bench.parts.values("spending", lambda: _spending(bench, dense.recorded, gated.recorded))
        rates = row_skip_rates(gated.recorded.records).numpy()
        if profile is not None:
            skips = torch.from_numpy(theory_skips(profile, gated, config.kv))
            values["alignment"] = align(gated.recorded.records, skips).to_json()
    if profile is not None and (pattern := outer_layers(profile, rates)) is not None:
        values["pattern"] = pattern
    few = [rows[number] for number in range(min(request.controlled_samples, len(rows)))]
    if few and profile is not None:
        values |= controlled_skipping(bench.dense, bench.processor, few, profile, config.kv, keep=bench.parts.values)
        values["units"]["generated_accuracy"] = float(dense.recorded.right[: len(few)].double().mean())
    values["examples"], pictures, why = depth_examples(bench.model, bench.processor, rows, request.budget)
    values["no_examples"] = why
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


def _spending(bench: _Bench, dense: Recorded, gated: Recorded) -> dict[str, Any]:
    rows: Any = bench.rows
    with progress("spending", len(rows)) as advance:
        spending = measure_spending(
            dense, gated, bench.dense, bench.processor, rows, CostModel.of(bench.model), progress=advance
        )
    return {"adaptivity": spending.adaptivity.to_json(), "calibration": spending.confidence.to_json()}


def _further(bench: _Bench, name: str, path: Path, dense: Outcome, kinds: Sequence[str]) -> dict[str, Any]:
    """A further router on the same rows: loaded, measured and let go, so that never more than one more is in memory."""
    with loading(f"loading {name}"):
        model, processor = load(path, bench.request.base if _is_adapter(path) else None)
        model = on_gpu(model)
    config = find_router(model)[1].config
    kv = config.kv
    collate, costs = Collator(processor, with_completion=False), CostModel.of(bench.dense)
    rows: Any = bench.rows
    how: dict[str, Any] = {"max_new_tokens": bench.request.max_new_tokens, "metric": bench.request.metric}
    part = f"also-{len(bench.made) + 1}"
    with progress(name[:10], len(rows)) as advance:
        outcome = bench.parts.outcome(
            part,
            lambda: run_dataset(model, processor, rows, collate, costs, kv, progress=advance, **how),
        )
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
    router["made"] = part
    bench.made[part] = made_checkpoint(path, f"router {name!r}", config)
    return router


def _check_further(path: Path, checkpoint: Path) -> None:
    """Refuse a further router that is none, or was made from another model, before hours of work."""
    check_exported(path)
    check_there(path)
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


def made_now(seed: int) -> dict[str, Any]:
    """This evaluation itself.

    Args:
        seed: of its rows.
    """
    note = "Seed of the rows; intervals and p-values have seed 0."
    return {"title": "this evaluation", **provenance(), "seed": seed, "hardware": hardware(), "note": note}


def made_checkpoint(path: Path, title: str, config: RouterConfig) -> dict[str, Any]:
    """A gated checkpoint, from its record and its router's settings."""
    record = checkpoint_record(path)
    run = record.get("config") or {}
    made = record.get("made_by") or record.get("exported_by") or {}
    steps = f"{run['steps']} steps, " if run.get("steps") else ""
    began = f"gates began as {record['init']!r}" if record.get("init") else "no record of how its gates began"
    note = f"{path}: {steps}{began}; they decide by the states that enter {points_text(config.decide_at)}."
    return {"title": title, **made, "seed": run.get("seed"), "note": note}


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
