"""Operating points of a gated checkpoint: a threshold for a budget, or one whose risk is certified."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from skipit.eval.measure.certificate import Certificate, certify_thresholds, gate_logits
from skipit.eval.measure.runner import run_dataset
from skipit.router import Gated, InputError, find_router
from skipit.router.checkpoint import ROUTER_FILE, load, load_router
from skipit.router.config import point_name
from skipit.router.errors import CheckpointError, short
from skipit.router.folders import claimed, load_json, provenance, save_json
from skipit.theory.calibrate import Met, Took, meet
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.risk import NotCertifiedError, allowed_errors, check_rows, threshold_grid
from skipit.theory.time_model import TimeModel, point_of
from skipit.train.card import CERTIFICATES, LATENCIES, PROVENANCE_FILE, checkpoint_record, shares_of, update_points
from skipit.train.data.collate import Collator, batches
from skipit.train.data.rows import Rows, pictures
from skipit.train.data.sources import on_gpu
from skipit.train.data.used import RECORD, Noted, also_used, fingerprints, held_out
from skipit.train.export import check_exported
from skipit.train.run import least_share

NEAR = 0.01  # of the dense FLOPs, between what is asked for and what is spent
FEW = 32  # rows that are answered to see whether any is right
GRID_ROWS = 32  # choose the thresholds to test, and are not tested on


def certify_checkpoint(
    folder: str | Path,
    rows: Any,
    risk: float,
    confidence: float = 0.95,
    *,
    name: str = "certified",
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Certificate:
    """Store the fastest threshold whose answers are certified to be the dense model's own.

    With probability `confidence` over the draw of the rows, at most a share `risk` of new rows like these is answered
    differently from the checkpoint's own dense model, in any token of its greedy answer. Labels are not needed.

    Args:
        folder: a gated checkpoint; its router_config.json gets the operating point, its certificates.json the record.
        rows: held out, in the conversational vision format; of rows with the same images one is taken, because
            several questions about one picture are not independent, and none that the checkpoint was made from.
        risk: in (0, 1).
        confidence: in (0, 1).
        name: of the operating point.
        seed: of the order of rows, the first of which choose the thresholds.
        batch_size: rows per call.
        max_new_tokens: longest answer.
        overwrite: replace an operating point of this name.
        progress: called with the number of rows of each finished batch.

    Returns:
        The certificate, whose `chosen` is what was stored.

    Raises:
        NotCertifiedError: no threshold passes; the checkpoint is unchanged.
        InputError: too few rows to certify anything, or a `name` that is a number.
        CheckpointError: not a gated checkpoint, the name is taken, or the folder cannot be written.
    """
    folder = Path(folder)
    if not name or _is_number(name):
        raise InputError(f"`name`: got {short(name)}, expected a word: numbers are the names of budgets.")
    with claimed_point(folder, name, overwrite):
        _, used = held_out(checkpoint_record(folder), Rows(rows))
        independent = independent_rows(rows, seed)
        order = [number for number in independent if not used[number]]
        chosen, tested = order[:GRID_ROWS], order[GRID_ROWS:]
        try:
            check_rows(len(tested), risk, confidence)
        except InputError as error:
            made = (
                f"{taken} others were used to make the checkpoint, " if (taken := len(independent) - len(order)) else ""
            )
            raise InputError(
                f"{error} Of {len(rows)} rows, {len(rows) - len(independent)} have images that another has too, "
                f"{made}and {len(chosen)} choose the thresholds to test."
            ) from error
        model, processor = load(folder)
        model = on_gpu(model)
        collate = Collator(processor, with_completion=False)
        grid = threshold_grid(gate_logits(model, _select(rows, chosen), collate, batch_size))
        certificate = certify_thresholds(
            model,
            _select(rows, tested),
            collate,
            grid=grid,
            risk=risk,
            confidence=confidence,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        if certificate.chosen is None:
            raise NotCertifiedError(_refusal(certificate))
        record = {**certificate.to_json(), "max_new_tokens": max_new_tokens, "seed": seed, "model": fingerprint(model)}
        read = fingerprints(Rows(_select(rows, order)))
        store_point(folder, name, certificate.chosen.threshold, record, certificate.chosen.compute, read)
        return certificate


def budget_checkpoint(
    folder: str | Path,
    rows: Any,
    budget: float,
    *,
    in_time: bool = False,
    batch_size: int = 16,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Met:
    """Store the threshold that spends a budget on held-out rows, under the budget's own name.

    Args:
        folder: a gated checkpoint.
        rows: held out, in the conversational vision format.
        budget: share of the dense decoder's FLOPs to spend.
        in_time: it is a share of the dense layers' time for a prompt instead, as `skipit bench` measured it here.
        batch_size: rows per call.
        overwrite: replace an operating point of this name.
        note: called with what is wrong with the point: it spends another share, or answers nothing right.

    Returns:
        The threshold, and what was measured at it.

    Raises:
        CheckpointError: not a gated checkpoint, the budget is calibrated already, or the folder cannot be written.
        InputError: no gates can be as fast, or nothing was measured of such layers on this machine.
    """
    folder, name = Path(folder), point_of(budget) if in_time else point_name(budget)
    with claimed_point(folder, name, overwrite):
        model, processor = load(folder)
        model = on_gpu(model)
        times = TimeModel.of(model) if in_time else None
        collate, read, kv = Collator(processor), Noted(), find_router(model)[1].config.kv
        given = list(batches(Rows(rows, read.noting(collate.checked)), collate, batch_size))
        if times is not None:
            times.times.check(budget, least_share(given, times, kv, find_router(model)[1].config.unit), kv)
        met = meet(model, given, CostModel.of(model), budget, kv, times=times)
        store_point(folder, name, met.threshold, None, met.flops, read.packed(), met.took)
    share = met.took.share if met.took else met.flops
    if abs(share - budget) > NEAR:
        note(f"{share:.1%} is as near to {budget:.1%} as its gates come: what they spend jumps between two thresholds.")
    few = _select(rows, list(range(min(FEW, len(rows)))))
    if not _right(model, processor, few, policy=Gated(met.threshold)) and (
        dense := _right(model, processor, few, mode="dense")
    ):
        note(
            f"at this point none of {len(few)} rows is answered right; without skipping {dense} are. `skipit train` to "
            "this budget, or choose a larger one."
        )
    return met


def _right(model: Any, processor: Any, rows: Any, **options: Any) -> int:
    """How many rows are answered right."""
    collate, kv = Collator(processor, with_completion=False), find_router(model)[1].config.kv
    found = run_dataset(model, processor, Rows(rows), collate, CostModel.of(model), kv, **options)  # type: ignore[arg-type]
    return int(found.recorded.right.sum())


@contextmanager
def claimed_point(folder: Path, name: str, overwrite: bool) -> Iterator[None]:
    """Keep a checkpoint for this process, and refuse a name that is taken before anything is measured.

    Raises:
        CheckpointError: not a gated checkpoint, the name is taken, or another process writes the folder.
    """

    def check() -> None:
        check_exported(folder)
        config, _ = load_router(folder)
        if name in config.operating_points and not overwrite:
            raise CheckpointError(
                f"{folder} has an operating point {short(name)} already. Choose another name, or pass --overwrite to "
                "replace it."
            )

    with claimed(folder, check):
        yield


def independent_rows(rows: Any, seed: int = 0) -> list[int]:
    """Numbers of rows in random order, one for each set of images; rows without images all count."""
    seen: set[str] = set()
    kept = []
    for number in np.random.default_rng(seed).permutation(len(rows)).tolist():
        key = _image_key(rows[number], f"row {number}")
        if key is None or key not in seen:
            kept.append(number)
        if key is not None:
            seen.add(key)
    return kept


def store_point(
    folder: Path,
    name: str,
    threshold: float,
    record: dict[str, Any] | None,
    share: float | None = None,
    read: str | None = None,
    took: Took | None = None,
) -> None:
    """Write an operating point into a checkpoint, and what is certified about it, or that nothing is.

    Each file is replaced whole, the threshold last: whoever reads an operating point finds its record, and a point that
    is replaced is gone until its new record is there. The measured shares of dense FLOPs and time and the rows
    that were read are noted beside how the checkpoint was made, the shares in its card.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    config, _ = load_router(folder)
    settings = load_json(folder / ROUTER_FILE)  # all else stays in its format, which the code in the folder reads
    path = folder / CERTIFICATES
    records = load_json(path) if path.exists() else {}
    records.pop(name, None)
    if record is not None:
        records[name] = {**record, "made_by": provenance()}
    if name in config.operating_points:  # never a threshold beside another's record
        points = {other: at for other, at in config.operating_points.items() if other != name}
        save_json(folder / ROUTER_FILE, {**settings, "operating_points": points})
    if records or path.exists():
        save_json(path, records)
    provenance_path = folder / PROVENANCE_FILE
    made = load_json(provenance_path) if provenance_path.is_file() else {}
    latencies = {other: value for other, value in (made.get(LATENCIES) or {}).items() if other != name}
    measured = {
        "calibrated_shares": {**shares_of(made), **({} if share is None else {name: share})},
        LATENCIES: {**latencies, **({} if took is None else {name: took.to_json()})},
    }
    if made:
        save_json(provenance_path, {**made, **measured, RECORD: also_used(made, "calibrated", read)})
    changed = config.with_point(name, threshold)
    update_points(folder, changed, measured, records)
    # Last: the point is there when all about it is.
    save_json(folder / ROUTER_FILE, {**settings, "operating_points": changed.operating_points})


def _refusal(certificate: Certificate) -> str:
    first = certificate.trials[0]
    most = allowed_errors(certificate.rows, certificate.risk, 1 - certificate.confidence)
    return (
        f"no threshold is certified for a risk of {certificate.risk:g} with confidence {certificate.confidence:g}: at "
        f"the safest one ({first.compute:.1%} of the dense decoder's FLOPs) {first.disagreements} of "
        f"{certificate.rows} answers differ from the dense model's, at most {most} may. The checkpoint is unchanged. "
        "Allow a higher --risk, give more --samples, or train longer."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _image_key(row: Any, where: str) -> str | None:
    try:
        images = pictures(row, where)
    except InputError:  # whoever answers the row names it
        return repr(row["images"])
    if not images:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        pixels = np.ascontiguousarray(image)
        digest.update(str(pixels.shape).encode() + pixels.tobytes())
    return digest.hexdigest()


def _select(rows: Any, numbers: list[int]) -> Any:
    return rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]
