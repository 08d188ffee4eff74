"""Training peers' schemes alike: LoRA, rows, steps, cross-entropy and distillation as ours; gates and losses theirs."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from skipit.router import gated_layers, running
from skipit.theory.cost import CostModel
from skipit.theory.plan import Plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Rows
from skipit.train.launch import training_arguments
from skipit.train.run import prepare
from skipit.train.trainer import SkipTrainer

from .policies import Watched

PEER_GATE_RATE = 1e-2
Penalty = Callable[[Tensor, Tensor], Tensor]


class PeerTrainer(SkipTrainer):
    """A `SkipTrainer` whose decisions come from another policy, with a loss on them.

    Args:
        options: of `running` while training: `policy` and what goes with it.
        penalty: given the decisions [layers, batch, seq], straight-through, and the real tokens [batch, seq].
        soft: the penalty is given the probabilities, and the decisions have no gradient.
        **trainer: of `SkipTrainer`.
    """

    def __init__(self, *, options: Mapping[str, Any], penalty: Penalty | None, soft: bool, **trainer: Any) -> None:
        self.options, self.penalty, self.soft = dict(options), penalty, soft
        super().__init__(**trainer)

    def decider(self) -> Any:
        """The peer's policy: its budget is no threshold's."""
        return self.watched

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE + distillation as for ours, and the penalty."""
        self.watched = Watched(self.options["policy"], [], self.soft)
        with running(**self.options):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.penalty is None:
            return found
        added = self.penalty(torch.stack(self.watched.seen[: self.costs.depth]), inputs["attention_mask"].bool())
        return (found[0] + added, found[1]) if return_outputs else found + added


def fit(
    model: Any,
    processor: Any,
    rows: Any,
    plan: Plan,
    config: TrainConfig,
    options: Mapping[str, Any],
    *,
    gate: Callable[[], nn.Module] | None = None,
    change: Callable[[Any], Any] = lambda model: None,
    penalty: Penalty | None = None,
    soft: bool = False,
) -> Any:
    """Fine-tune LoRA, and gates where the policy asks them, and merge LoRA.

    Args:
        model: dense; it is changed.
        processor: its processor.
        rows: training rows.
        plan: initial linear gates.
        config: settings; its budget is not enforced here: a fixed policy has one, a gate has a penalty.
        options: of `running`: `policy` and what goes with it.
        gate: makes another gate for each layer.
        change: done to the gated model before training, such as hooks that scale what a layer adds.
        penalty: see `PeerTrainer`.
        soft: see `PeerTrainer`.

    Returns:
        The gated model in eval mode.
    """
    costs = CostModel.of(model)
    # A method is trained in one go: no checkpoints. Gates of several layers move by less than ours at a rate.
    rate = PEER_GATE_RATE if config.gate_learning_rate is None else config.gate_learning_rate
    config = replace(config, gate_learning_rate=rate, save_steps=config.steps + 1)
    peft_model = prepare(model, plan, config)
    if gate is not None:
        replace_gates(peft_model, gate)
    change(peft_model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PeerTrainer(
            options=options,
            penalty=penalty,
            soft=soft,
            settings=config,
            costs=costs,
            model=peft_model,
            args=training_arguments(config, folder),
            train_dataset=Rows(rows),
            data_collator=Collator(processor),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return peft_model.merge_and_unload().eval()


def replace_gates(peft_model: Any, gate: Callable[[], nn.Module]) -> None:
    """Put other gates where PEFT keeps the trained copies of ours."""
    for layer in gated_layers(peft_model):
        copies: Any = layer.layer_gate
        new = gate().to(next(layer.parameters()).device)
        copies.modules_to_save[copies.active_adapters[0]] = new.requires_grad_(True)


def sequence_penalty(capacity: float, first: int, end: int) -> Penalty:
    """Router-Tuning's loss: sum over routed layers `first` to `end` - 1 of relu(mean over rows of g - capacity)."""

    def penalty(run: Tensor, real: Tensor) -> Tensor:
        of_rows = (run * real).sum(-1) / real.sum(-1)
        return torch.relu(of_rows[first:end].mean(-1) - capacity).sum()

    return penalty


def gate_penalty(share: float) -> Penalty:
    """A term on routers of whole rows: how far the mean gate is above a share, times the layers."""

    def penalty(run: Tensor, real: Tensor) -> Tensor:
        of_rows = (run * real).sum(-1) / real.sum(-1)
        return torch.relu(of_rows.mean() - share) * len(run)

    return penalty


def rate_penalty(share: float) -> Penalty:
    """D-LLM's loss: mean over tokens of |mean over layers of a - share|."""

    def penalty(run: Tensor, real: Tensor) -> Tensor:
        return (run.mean(0) - share).abs()[real].mean()

    return penalty


def depth_penalty(weight: float, share: float) -> Penalty:
    """FlexiDepth's loss: weight times the mean over tokens of (sum over layers of w)^2, while too much runs.

    The authors have no budget: they choose the weight. Here it counts while more than `share` of the tokens and layers
    have w > 0.5 (ours); always on, it closed every router of the reference model.
    """

    def penalty(run: Tensor, real: Tensor) -> Tensor:
        open_share = (run.detach() > 0.5).float().mean(0)[real].mean()
        return weight * (open_share > share) * run.sum(0).square()[real].mean()

    return penalty
