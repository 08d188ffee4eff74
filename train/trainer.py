"""A Hugging Face `Trainer` for gates and LoRA under a compute budget."""

import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skipit.router import SkipItError, Trace, running
from skipit.router.artefact import load_json, save_json
from skipit.theory.cost import CostModel
from skipit.theory.labels import IGNORE, predicts_answer

from .config import TrainConfig
from .objective import DualAscent, answer_losses, gated_compute

GATE = "layer_gate"
STATE_FILE = "skipit_state.json"


class TrainingError(SkipItError):
    """Training cannot go on; the last checkpoint is good."""


class SkipTrainer(Trainer):
    """Trains a gated PEFT model: straight-through gates in masked execution, distillation from the model itself.

    The teacher is the same model with gates and LoRA off: no second copy in memory.

    Args:
        settings: budget and weights of the objective.
        costs: of the model's layers.
        dense_per_answer: dense decoder FLOPs per answer token of the data, the scale of the compute term.
        **trainer: passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        settings: TrainConfig,
        costs: CostModel,
        dense_per_answer: float,
        callbacks: list[Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.settings, self.costs, self.dense_per_answer = settings, costs, dense_per_answer
        self.ascent = DualAscent(settings.budget, settings.multiplier_rate, settings.damping)
        self.progress = _Ascend(self)
        self._executed = self._dense = 0.0
        self._parts: dict[str, float] = {}
        # First, so that the others see its figures, and may interrupt training between steps.
        super().__init__(callbacks=[self.progress, *(callbacks or [])], **trainer)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch below

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE + distillation + compute, summed over this batch and divided by the answer tokens of the whole step."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        trace = Trace()
        with running(mode="masked", prompt=labels == IGNORE, trace=trace):
            outputs = model(**inputs, use_cache=False)
        teacher = self._teacher(model, inputs) if self.settings.distillation else None
        ce, kl = answer_losses(outputs.logits, teacher, labels)
        compute = gated_compute(self.costs, trace.steps[-1])
        executed, dense = compute.executed.sum(), compute.dense.sum()
        over = (executed - self.settings.budget * dense) / self.dense_per_answer
        items = num_items_in_batch if num_items_in_batch is not None else predicts_answer(labels).sum()
        loss = (ce + self.settings.distillation * kl + self.ascent.price * over) / items
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (CE {ce.item()}, KL {kl.item()}). "
                + self.advice("the learning rates")
            )
        self._executed += float(executed.detach())
        self._dense += float(dense.detach())
        for name, value in (("ce", ce), ("kl", kl)):
            self._parts[name] = self._parts.get(name, 0.0) + float(value.detach() / items)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        disable = getattr(self.accelerator.unwrap_model(model), "disable_adapter", None)
        was_training = model.training
        model.eval()  # no dropout in the target
        try:
            if disable is None:
                with running(mode="dense"):
                    return model(**inputs, use_cache=False).logits
            with disable(), running(mode="dense"):
                return model(**inputs, use_cache=False).logits
        finally:
            model.train(was_training)

    def finish_step(self) -> dict[str, float]:
        """Sum up an optimizer step over ranks, move the price, and return the step's figures."""
        sums = torch.tensor([self._executed, self._dense], dtype=torch.float64, device=self.args.device)
        executed, dense = self.accelerator.reduce(sums, reduction="sum").tolist()
        share = executed / dense
        figures = {**self._parts, "compute": share, "price": self.ascent.price}
        self.ascent.update(share)
        self._executed = self._dense = 0.0
        self._parts = {}
        return figures

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
        """Save the last whole step, unless it is saved already or the interrupt fell into an update."""
        last = last_checkpoint(Path(str(self.args.output_dir)))
        saved = last is not None and last.name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.progress.between_updates and self.state.global_step > 0 and not saved:
            self._save_checkpoint(self.model, trial=None)  # type: ignore[arg-type]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What `Trainer` saves, and last of all the budget's state: a checkpoint without it is not whole."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            values = {
                "multiplier": self.ascent.multiplier,
                "violation": self.ascent.violation,
                "history": self.progress.history,
            }
            save_json(folder / f"{STATE_FILE}.part", values)
            os.replace(folder / f"{STATE_FILE}.part", folder / STATE_FILE)

    def restore(self, checkpoint: Path) -> None:
        """Continue the dual ascent where a checkpoint left it."""
        values = load_json(checkpoint / STATE_FILE)
        self.ascent.multiplier, self.ascent.violation = values["multiplier"], values["violation"]
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


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder, or None."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Ascend(TrainerCallback):
    """Moves the price after every optimizer step, logs, and stops a run that would spoil the weights."""

    def __init__(self, trainer: SkipTrainer) -> None:
        self.trainer = trainer
        self.recent: deque[float] = deque(maxlen=trainer.settings.collapse_steps)
        self.history: list[dict[str, float]] = []
        self.between_updates = True

    def restore(self, history: list[dict[str, float]]) -> None:
        self.history = history
        self.recent.extend(figures["compute"] for figures in history)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A loss may be finite and its gradient not. With fp16 the scaler finds these and skips the step.
        if self.trainer.accelerator.scaler is None:
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]  # type: ignore[union-attr]
            if not bool(torch.isfinite(nn.utils.get_total_norm(grads))):
                raise TrainingError(
                    f"a gradient is not finite at step {state.global_step + 1}. "
                    + self.trainer.advice("the learning rates")
                )
        self.between_updates = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        figures = self.trainer.finish_step()
        self.history.append({"step": state.global_step, **figures})
        self.recent.append(figures["compute"])
        self.between_updates = True
        full = len(self.recent) == self.recent.maxlen
        if full and max(self.recent) <= self.trainer.settings.collapse < self.trainer.settings.budget:
            raise TrainingError(
                f"the router collapsed: the last {len(self.recent)} steps executed at most {max(self.recent):.1%} of "
                f"the dense compute, the budget is {self.trainer.settings.budget:.0%}. Start again with a lower "
                "`gate_learning_rate` or a higher `damping`."
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs and self.history:
            logs.update({k: v for k, v in self.history[-1].items() if k != "step" and not math.isnan(v)})
