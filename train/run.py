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

from skipit.router import RouterConfig, find_router, set_gates
from skipit.router.call import Mode
from skipit.router.config import KVPolicy, Unit
from skipit.router.decoder import find_decoder, layer_kinds
from skipit.router.errors import InputError
from skipit.router.folders import provenance
from skipit.theory.calibrate import Met, meet
from skipit.theory.cost import CostModel, Costs
from skipit.theory.labels import predicts_answer
from skipit.theory.plan import LEFT_OUT, LOGIT_LIMIT, Plan, check_reachable
from skipit.theory.time_model import TimeModel
from skipit.train.data.collate import Collator, batches, forgiving, tried
from skipit.train.data.rows import Broken, Rows, RowStream, readable, training_rows
from skipit.train.data.used import RECORD, Noted, also_used, held_out

from .card import LATENCIES
from .config import TrainConfig
from .gating import attach_plan
from .launch import launched
from .lora import load_lora
from .run_folder import RunFolder, claimed_run
from .start import Start

ANSWERED = "answered"  # in a record: how held-out rows are answered at each operating point, before training and after
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


def prepare(model: Any, plan: Plan, config: TrainConfig, start: Start | None = None) -> Any:
    """Attach a plan's gates to a dense model and add LoRA: a PEFT model whose adapter holds both.

    Under `latency`, gates that a plan has made the same for every token stay so. Layers that it leaves out stay out:
    one token that enters takes nearly as long as all would, and then no token that leaves saves any, so nothing would
    tell training to close the layer again. Layers in which some tokens save no time by leaving keep all.

    Args:
        model: dense; it is changed.
        plan: the gates.
        config: settings of the run.
        start: a finished run whose LoRA to begin with, and of whose gates the plan is.

    Raises:
        CheckpointError: the plan was made for another model, or `start` with other settings, or its adapter is damaged.
        InputError: nothing is left to train.
    """
    from peft import LoraConfig, get_peft_model

    if start is not None:
        start.check(config)
    attach_plan(model, plan, RouterConfig(kv=config.kv, unit=config.unit, granularity=config.granularity))
    torch.manual_seed(config.seed)
    if start is not None:
        peft_model = load_lora(model, start.adapter, trainable=True)
        set_gates(peft_model, plan.weight, plan.bias)  # in place of the adapter's, which may have been changed
    else:
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
    if config.latency is not None:
        constant = plan.bias.new_tensor([LEFT_OUT, -LOGIT_LIMIT, LOGIT_LIMIT])  # the second in plans of before
        same = torch.isin(plan.bias, constant) & (plan.weight == 0).all(-1)
        for layer, fixed in zip(find_decoder(model)[2], same.all(-1).tolist(), strict=True):
            for name, parameter in layer.named_parameters():
                if "layer_gate" in name and fixed:
                    parameter.requires_grad_(False)
        if config.lora_rank == 0 and same.all():
            raise InputError(
                "`lora_rank`: got 0, which trains the gates alone, but in this plan for a latency they all decide for "
                "whole layers and stay as they are. Give a `lora_rank` above 0."
            )
    return peft_model


def check_answers(rows: Iterable[dict[str, Tensor]]) -> None:
    """Refuse rows of which none has anything to learn.

    Raises:
        InputError: no answer token is in them.
    """
    if not any(bool(predicts_answer(batch["labels"]).any()) for batch in rows):
        raise InputError("the training data has no answer tokens; every row needs a completion.")


def least_share(rows: Iterable[dict[str, Tensor]], costs: Costs, kv: KVPolicy, unit: Unit) -> float:
    """Share of what the dense decoder spends that some batches cost when every token skips every layer."""
    least = dense = 0.0
    for batch in rows:
        real = batch["attention_mask"].bool()
        nothing = torch.zeros(costs.depth, *real.shape, dtype=torch.float64)
        executed, all_of_it = costs.spend(nothing, real, kv, unit=unit)
        least, dense = least + float(executed.sum()), dense + float(all_of_it.sum())
    return least / dense


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
    plan: Plan | Start,
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
        plan: initial gates, or a finished run to go on from.
        config: settings.
        out: run folder; checkpoints go there while training and are removed when it is done.
        calibration: held-out rows, on which the threshold for each budget is found; None keeps threshold 0.
        base: what the model was loaded from, for the record and for `skipit export`.
        resume: continue from the last checkpoint in `out`; learning rates and the like may change.
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
        TrainingError: the loss is not finite; checkpoints stay.
        KeyboardInterrupt: the last whole step was saved; go on with `resume`.
    """
    from .trainer import SkipTrainer

    out, start = Path(out), plan if isinstance(plan, Start) else None
    plan = plan if isinstance(plan, Plan) else plan.plan
    with (
        launched(config, out, report_to=report_to) if arguments is None else nullcontext(arguments) as arguments,
        claimed_run(out, arguments.process_index == 0, resume=resume, overwrite=overwrite),
    ):
        check_dtype(model)
        collate, flops = Collator(processor), CostModel.of(model)
        times = None if config.latency is None else TimeModel.of(model)
        costs: Costs = times or flops
        broken = Broken(config.max_broken_rows, note)
        whole = isinstance(dataset, Rows | RowStream)
        rows = dataset if whole else training_rows(dataset, collate.checked, broken)
        together = forgiving(collate, rows.broken)
        sample = list(batches(islice(rows, 64), together, config.batch_size))
        if calibration is not None:
            calibration = readable(calibration, tried(collate), rows.broken, "held-out row")
        check_answers(sample)
        least = least_share(sample, costs, config.kv, config.unit)
        if times is None:
            check_reachable(config.points.values(), least, config.kv, config.unit)
        else:
            times.times.check(min(config.points.values()), least, config.kv)
        peft_model = prepare(model, plan, config, start)
        settings = {**config.to_dict(), "base": base, "processes": arguments.world_size, "decide_at": plan.decide_at}
        folder = RunFolder(out, settings, main=arguments.process_index == 0)
        checkpoint = folder.prepare(resume, note or (lambda text: None))
        trained, calibrated = Noted(folder.rows_file(arguments.process_index, fresh=checkpoint is None)), Noted()
        rows.check = trained.noting(collate.checked)
        held: Any = [] if calibration is None else Rows(calibration, calibrated.noting(collate.checked))
        held_batches = list(batches(held, collate, config.batch_size)) if calibration is not None else []
        # Every process runs every module, but for layers over images in a batch that has none.
        arguments.ddp_find_unused_parameters = "cross_attention" in layer_kinds(find_decoder(model)[1].config)
        trainer = SkipTrainer(
            settings=config,
            costs=costs,
            held=held_batches,
            sample=sample,
            model=peft_model,
            args=arguments,
            train_dataset=rows,
            data_collator=together,
            callbacks=callbacks,
        )
        _run(trainer, checkpoint)
        peft_model.eval()
        before = {RECORD: plan.about.get(RECORD, {"profiled": None})}
        used = also_used(before, "trained", folder.rows_read(arguments.world_size))
        met = _calibrate(peft_model, held_batches, flops, times, config, trainer.mode) if held_batches else {}
        answered = {
            name: {"before": before, "after": trainer.answered(met[name].threshold)}
            for name, before in zip(config.points, trainer.before, strict=False)
        }
        history = trainer.progress.history
        record = {
            "base": base,
            "model": plan.model,
            "config": config.to_dict(),
            "processes": arguments.world_size,
            "init": plan.init,
            "skipped_rows": rows.broken.count,
            "calibrated_share": met[next(iter(config.points))].flops if met else None,
            "calibrated_shares": {name: point.flops for name, point in met.items()},
            LATENCIES: {name: point.took.to_json() for name, point in met.items() if point.took},
            "held_out": held_out({RECORD: used}, held)[0].to_json(),
            RECORD: {**used, "calibrated": calibrated.packed()},
            "last": history[-1] if history else None,
            ANSWERED: answered,
            "made_by": provenance(),
        }
        folder.finish(peft_model, history, record)
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


def _calibrate(
    model: Any,
    held: list[dict[str, Tensor]],
    costs: CostModel,
    times: TimeModel | None,
    config: TrainConfig,
    mode: Mode,
) -> dict[str, Met]:
    """Find the threshold of each operating point, of which the first of the settings becomes the default."""
    router, found = find_router(model)[1], {}
    for name, budget in reversed(config.points.items()):
        found[name] = meet(model, held, costs, budget, config.kv, times=times, mode=mode)
        router.config = router.config.with_point(name, found[name].threshold, default=True)
    return found
