"""One training run: from a dense model and a plan to a run folder that can be resumed and exported."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from skipit.router import RouterConfig, attach, find_router, gate_state, set_gates
from skipit.router.call import Mode
from skipit.router.checkpoint import save_router
from skipit.router.config import KVPolicy, Unit
from skipit.router.decoder import find_decoder, layer_kinds
from skipit.router.errors import CheckpointError, InputError
from skipit.router.folders import load_json, provenance, save_json
from skipit.theory.artefact import check_same_model
from skipit.theory.calibrate import calibrate, default_threshold
from skipit.theory.cost import CostModel, token_flops
from skipit.theory.identity import fingerprint
from skipit.theory.labels import predicts_answer
from skipit.theory.plan import Plan
from skipit.theory.sharded import unsharded
from skipit.train.data.collate import Broken, Collator, batches, training_rows

from .config import TrainConfig
from .launch import CHECKPOINTS, launched, stage_of, wait

ADAPTER = "adapter"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the weights, by precision
RUN_FILE = "run.json"
CONFIG_FILE = "train_config.json"
# A resumed run may not change these: its data, its weights or its schedule would be another run's.
FIXED = (
    "processes",
    "budget",
    "more_budgets",
    "kv",
    "unit",
    "granularity",
    "steps",
    "batch_size",
    "accumulation",
    "lora_rank",
    "lora_alpha",
    "seed",
    "precision",
    "deepspeed",
)


def lora_targets(model: nn.Module) -> str:
    """A regular expression that matches the decoder layers' linear maps, and nothing else."""
    path, _, layers = find_decoder(model)
    names = {
        name
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "layer_gate" not in name
    }
    maps = "|".join(sorted(map(re.escape, names)))
    return rf"(.*\.)?{re.escape(path)}\.\d+\.({maps})"


def prepare(model: Any, plan: Plan, config: TrainConfig) -> Any:
    """Attach a plan's gates to a dense model and add LoRA: a PEFT model whose adapter holds both.

    Raises:
        CheckpointError: the plan was made for another model.
    """
    from peft import LoraConfig, get_peft_model

    check_same_model(plan, fingerprint(model))
    attach(model, RouterConfig(kv=config.kv, unit=config.unit, granularity=config.granularity))
    set_gates(model, plan.weight, plan.bias)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=max(1, config.lora_rank),
        lora_alpha=config.lora_alpha,
        target_modules=lora_targets(model),
        modules_to_save=["layer_gate"],
        bias="none",
    )
    peft_model = get_peft_model(model, lora)
    if config.lora_rank == 0:
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)
    return peft_model


def dense_per_answer(rows: Iterable[dict[str, Tensor]], costs: CostModel) -> float:
    """Dense decoder FLOPs per answer token of some batches: the scale of the compute term."""
    flops = answers = 0.0
    linear, pair = float(costs.column("linear").sum()), float(costs.column("attention").sum())
    for batch in rows:
        lengths = batch["attention_mask"].sum(-1).double()
        flops += float((lengths * linear + pair * lengths * (lengths + 1) / 2).sum())
        answers += float(predicts_answer(batch["labels"]).sum())
    if answers == 0:
        raise InputError("the training data has no answer tokens; every row needs a completion.")
    return flops / answers


def least_share(rows: Iterable[dict[str, Tensor]], costs: CostModel, kv: KVPolicy, unit: Unit) -> float:
    """Share of the dense decoder's FLOPs that some batches cost when every token skips every layer."""
    spent = dense = 0.0
    for batch in rows:
        real = batch["attention_mask"].bool()
        nothing = torch.zeros(len(costs.layers), *real.shape, dtype=torch.float64)
        executed, full = token_flops(costs, nothing, real, kv, unit=unit)
        spent, dense = spent + float(executed.sum()), dense + float(full.sum())
    return spent / dense


def check_reachable(budgets: Iterable[float], least: float, kv: KVPolicy, unit: Unit) -> None:
    """Refuse a budget that no gates can meet.

    Raises:
        InputError: it is not above the share that is spent when everything is skipped.
    """
    if (lowest := min(budgets)) <= least:
        raise InputError(
            f"`budget`: got {lowest:g}, expected more than {least:.3f}: so much is spent when every token skips every "
            f"layer (unit {unit!r}, kv {kv!r}). A smaller share needs unit 'block' and kv 'evict'."
        )


def check_dtype(model: nn.Module) -> None:
    """Refuse fp16, the dtype that many checkpoints are stored in: small gradients would vanish.

    Raises:
        InputError: some weights are fp16.
    """
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise InputError(
            "the model's weights are fp16, and skipit does not scale losses: small gradients would vanish. Load it "
            "with dtype=torch.bfloat16, for precision='bf16', or with dtype=torch.float32."
        )


def train(
    model: Any,
    processor: Any,
    dataset: Any,
    plan: Plan,
    config: TrainConfig,
    out: str | Path,
    *,
    calibration: Any = None,
    base: str = "",
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Any] | None = None,
    report_to: str = "none",
    arguments: TrainingArguments | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """Fine-tune gates and LoRA to a budget and write a run folder.

    Args:
        model: the dense model; gates and LoRA are added to it.
        processor: its processor.
        dataset: rows in the conversational vision format; one without a length is read as a stream.
        plan: initial gates.
        config: settings.
        out: run folder; checkpoints go there while training and are removed when it is done.
        calibration: held-out rows, on which the threshold for each budget is found; None keeps threshold 0.
        base: what the model was loaded from, for the record and for `skipit export`.
        resume: continue from the last checkpoint in `out`; learning rates, damping and the like may change.
        overwrite: replace a run in `out`.
        callbacks: `transformers` trainer callbacks; a `ProgressCallback` among them replaces the printing of logs.
        report_to: where `Trainer` reports, such as "tensorboard".
        arguments: of `launched`, where several processes train or the model was loaded under ZeRO-3.
        note: is told of every row that was skipped.

    Returns:
        The trained PEFT model, in eval mode, calibrated; under ZeRO-3 its weights stay sharded.

    Raises:
        CheckpointError: `out` holds a run and neither `resume` nor `overwrite` is set, or there is nothing to resume,
            or a setting that a resumed run must keep has changed.
        LaunchError: the processes are not what was asked for.
        InputError: more rows than `config.max_broken_rows` cannot be read, or a budget cannot be met, or the weights
            are fp16.
        TrainingError: the loss is not finite or the router collapsed; checkpoints stay.
        KeyboardInterrupt: the last whole step was saved; go on with `resume`.
    """
    if arguments is None:
        with launched(config, out, report_to=report_to) as arguments:
            return train(
                model,
                processor,
                dataset,
                plan,
                config,
                out,
                calibration=calibration,
                base=base,
                resume=resume,
                overwrite=overwrite,
                callbacks=callbacks,
                arguments=arguments,
                note=note,
            )
    from .trainer import SkipTrainer

    out, main = Path(out), arguments.process_index == 0
    check_folder(out, resume=resume, overwrite=overwrite)
    check_dtype(model)
    broken = Broken(config.max_broken_rows, note)
    collate = Collator(processor)
    costs = CostModel.of(model)
    rows = training_rows(dataset, collate, broken)
    settings = {**config.to_dict(), "base": base, "processes": arguments.world_size}
    sample = list(batches(islice(rows, 64), collate, config.batch_size))
    least = least_share(sample, costs, config.kv, config.unit)
    check_reachable((config.budget, *config.more_budgets), least, config.kv, config.unit)
    peft_model = prepare(model, plan, config)
    checkpoint = _prepare_folder(out, settings, resume, main)
    mode: Mode = "masked" if stage_of(arguments) == 3 else "gathered"
    # Every process runs every module, but for layers over images in a batch that has none.
    arguments.ddp_find_unused_parameters = "cross_attention" in layer_kinds(find_decoder(model)[1].config)
    trainer = SkipTrainer(
        settings=config,
        costs=costs,
        dense_per_answer=dense_per_answer(sample, costs),
        thresholds=_thresholds(peft_model, sample, costs, config),
        least=least,
        model=peft_model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=callbacks,
    )
    _run(trainer, checkpoint)
    peft_model.eval()
    shares: dict[str, float] = {}
    if calibration is not None:
        held_out = list(batches(calibration, collate, config.batch_size))
        for budget in (*config.more_budgets, config.budget):  # the last one becomes the default
            threshold, share = calibrate(peft_model, held_out, costs, budget, config.kv, mode=mode)
            default_threshold(peft_model, threshold, f"{budget:g}")
            shares[f"{budget:g}"] = share
    _finish(out, peft_model, config, plan, settings, trainer.progress.history, shares, broken.count, main)
    return peft_model


def _thresholds(model: Any, held: list[dict[str, Tensor]], costs: CostModel, config: TrainConfig) -> list[float]:
    """Where the plan's gates spend each budget on a few rows; the plan is made for the first, at 0."""
    model.eval()
    # Masked, because weights may be sharded already.
    return [0.0, *(calibrate(model, held, costs, b, config.kv, mode="masked")[0] for b in config.more_budgets)]


def _run(trainer: Any, checkpoint: Path | None) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, ProgressCallback) for callback in callbacks):
        trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        trainer.interrupted()
        raise


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that would lose something, or from which nothing can be resumed.

    Raises:
        CheckpointError: says which.
    """
    from .trainer import last_checkpoint

    last = last_checkpoint(out / CHECKPOINTS)
    if resume and (out / RUN_FILE).is_file():
        raise CheckpointError(f"{out} is finished. Next: `skipit export {out} --out DIR`.")
    if resume and last is None:
        raise CheckpointError(f"{out} has no checkpoint to resume from. Start without --resume.")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, expected a folder or nothing.")
    if resume or not out.exists() or not any(out.iterdir()):
        return
    # A run that was stopped before its first checkpoint has nothing to lose.
    ours = (out / CONFIG_FILE).is_file()
    if ours and (overwrite or (last is None and not (out / RUN_FILE).is_file())):
        return
    if overwrite:
        raise CheckpointError(
            f"{out} is not a run: it has no {CONFIG_FILE}. Delete it yourself or choose another --out."
        )
    hint = "continue with --resume, " if last else ""
    raise CheckpointError(
        f"{out} exists and is not empty; {hint}choose another --out, or pass --overwrite to replace it."
    )


def _prepare_folder(out: Path, settings: dict[str, Any], resume: bool, main: bool) -> Path | None:
    """The checkpoint to continue from, or None and a fresh folder with the settings in it, which `main` makes."""
    from .trainer import last_checkpoint

    checkpoint = last_checkpoint(out / CHECKPOINTS) if resume else None
    if checkpoint is not None:
        before, settings = load_json(out / CONFIG_FILE), json.loads(json.dumps(settings))
        if changed := [name for name in FIXED if before.get(name) != settings[name]]:
            what = ", ".join(f"`{name}` was {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise CheckpointError(f"{out} cannot be resumed with other settings: {what}. Use the old ones.")
    wait()  # every process has looked at the folder
    if main:
        _make_folder(out, settings, checkpoint)
    wait()
    return checkpoint


def _make_folder(out: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
    if checkpoint is not None:
        for unfinished in set((out / CHECKPOINTS).glob("checkpoint-*")):
            if int(unfinished.name.rpartition("-")[2]) > int(checkpoint.name.rpartition("-")[2]):
                shutil.rmtree(unfinished)  # a save that was killed; `Trainer` would count it as one to keep
    else:
        shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / CONFIG_FILE, settings)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error


def _finish(
    out: Path,
    model: Any,
    config: TrainConfig,
    plan: Plan,
    settings: dict[str, Any],
    history: list[dict[str, float]],
    shares: dict[str, float],
    skipped_rows: int,
    main: bool,
) -> None:
    """The run's results: adapter in PEFT's format, router settings and gates, and a record."""
    with unsharded(parameter for parameter in model.parameters() if parameter.requires_grad):
        if main:
            model.save_pretrained(out / ADAPTER)
            gates = {name: value.float() for name, value in gate_state(model).items()}
            save_router(out, find_router(model)[1].config, gates)
    if main:
        (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        record = {
            "base": settings["base"],
            "model": plan.model,
            "config": config.to_dict(),
            "processes": settings["processes"],
            "init": plan.init,
            "skipped_rows": skipped_rows,
            "calibrated_share": shares.get(f"{config.budget:g}"),
            "calibrated_shares": shares,
            "last": history[-1] if history else None,
            "made_by": provenance(),
        }
        save_json(out / RUN_FILE, record)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    wait()
