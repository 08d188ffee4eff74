"""One training run: from a dense model and a plan to a run folder that can be resumed and exported."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipit.router import RouterConfig, attach, find_router, gate_state, set_gates
from skipit.router.artefact import load_json, provenance, save_json
from skipit.router.checkpoint import save_router
from skipit.router.decoder import find_decoder
from skipit.router.errors import CheckpointError, InputError
from skipit.theory.artefact import check_same_model
from skipit.theory.calibrate import calibrate, default_threshold
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.labels import predicts_answer
from skipit.theory.plan import Plan

from .collate import Collator, Rows, batches
from .config import TrainConfig

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
RUN_FILE = "run.json"
CONFIG_FILE = "train_config.json"
# A resumed run may not change these: its data, its weights or its schedule would be another run's.
FIXED = (
    "budget",
    "kv",
    "unit",
    "granularity",
    "steps",
    "batch_size",
    "accumulation",
    "lora_rank",
    "lora_alpha",
    "seed",
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


def dense_per_answer(model: nn.Module, rows: Iterable[dict[str, Tensor]], costs: CostModel) -> float:
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
) -> Any:
    """Fine-tune gates and LoRA to a budget and write a run folder.

    Args:
        model: the dense model; gates and LoRA are added to it.
        processor: its processor.
        dataset: rows in the conversational vision format.
        plan: initial gates.
        config: settings.
        out: run folder; checkpoints go there while training and are removed when it is done.
        calibration: held-out rows, on which the threshold for the budget is found; None keeps threshold 0.
        base: what the model was loaded from, for the record and for `skipit export`.
        resume: continue from the last checkpoint in `out`; learning rates, damping and the like may change.
        overwrite: replace a run in `out`.
        callbacks: `transformers` trainer callbacks; a `ProgressCallback` among them replaces the printing of logs.
        report_to: where `Trainer` reports, such as "tensorboard".

    Returns:
        The trained PEFT model, in eval mode, calibrated.

    Raises:
        CheckpointError: `out` holds a run and neither `resume` nor `overwrite` is set, or there is nothing to resume,
            or a setting that a resumed run must keep has changed.
        TrainingError: the loss is not finite or the router collapsed; checkpoints stay.
        KeyboardInterrupt: the last whole step was saved; go on with `resume`.
    """
    from .trainer import SkipTrainer

    out = Path(out)
    check_folder(out, resume=resume, overwrite=overwrite)
    collate = Collator(processor)
    costs = CostModel.of(model)
    sample = dataset.select(range(min(64, len(dataset)))) if hasattr(dataset, "select") else list(dataset)[:64]
    scale = dense_per_answer(model, batches(sample, collate, config.batch_size), costs)
    peft_model = prepare(model, plan, config)
    checkpoint = _prepare_folder(out, {**config.to_dict(), "base": base}, resume)
    trainer = SkipTrainer(
        settings=config,
        costs=costs,
        dense_per_answer=scale,
        model=peft_model,
        args=_arguments(config, out, report_to),
        train_dataset=Rows(dataset),
        data_collator=collate,
        callbacks=callbacks,
    )
    _run(trainer, checkpoint)
    peft_model.eval()
    share = None
    if calibration is not None:
        held_out = list(batches(calibration, collate, config.batch_size))
        threshold, share = calibrate(peft_model, held_out, costs, config.budget, config.kv)
        default_threshold(peft_model, threshold, f"{config.budget:g}")
    _finish(out, peft_model, config, plan, base, trainer.progress.history, share)
    return peft_model


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


def _prepare_folder(out: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to continue from, or None and a fresh folder with the settings in it."""
    from .trainer import last_checkpoint

    checkpoint = last_checkpoint(out / CHECKPOINTS) if resume else None
    if checkpoint is not None:
        before = load_json(out / CONFIG_FILE)
        if changed := [name for name in FIXED if before.get(name) != settings[name]]:
            what = ", ".join(f"`{name}` was {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise CheckpointError(f"{out} cannot be resumed with other settings: {what}. Use the old ones.")
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
    return checkpoint


def _arguments(config: TrainConfig, out: Path, report_to: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _finish(
    out: Path,
    model: Any,
    config: TrainConfig,
    plan: Plan,
    base: str,
    history: list[dict[str, float]],
    share: float | None,
) -> None:
    """The run's results: adapter in PEFT's format, router settings and gates, and a record."""
    model.save_pretrained(out / ADAPTER)
    save_router(out, find_router(model)[1].config, gate_state(model))
    (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    record = {
        "base": base,
        "model": plan.model,
        "config": config.to_dict(),
        "init": plan.init,
        "calibrated_share": share,
        "last": history[-1] if history else None,
        "made_by": provenance(),
    }
    save_json(out / RUN_FILE, record)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
