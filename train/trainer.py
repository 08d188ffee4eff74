"""A Hugging Face `Trainer` for gates and LoRA under a compute budget."""

import math
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skipit.router import MODALITIES, Gated, SkipItError, Trace, running
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, save_json
from skipit.theory.cost import Costs
from skipit.theory.labels import IGNORE, before_answer

from .config import TrainConfig
from .launch import barrier, check_engine, stage_of
from .manifest import save_manifest
from .objective import DualAscent, answer_losses, answer_targets, gated_compute
from .run_folder import STATE_FILE, last_checkpoint

PER_ANSWER = {"ce": "ce", "kl": "kl", "accuracy": "correct"}
GATE = "layer_gate"


class TrainingError(SkipItError):
    """Training cannot go on; the last checkpoint is good."""


class SkipTrainer(Trainer):
    """Trains a gated PEFT model: straight-through gates in masked execution, distillation from the model itself.

    The teacher is the same model with gates and LoRA off: no second copy in memory. Every process runs every module,
    whatever its rows skip: DeepSpeed mixes up gradients, or hangs, where processes call different modules.

    Args:
        settings: budgets and weights of the objective.
        costs: of the model's layers, in what the budget is a share of.
        dense_per_answer: what the dense decoder spends per answer token of the data, the scale of the compute term.
        thresholds: of the gates at each budget of the settings; None is 0 for all.
        least: share that is spent when every token skips every layer.
        **trainer: passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        settings: TrainConfig,
        costs: Costs,
        dense_per_answer: float,
        thresholds: Sequence[float] | None = None,
        least: float = 0.0,
        callbacks: list[Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.settings, self.costs, self.dense_per_answer, self.least = settings, costs, dense_per_answer, least
        budgets = list(settings.points.values())
        self.ascents = [DualAscent(budget, settings.multiplier_rate, settings.damping) for budget in budgets]
        self.thresholds = list(thresholds or [0.0] * len(budgets))
        self.progress = _Ascend(self)
        self.rates: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        # First, so that the others may interrupt training between steps.
        super().__init__(callbacks=[self.progress, *(callbacks or [])], **trainer)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch below

    @property
    def turn(self) -> int:
        """Which of the budgets this step is for."""
        return self.state.global_step % len(self.ascents)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE + distillation + compute, summed over this batch and divided by the answer tokens of the whole step."""
        inputs = dict(inputs)
        self._check_images(inputs)
        labels = inputs.pop("labels")
        kept, targets = answer_targets(labels)
        teacher = self._teacher(model, inputs, kept) if self.settings.distillation else None
        trace, threshold = Trace(), self.thresholds[self.turn]
        at = {"policy": Gated(threshold)} if threshold else {}
        with running(**at, mode="masked", prompt=before_answer(labels), trace=trace):
            logits = self._logits(model, inputs, kept)
        losses = answer_losses(logits, teacher, targets)
        step, ascent = trace.steps[-1], self.ascents[self.turn]
        compute = gated_compute(self.costs, step)
        executed, dense = compute.executed.sum(), compute.dense.sum()
        over = (executed - ascent.budget * dense) / self.dense_per_answer
        items = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE).sum()
        loss = (losses.ce + self.settings.distillation * losses.kl + ascent.price * over) / items
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} "
                f"(CE {losses.ce.item()}, KL {losses.kl.item()}). " + self.advice("the learning rates")
            )
        if num_items_in_batch is not None:  # counted over all processes, over which gradients will be averaged
            loss = loss * self.accelerator.num_processes
        modality = F.one_hot(step.modality, len(MODALITIES)).double()
        self._add(executed=executed, dense=dense, answers=(targets != IGNORE).sum(), **losses._asdict())
        self._add(ran=torch.einsum("lbs,bsm->lm", step.run.double(), modality))
        self._add(tokens=torch.einsum("bs,bsm->m", step.real.double(), modality))
        return (loss, {"logits": logits}) if return_outputs else loss

    def _check_images(self, inputs: dict[str, Tensor]) -> None:
        """Under ZeRO-3 processes gather a vision tower's weights together: one without images would never join in."""
        if self.args.world_size == 1 or stage_of(self.args) != 3:
            return
        has_images = torch.tensor([any(name.startswith("pixel") for name in inputs)], device=self.args.device)
        having = int(self.accelerator.reduce(has_images.long(), reduction="sum"))
        if 0 < having < self.args.world_size:
            raise TrainingError(
                f"in step {self.state.global_step + 1} only {having} of {self.args.world_size} processes have images "
                "in their batch; under ZeRO-3 they would wait for each other forever. Use --deepspeed zero2, a larger "
                "--batch-size, or rows that all have images or all have none."
            )

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
        """Logits [batch, kept, vocabulary] at the positions that predict answers; most are at prompts and images."""
        own = self.accelerator.unwrap_model(model)
        own = own.get_base_model() if hasattr(own, "get_base_model") else own
        if "logits_to_keep" in signature(own.forward).parameters:
            return model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return model(**inputs, use_cache=False).logits[:, kept]

    @torch.no_grad()
    def _teacher(self, model: nn.Module, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
        disable = getattr(self.accelerator.unwrap_model(model), "disable_adapter", nullcontext)
        was_training = model.training
        model.eval()  # no dropout in the target
        try:
            with disable(), running(mode="dense"):
                return self._logits(model, inputs, kept)
        finally:
            model.train(was_training)

    def finish_step(self) -> dict[str, float]:
        """Sum up an optimizer step over processes, move the price, and return the step's figures."""
        flat = torch.cat([value.flatten() for value in self._sums.values()])
        parts = self.accelerator.reduce(flat, reduction="sum").split([v.numel() for v in self._sums.values()])
        sums = {name: part.view(old.shape) for (name, old), part in zip(self._sums.items(), parts, strict=True)}
        self._sums = {}
        self.rates = (sums["ran"] / sums["tokens"]).cpu()
        per_answer = {name: float(sums[key] / sums["answers"]) for name, key in PER_ANSWER.items()}
        ascent = self.ascents[(self.state.global_step - 1) % len(self.ascents)]
        share = float(sums["executed"] / sums["dense"])
        prices = {"multiplier": ascent.multiplier, "price": ascent.price}
        figures = {**per_answer, "budget": ascent.budget, "compute": share, **prices}
        ascent.update(share)
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What `Trainer` logs, with the last step's figures; reports are written before any other callback is told."""
        if "loss" in logs and self.progress.history:
            figures = {name: value for name, value in self.progress.history[-1].items() if name != "step"}
            rates = skip_rates(self.rates) if self.args.report_to and self.rates is not None else {}
            logs = {**logs, **{name: value for name, value in (figures | rates).items() if not math.isnan(value)}}
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the gates, which have few parameters and far to go."""
        if self.optimizer is None:
            trained: Any = model or self.model
            named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
            gates = [p for n, p in named if GATE in n]
            others = [p for n, p in named if GATE not in n]
            groups = [{"params": gates, "lr": self.settings.gate_learning_rate, "weight_decay": 0.0}]
            if others:
                groups.append({"params": others, "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def advice(self, lower: str) -> str:
        """What to do when training cannot go on."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last is None:
            return f"No checkpoint was written yet: lower {lower} and start again."
        return f"{last.name} was saved before it: lower {lower} and continue with --resume."

    def interrupted(self) -> None:
        """Save the last whole step, unless it is saved already or the interrupt fell into an update.

        Of several processes each is interrupted at a point of its own, so that they cannot save together.
        """
        last = last_checkpoint(Path(str(self.args.output_dir)))
        saved = last is not None and last.name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.world_size > 1 or self.is_deepspeed_enabled:
            return
        if self.progress.between_updates and self.state.global_step > 0 and not saved:
            self._save_checkpoint(self.model, trial=None)  # type: ignore[arg-type]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What `Trainer` saves, and last of all the budgets' state: a checkpoint without it is not whole.

        Raises:
            TrainingError: it cannot be written; what was written of it is removed, the one before it is whole.
        """
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            barrier()  # for the parts that other processes write
            if self.args.should_save:
                values = {
                    "ascents": [[ascent.multiplier, ascent.violation] for ascent in self.ascents],
                    "thresholds": self.thresholds,
                    "history": self.progress.history,
                }
                pending = folder / f"{STATE_FILE}.new"
                save_json(pending, values)
                save_manifest(folder, {pending.name: STATE_FILE})
                pending.replace(folder / STATE_FILE)
        except (
            CheckpointError,
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have errors of their own
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(folder.parent)
            kept = (
                f"{last.name} is whole: make room and continue with --resume." if last else "There is none before it."
            )
            raise TrainingError(f"{folder} cannot be written: {str(error) or type(error).__name__}. {kept}") from error

    def restore(self, checkpoint: Path) -> None:
        """Continue the dual ascent where a checkpoint left it."""
        values = load_json(checkpoint / STATE_FILE)
        for ascent, (multiplier, violation) in zip(self.ascents, values["ascents"], strict=True):
            ascent.multiplier, ascent.violation = multiplier, violation
        self.thresholds = values["thresholds"]
        self.progress.restore(values["history"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, but with the learning rates of this run's settings, which may have been lowered."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        rates: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        wanted = (self.settings.gate_learning_rate, self.args.learning_rate)
        for index, (group, rate) in enumerate(zip(optimizer.param_groups, wanted, strict=False)):
            if (old := rates.base_lrs[index]) != rate:
                group["lr"] = group["lr"] / old * rate if old else rate
                group["initial_lr"] = rates.base_lrs[index] = rate


def skip_rates(ran: Tensor) -> dict[str, float]:
    """Share of the tokens that skipped each layer, by the names under which reports show them.

    Args:
        ran: share that ran [layers, modalities], NaN where there was no token.
    """
    return {
        f"skip_rate_{modality}/layer_{layer:02}": 1 - rate
        for number, modality in enumerate(MODALITIES)
        for layer, rate in enumerate(ran[:, number].tolist())
    }


class _Ascend(TrainerCallback):
    """Moves the price after every optimizer step, and stops a run that would spoil the weights."""

    def __init__(self, trainer: SkipTrainer) -> None:
        self.trainer = trainer
        self.recent: deque[float] = deque(maxlen=trainer.settings.collapse_steps)
        self.history: list[dict[str, float]] = []
        self.between_updates = True

    def restore(self, history: list[dict[str, float]]) -> None:
        self.history = history
        self.recent.extend(figures["compute"] for figures in history)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_engine(self.trainer.settings.deepspeed, self.trainer.model_wrapped)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A loss may be finite and its gradient not. With fp16 the scaler finds these and skips the step.
        if self.trainer.accelerator.scaler is None:
            self._check(_gradient_norm(self.trainer), state.global_step + 1)
        self.between_updates = False

    def _check(self, norm: Tensor, step: int) -> None:
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"a gradient is not finite at step {step}. {self.trainer.advice('the learning rates')}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        figures = self.trainer.finish_step()
        self.history.append({"step": state.global_step, **figures})
        self.recent.append(figures["compute"])
        self.between_updates = True
        if len(self.recent) == self.recent.maxlen:
            self._check_collapse(state)

    def _check_collapse(self, state: TrainerState) -> None:
        settings, recent, least = self.trainer.settings, self.recent, self.trainer.least
        budgets = [ascent.budget for ascent in self.trainer.ascents]

        def reach(share: float) -> float:
            """0 where nothing runs and 1 where everything does: `retain` pays for keys and values in any case."""
            return (share - least) / (1 - least)

        if reach(max(recent)) <= settings.collapse < reach(min(budgets)):
            raise TrainingError(
                f"the router collapsed: the last {len(recent)} steps executed at most {max(recent):.1%} of "
                f"the dense {settings.counted}, the budget is {min(budgets):.0%}. Start again with a lower "
                "`gate_learning_rate` or a higher `damping`."
            )
        late = state.global_step > state.max_steps / 2
        if late and reach(min(recent)) >= 1 - settings.collapse > reach(max(budgets)):
            raise TrainingError(
                f"the router does not skip: the last {len(recent)} steps executed at least {min(recent):.1%} of "
                f"the dense {settings.counted}, the budget is {max(budgets):.0%}. Start again with a higher "
                "`gate_learning_rate` or `multiplier_rate`, more steps, or a plan from a profile."
            )


def _gradient_norm(trainer: SkipTrainer) -> Tensor:
    """Of the step's gradients; DeepSpeed has them in shards and made the update already, of which nothing is saved."""
    engine: Any = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        return torch.as_tensor(engine.get_global_grad_norm() or 0.0)
    return nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])  # type: ignore[union-attr]
