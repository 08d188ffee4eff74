"""One training run: from a dense model and a plan to a run folder that can be resumed and exported."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipit.router import RouterConfig, attach, find_router, gate_state, set_gates
from skipit.router.artefact import provenance, save_json
from skipit.router.checkpoint import save_router
from skipit.router.decoder import find_decoder
from skipit.router.errors import CheckpointError, InputError
from skipit.theory.artefact import check_same_model
from skipit.theory.calibrate import calibrate, default_threshold
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan

from .collate import IGNORE, Collator, batches
from .config import TrainConfig

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
RUN_FILE = "run.json"


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
    attach(model, RouterConfig(kv=config.kv))
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
        answers += float((batch["labels"][:, 1:] != IGNORE).sum())
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
        out: run folder; checkpoints go there while training.
        calibration: held-out rows, on which the threshold for the budget is found; None keeps threshold 0.
        base: what the model was loaded from, for the record and for `skipit export`.
        resume: continue from the last checkpoint in `out`.
        callbacks: `transformers` trainer callbacks.
        report_to: where `Trainer` reports, such as "tensorboard".

    Returns:
        The trained PEFT model, in eval mode, calibrated.

    Raises:
        CheckpointError: `out` holds a run and `resume` is False, or there is nothing to resume.
        TrainingError: the loss is not finite or the router collapsed; checkpoints stay.
    """
    from .trainer import SkipTrainer

    out = Path(out)
    checkpoint = _prepare_folder(out, resume)
    collate = Collator(processor)
    costs = CostModel.of(model)
    sample = dataset.select(range(min(64, len(dataset)))) if hasattr(dataset, "select") else list(dataset)[:64]
    scale = dense_per_answer(model, batches(sample, collate, config.batch_size), costs)
    peft_model = prepare(model, plan, config)
    save_json(out / "train_config.json", {**config.to_dict(), "base": base})
    trainer = SkipTrainer(
        settings=config,
        costs=costs,
        dense_per_answer=scale,
        model=peft_model,
        args=_arguments(config, out, report_to),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=callbacks,
    )
    history = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "history")).history
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        trainer._save_checkpoint(peft_model, trial=None)
        raise
    peft_model.eval()
    share = None
    if calibration is not None:
        held_out = list(batches(calibration, collate, config.batch_size))
        threshold, share = calibrate(peft_model, held_out, costs, config.budget, config.kv)
        default_threshold(peft_model, threshold, f"{config.budget:g}")
    _finish(out, peft_model, config, plan, base, history, share)
    return peft_model


def _prepare_folder(out: Path, resume: bool) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(out / CHECKPOINTS)) if (out / CHECKPOINTS).is_dir() else None
    if resume:
        if last is None:
            raise CheckpointError(f"{out} has no checkpoint to resume from. Start without --resume.")
        return Path(last)
    if out.exists() and any(out.iterdir()):
        hint = "continue with --resume, or " if last else ""
        raise CheckpointError(f"{out} exists and is not empty; {hint}choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    return None


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
