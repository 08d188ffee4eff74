"""One training run: from a dense model and a plan to a run folder that can be resumed and exported."""

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from skipit.router import RouterConfig, find_router
from skipit.router.call import Mode
from skipit.router.config import KVPolicy, Unit, point_name
from skipit.router.decoder import find_decoder, layer_kinds
from skipit.router.errors import InputError
from skipit.router.folders import provenance
from skipit.theory.calibrate import calibrate
from skipit.theory.cost import CostModel, token_flops
from skipit.theory.labels import predicts_answer
from skipit.theory.plan import Plan, check_reachable
from skipit.train.data.collate import Collator, batches, forgiving, tried
from skipit.train.data.rows import Broken, Rows, RowStream, readable, training_rows
from skipit.train.data.used import RECORD, Noted, held_out

from .config import TrainConfig
from .gating import attach_plan
from .launch import launched, stage_of
from .run_folder import RunFolder, claimed_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the weights, by precision


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

    attach_plan(model, plan, RouterConfig(kv=config.kv, unit=config.unit, granularity=config.granularity))
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
    for batch in rows:
        flops += _least_and_dense(batch, costs)[1]
        answers += float(predicts_answer(batch["labels"]).sum())
    if answers == 0:
        raise InputError("the training data has no answer tokens; every row needs a completion.")
    return flops / answers


def least_share(rows: Iterable[dict[str, Tensor]], costs: CostModel, kv: KVPolicy, unit: Unit) -> float:
    """Share of the dense decoder's FLOPs that some batches cost when every token skips every layer."""
    least, dense = zip(*(_least_and_dense(batch, costs, kv, unit) for batch in rows), strict=True)
    return sum(least) / sum(dense)


def _least_and_dense(
    batch: dict[str, Tensor], costs: CostModel, kv: KVPolicy = "retain", unit: Unit = "block"
) -> tuple[float, float]:
    """FLOPs of a batch whose tokens skip every layer, and those of the dense decoder."""
    real = batch["attention_mask"].bool()
    nothing = torch.zeros(len(costs.layers), *real.shape, dtype=torch.float64)
    executed, dense = token_flops(costs, nothing, real, kv, unit=unit)
    return float(executed.sum()), float(dense.sum())


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
        dataset: rows in the conversational vision format, or `training_rows` of such; without a length, a stream.
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
        note: called with the reason for every row that was skipped, and for a checkpoint that was passed over.

    Returns:
        The trained PEFT model, in eval mode, calibrated; under ZeRO-3 its weights stay sharded.

    Raises:
        CheckpointError: `out` holds a run and neither `resume` nor `overwrite` is set, or there is nothing whole to
            resume, or a setting that a resumed run must keep has changed, or another process writes it.
        LaunchError: the processes are not what was asked for.
        InputError: more rows than `config.max_broken_rows` cannot be read, or a budget cannot be met, or the weights
            are fp16.
        TrainingError: the loss is not finite or the router collapsed; checkpoints stay.
        KeyboardInterrupt: the last whole step was saved; go on with `resume`.
    """
    from .trainer import SkipTrainer

    out = Path(out)
    with (
        launched(config, out, report_to=report_to) if arguments is None else nullcontext(arguments) as arguments,
        claimed_run(out, arguments.process_index == 0, resume=resume, overwrite=overwrite),
    ):
        check_dtype(model)
        collate, costs = Collator(processor), CostModel.of(model)
        broken = Broken(config.max_broken_rows, note)
        whole = isinstance(dataset, Rows | RowStream)
        rows = dataset if whole else training_rows(dataset, collate.checked, broken)
        together = forgiving(collate, rows.broken)
        sample = list(batches(islice(rows, 64), together, config.batch_size))
        if calibration is not None:
            calibration = readable(calibration, tried(collate), rows.broken, "held-out row")
        least = least_share(sample, costs, config.kv, config.unit)
        check_reachable((config.budget, *config.more_budgets), least, config.kv, config.unit)
        peft_model = prepare(model, plan, config)
        settings = {**config.to_dict(), "base": base, "processes": arguments.world_size, "decide_at": plan.decide_at}
        folder = RunFolder(out, settings, main=arguments.process_index == 0)
        checkpoint = folder.prepare(resume, note or (lambda text: None))
        trained, calibrated = Noted(folder.rows_file(arguments.process_index, fresh=checkpoint is None)), Noted()
        rows.check = trained.noting(collate.checked)
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
            data_collator=together,
            callbacks=callbacks,
        )
        _run(trainer, checkpoint)
        peft_model.eval()
        held: Any = [] if calibration is None else Rows(calibration, calibrated.noting(collate.checked))
        held_batches = list(batches(held, collate, config.batch_size)) if calibration is not None else []
        used = {**plan.about.get(RECORD, {"profiled": None}), "trained": folder.rows_read(arguments.world_size)}
        mode: Mode = "masked" if stage_of(arguments) == 3 else "gathered"
        shares = _calibrate(peft_model, held_batches, costs, config, mode) if held_batches else {}
        history = trainer.progress.history
        record = {
            "base": base,
            "model": plan.model,
            "config": config.to_dict(),
            "processes": arguments.world_size,
            "init": plan.init,
            "skipped_rows": rows.broken.count,
            "calibrated_share": shares.get(point_name(config.budget)),
            "calibrated_shares": shares,
            "held_out": held_out({RECORD: used}, held)[0].to_json(),
            RECORD: {**used, "calibrated": calibrated.packed()},
            "last": history[-1] if history else None,
            "made_by": provenance(),
        }
        folder.finish(peft_model, history, record)
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


def _calibrate(
    model: Any, held: list[dict[str, Tensor]], costs: CostModel, config: TrainConfig, mode: Mode
) -> dict[str, float]:
    """Find the threshold of each budget, the last of which becomes the default; the share measured at each."""
    router, shares = find_router(model)[1], {}
    for budget in (*config.more_budgets, config.budget):
        threshold, share = calibrate(model, held, costs, budget, config.kv, mode=mode)
        router.config = router.config.with_point(budget, threshold, default=True)
        shares[point_name(budget)] = share
    return shares
