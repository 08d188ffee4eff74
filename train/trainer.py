"""A Hugging Face `Trainer` for gates and LoRA under a compute budget."""

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from skipit.router import MODALITIES, Gated, SkipItError, Step, Trace, find_router, running
from skipit.router.call import Mode
from skipit.router.config import EVERYTHING, decision_points
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, save_json
from skipit.theory.calibrate import Listening, shares_of, threshold_for, totals
from skipit.theory.cost import Costs, trace_compute
from skipit.theory.inputs import keeps_logits, to_model
from skipit.theory.labels import IGNORE, before_answer
from skipit.theory.measuring import evaluating
from skipit.theory.sharded import sharded

from .config import TrainConfig
from .following import Following
from .launch import barrier, check_engine, stage_of
from .manifest import save_manifest
from .objective import AnswerLosses, answer_losses, answer_targets
from .run_folder import STATE_FILE, last_checkpoint

PER_ANSWER = {"ce": "ce", "kl": "kl", "accuracy": "correct"}
GATE = "layer_gate"
# What a step may move a gate's logit by, about, where no learning rate is given; and where the threshold's derivative
# is missing (`Following`): there all of them drift together, and fast ones end in ruin.
LOGIT_RATE, WITHOUT_DERIVATIVE = 0.5, 0.1
CLOSE, TRIES = 0.0005, 24  # of the search for a threshold: share, and thresholds
AIMS = 10  # times in a run that what to spend is found anew: what gates have learned changes what rows spend


class TrainingError(SkipItError):
    """Training cannot go on; the last checkpoint is good."""


class SkipTrainer(Trainer):
    """Trains a gated PEFT model: straight-through gates in masked execution, distillation from the model itself.

    The budget is spent in every step: the threshold of the next is the one at which the last would have spent it. So
    gates learn at the operating point that is calibrated in the end, and which tokens are worth most, not how many.

    A budget is what held-out rows spend. Rows of training that have more text to an image, such as conversations, spend
    more at the same threshold, and less would be left of their images than of those that the model is for. So a step
    spends what rows of training spend where held-out rows spend the budget, which is found anew `AIMS` times: gates
    learn to spend it elsewhere, and a run would end at other thresholds than those that are calibrated for it.

    The teacher is the same model with gates and LoRA off: no second copy in memory. Every process runs every module,
    whatever its rows skip: DeepSpeed mixes up gradients, or hangs, where processes call different modules.

    Args:
        settings: budgets and weights of the objective.
        costs: of the model's layers, in what the budget is a share of.
        held: held-out batches that the budgets are for, with labels; none takes them as shares of the rows of
            training.
        sample: batches of these rows.
        **trainer: passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        settings: TrainConfig,
        costs: Costs,
        held: Sequence[dict[str, Tensor]] = (),
        sample: Sequence[dict[str, Tensor]] = (),
        callbacks: list[Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.settings, self.costs, self.held, self.sample = settings, costs, list(held), list(sample)
        self.budgets = list(settings.points.values())
        self.targets = list(self.budgets)  # what a step spends for each
        self.thresholds = [0.0] * len(self.budgets)  # where the plan spends the first of them
        self.before: list[dict[str, float]] = []  # how held-out rows were answered there
        self.progress = _Progress(self)
        self.rates: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._ran: list[tuple[Step, Tensor]] = []  # what this step's batches ran, and what gates said
        # First, so that the others may interrupt training between steps.
        super().__init__(callbacks=[self.progress, *(callbacks or [])], **trainer)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch below

    @property
    def turn(self) -> int:
        """Which of the budgets this step is for."""
        return self.state.global_step % len(self.budgets)

    def begin(self) -> None:
        """Aim, and find how held-out rows are answered by what training begins with."""
        model: Any = self.model
        self.aim()
        points = zip(self.budgets, self.thresholds, strict=True)
        with evaluating(model):
            self.before = [self.answered(threshold if budget < 1 else EVERYTHING) for budget, threshold in points]

    def aim(self) -> None:
        """Find where held-out rows spend each budget, and what rows of training spend there, as gates are now."""
        model: Any = self.model
        spends = partial(shares_of, model, costs=self.costs, kv=self.settings.kv, mode=self.mode)
        with evaluating(model):
            held, sample = spends(self.held), spends(self.sample)
            for turn, budget in enumerate(self.budgets):
                if budget < 1:
                    start = self.thresholds[turn]
                    threshold, _ = threshold_for(held, budget, start=start, tolerance=CLOSE, steps=TRIES)
                    self.thresholds[turn], self.targets[turn] = threshold, sample(threshold)
        self.thresholds, self.targets = broadcast_object_list([self.thresholds, self.targets])  # equal to the last bit

    @torch.no_grad()
    def answered(self, threshold: float) -> dict[str, float]:
        """How held-out rows are answered at a threshold, by a model in eval mode.

        Returns:
            The share of answer tokens that are right after right ones (`accuracy`), and the `kl` to the dense model, in
            nats per token.
        """
        model: Any = self.model
        answers, sums = 0, AnswerLosses(*torch.zeros(3, dtype=torch.float64))
        for batch in self.held:
            inputs = to_model(batch, model)
            labels = inputs.pop("labels")
            kept, targets = answer_targets(labels)
            teacher = self._teacher(model, inputs, kept)
            with running(policy=Gated(threshold), kv=self.settings.kv, mode=self.mode, prompt=before_answer(labels)):
                losses = answer_losses(self._logits(model, inputs, kept), teacher, targets)
            sums = AnswerLosses(*(old + new.cpu() for old, new in zip(sums, losses, strict=True)))
            answers += int((targets != IGNORE).sum())
        return {"accuracy": float(sums.correct) / answers, "kl": float(sums.kl) / answers}

    @property
    def mode(self) -> Mode:
        """How a model is run whose weights may be sharded: every process has to call every module then."""
        return "masked" if stage_of(self.args) == 3 else "gathered"

    def decider(self) -> Any:
        """The policy of this step."""
        return Following(self.thresholds[self.turn], costs=self.costs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE + distillation, summed over this batch and divided by the answer tokens of the whole step."""
        inputs = dict(inputs)
        self._check_images(inputs)
        labels = inputs.pop("labels")
        kept, targets = answer_targets(labels)
        teacher = self._teacher(model, inputs, kept) if self.settings.distillation else None
        trace, policy = Trace(), self.decider()
        with running(policy=policy, mode="masked", prompt=before_answer(labels), trace=trace):
            logits = self._logits(model, inputs, kept)
        losses, step = answer_losses(logits, teacher, targets), trace.steps[-1].detached()
        items = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE).sum()
        loss = (losses.ce + self.settings.distillation * losses.kl) / items
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} "
                f"(CE {losses.ce.item()}, KL {losses.kl.item()}). " + self.advice("the learning rates")
            )
        if num_items_in_batch is not None:  # counted over all processes, over which gradients will be averaged
            loss = loss * self.accelerator.num_processes
        modality = F.one_hot(step.modality, len(MODALITIES)).double()
        compute = trace_compute(self.costs, [step])
        executed, dense = compute.executed.sum(), compute.dense.sum()
        self._add(executed=executed, dense=dense, answers=(targets != IGNORE).sum(), **losses._asdict())
        if isinstance(policy, Listening):
            self._ran.append((step, torch.cat(policy.said)))
        self._add(ran=torch.einsum("lbs,bsm->lm", step.run.double(), modality))
        self._add(tokens=torch.einsum("bs,bsm->m", step.real.double(), modality))
        return (loss, {"logits": logits}) if return_outputs else loss

    def _threshold_after(self, turn: int) -> float:
        """The threshold at which the step that ends here would have spent its budget, all processes together."""
        steps, said = zip(*self._ran, strict=True)
        spent = totals(steps, said, self.costs)

        def share(threshold: float) -> float:
            here = torch.tensor(spent(threshold), dtype=torch.float64, device=self.args.device)
            executed, dense = self.accelerator.reduce(here, reduction="sum").tolist()
            return float(executed / dense)

        start = self.thresholds[turn]
        return threshold_for(share, self.targets[turn], start=start, tolerance=CLOSE, steps=TRIES)[0]

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
        if keeps_logits(self.accelerator.unwrap_model(model)):
            return model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return model(**inputs, use_cache=False).logits[:, kept]

    @torch.no_grad()
    def _teacher(self, model: nn.Module, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
        disable = getattr(self.accelerator.unwrap_model(model), "disable_adapter", nullcontext)
        with evaluating(model), disable(), running(mode="dense"):  # no dropout in the target
            return self._logits(model, inputs, kept)

    def finish_step(self) -> dict[str, float]:
        """Sum up an optimizer step over processes, set the budget's next threshold, and return the step's figures."""
        flat = torch.cat([value.flatten() for value in self._sums.values()])
        parts = self.accelerator.reduce(flat, reduction="sum").split([v.numel() for v in self._sums.values()])
        sums = {name: part.view(old.shape) for (name, old), part in zip(self._sums.items(), parts, strict=True)}
        self._sums = {}
        self.rates = (sums["ran"] / sums["tokens"]).cpu()
        per_answer = {name: float(sums[key] / sums["answers"]) for name, key in PER_ANSWER.items()}
        turn = (self.state.global_step - 1) % len(self.budgets)
        share, threshold = float(sums["executed"] / sums["dense"]), self.thresholds[turn]
        if self._ran:
            self.thresholds[turn], self._ran = self._threshold_after(turn), []
        figures = {"budget": self.budgets[turn], "target": self.targets[turn], "compute": share}
        return {**per_answer, **figures, "threshold": threshold}

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
            groups = [{"params": gates, "lr": self.gate_rate, "weight_decay": 0.0}]
            if others:
                groups.append({"params": others, "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    @property
    def gate_rate(self) -> float:
        """The gates' learning rate. Adam moves every weight by about as much, so a logit by as much as width times."""
        if (given := self.settings.gate_learning_rate) is not None:
            return given
        model: Any = self.model
        gates = [p for name, p in model.named_parameters() if GATE in name and p.requires_grad]
        # Under ZeRO-3 a parameter's own shape is that of nothing; a plan in time may leave no gate to learn.
        width = max((getattr(p, "ds_shape", p.shape)[-1] for p in gates), default=1)
        _, router = find_router(model)
        once = len(decision_points(router.config.decide_at, router.num_layers)) == 1
        return (WITHOUT_DERIVATIVE if sharded(gates) and not once else LOGIT_RATE) / width

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
        """What `Trainer` saves, and last of all the budgets' thresholds: a checkpoint without them is not whole.

        Raises:
            TrainingError: it cannot be written; what was written of it is removed, the one before it is whole.
        """
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            barrier()  # for the parts that other processes write
            if self.args.should_save:
                values = {
                    "thresholds": self.thresholds,
                    "targets": self.targets,
                    "before": self.before,
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
        """Continue with the thresholds of a checkpoint, and with what else it knows of the beginning."""
        values = load_json(checkpoint / STATE_FILE)
        self.thresholds, self.progress.history = values["thresholds"], values["history"]
        self.targets, self.before = values.get("targets", self.budgets), values.get("before", [])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, but with the learning rates of this run's settings, which may have been lowered."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        rates: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        wanted = (self.gate_rate, self.args.learning_rate)
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


class _Progress(TrainerCallback):
    """Keeps the figures of every optimizer step, and stops a run that would spoil the weights."""

    def __init__(self, trainer: SkipTrainer) -> None:
        self.trainer = trainer
        self.history: list[dict[str, float]] = []
        self.between_updates = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_engine(self.trainer.settings.deepspeed, self.trainer.model_wrapped)
        if self.trainer.held and state.global_step == 0:
            self.trainer.begin()

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
        due = state.global_step % max(1, state.max_steps // AIMS) == 0
        if self.trainer.held and due and state.global_step < state.max_steps:  # no step would follow
            self.trainer.aim()
        self.between_updates = True


def _gradient_norm(trainer: SkipTrainer) -> Tensor:
    """Of the step's gradients; DeepSpeed has them in shards and made the update already, of which nothing is saved."""
    engine: Any = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        return torch.as_tensor(engine.get_global_grad_norm() or 0.0)
    return nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])  # type: ignore[union-attr]
