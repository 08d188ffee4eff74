"""From runs and plans to gated checkpoints."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from skipit.router import find_router
from skipit.router.attach import attach, set_gates
from skipit.router.checkpoint import OLD_GATES_FILE, ROUTER_FILE, load_dense, load_router, save_gated, save_router
from skipit.router.config import RouterConfig
from skipit.router.errors import CheckpointError, InputError
from skipit.router.files import CONFIG
from skipit.router.folders import check_out, claimed, load_json, new_directory, provenance, save_json
from skipit.router.standalone import CODE, add_code
from skipit.theory.artefact import check_same_model, load_plan
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan
from skipit.theory.profile import Profile
from skipit.train.data.collate import Collator, batches, tried
from skipit.train.data.rows import Broken, readable
from skipit.train.data.sources import load_data, resolve_model

from .card import ADAPTER_CONFIG, LATENCIES, PROVENANCE_FILE, UNNAMED, read_evaluation, write_card
from .gating import attach_plan, meet_plan
from .lora import merge_lora
from .run_folder import ADAPTER, CONFIG_FILE, RUN_FILE, read_record

DATA = "data"  # of a profile's and a plan's record: its source, and how that was read
HOW_READ = ("split", "seed", "streaming", "shuffle_buffer", "columns")
MEETS_A_BUDGET = ("theory", "theory-bias")  # the other gates are constant
FEW = 32  # rows to measure a plan on


class Run(NamedTuple):
    """A finished run: its record, the router's settings, its gates, and the dense model it started from."""

    record: dict[str, Any]
    config: RouterConfig
    gates: dict[str, Tensor]
    model: Any
    processor: Any


def open_run(run: str | Path) -> Run:
    """Read a run folder and load its base.

    Raises:
        CheckpointError: not a finished run, or its base is not what it was.
    """
    run = Path(run)
    record, (config, gates) = read_record(run), load_router(run)
    model, processor = load_dense(resolve_model(record["base"]))
    if (now := fingerprint(model)) != record["model"]:
        raise CheckpointError(
            f"{run} was trained from a model with fingerprint {record['model']}; {record['base']} now has {now}."
        )
    return Run(record, config, gates, model, processor)


def merge_run(run: str | Path) -> tuple[Any, Any]:
    """The gated model of a run: LoRA merged into the weights, gates attached.

    Raises:
        CheckpointError: not a finished run, or its base is not what it was.
    """
    finished = open_run(run)
    attach(finished.model, finished.config)
    merged = merge_lora(finished.model, Path(run) / ADAPTER)
    set_gates(merged, **finished.gates)
    return merged, finished.processor


def export(run: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Turn a run into a gated checkpoint.

    Raises:
        CheckpointError: not a finished run, or `out` exists.
    """
    with claimed(out, lambda: check_out(Path(out), overwrite)):
        model, processor = merge_run(run)
        _save(model, processor, out, overwrite, load_json(Path(run) / RUN_FILE))


def export_plan(
    plan: str | Path,
    source: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Turn a plan into a gated checkpoint without training; `skipit calibrate` adds measured budgets to it.

    What a plan expects is of states that nothing was skipped for. So its threshold is moved until the model spends the
    plan's budget on some of the rows that were profiled, where the plan says which these were.

    Args:
        plan: made by `skipit plan`.
        source: its model.
        out: folder to make.
        overwrite: replace `out`.
        note: called with what was measured, or with why nothing was.

    Raises:
        CheckpointError: not a plan, of another model, or `out` exists.
    """
    gates = load_plan(plan)
    record = {"base": source, "model": gates.model, "budget": gates.budget, "init": gates.init, **gates.about}
    with claimed(out, lambda: check_out(Path(out), overwrite)):
        model, processor = load_dense(resolve_model(source))
        attach_plan(model, gates)
        if gates.init in MEETS_A_BUDGET:
            record |= _meet_budget(model, processor, gates, note)
        _save(model, processor, out, overwrite, record)


def _save(model: Any, processor: Any, out: str | Path, overwrite: bool, record: dict[str, Any]) -> None:
    """A gated checkpoint with the record of how it was made, and its card."""

    def finish(folder: Path) -> None:
        save_json(folder / PROVENANCE_FILE, {**record, "exported_by": provenance()})
        write_card(folder)

    save_gated(model, processor, out, overwrite=overwrite, finish=finish)


def _meet_budget(model: Any, processor: Any, plan: Plan, note: Callable[[str], None]) -> dict[str, Any]:
    """Move the default threshold to a plan's budget, on rows that were profiled; what was measured at it."""
    read = plan.about.get(DATA) or {}
    try:
        collate = Collator(processor)
        rows = load_data(read["source"], samples=FEW, **{name: read[name] for name in HOW_READ})
        met = meet_plan(model, list(batches(readable(rows, tried(collate), Broken(FEW)), collate, FEW // 4)), plan)
    except (KeyError, InputError) as error:
        why = "the profile does not say which rows it measured" if isinstance(error, KeyError) else str(error)
        note(
            f"the gates spend what the plan expects, not what was measured: {why}. `skipit calibrate` sets a budget as "
            "measured."
        )
        return {}
    router = find_router(model)[1]
    router.config = replace(router.config, threshold=met.threshold)
    note(f"executes {met.flops:.1%} of the dense decoder's FLOPs, as measured on rows that were profiled")
    if met.took is not None:
        note(f"takes {met.took.sentence()}")
    took = {UNNAMED: met.took.to_json()} if met.took else {}
    return {"calibrated_shares": {UNNAMED: met.flops}, LATENCIES: took}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is what `export` makes, with all weights or as an adapter; a run folder is not."""
    return (folder / ROUTER_FILE).is_file() and any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def check_exported(folder: Path) -> None:
    """Refuse what a checkpoint is made of, and say how it is made.

    Raises:
        CheckpointError: the folder is a run or a plan.
    """
    made = {CONFIG_FILE: ("a training run", ""), "plan.json": ("a plan", " --model MODEL")}
    for file, (what, more) in made.items():
        if (folder / file).is_file():
            raise CheckpointError(
                f"{folder} is {what}, not a checkpoint. Export it first: `skipit export {folder}{more} --out DIR`."
            )


def export_again(
    checkpoint: str | Path, out: str | Path, evaluation: str | Path | None = None, *, overwrite: bool = False
) -> None:
    """Copy a checkpoint, with the operating points it has by now and what was measured on it in its model card.

    The copy has today's format, and today's code inside.

    Args:
        checkpoint: made by `skipit export`, with or without `--adapter`.
        out: folder to make.
        evaluation: folder made by `skipit eval` of this checkpoint.
        overwrite: replace `out`.

    Raises:
        CheckpointError: not a checkpoint, not an evaluation of it, or `out` exists.
    """
    checkpoint = Path(checkpoint)
    measured = None if evaluation is None else read_evaluation(Path(evaluation), checkpoint)
    router = None if (checkpoint / ADAPTER_CONFIG).is_file() else load_router(checkpoint)
    with new_directory(out, overwrite) as folder:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        if router is not None:
            save_router(folder, *router)
            (folder / OLD_GATES_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder / CODE, ignore_errors=True)
            add_code(folder)
        write_card(folder, measured)


def check_profile(profile: Profile, checkpoint: Path, dense: Any) -> None:
    """Refuse a profile of another model than a checkpoint was made from.

    Raises:
        CheckpointError: it is neither of the dense model nor of the one the checkpoint's run started from.
    """
    path = checkpoint / PROVENANCE_FILE
    if not (path.is_file() and profile.model == load_json(path)["model"]):
        check_same_model(profile, fingerprint(dense))
