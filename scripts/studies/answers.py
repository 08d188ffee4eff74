"""What a model answers when it is given the right tokens before, and what that costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from skipit.router import Step, Trace, running
from skipit.theory.cost import Costs, share_of
from skipit.theory.inputs import to_model
from skipit.theory.labels import IGNORE, before_answer, predicts_answer

Options = Callable[[dict[str, Tensor]], Mapping[str, Any]]


class Answers:
    """Teacher-forced answers of one model on some batches, with what they cost.

    Attributes:
        predicted: per batch, the most likely token at each answer position; -100 elsewhere.
        steps: per batch, what ran; empty for a dense run.
    """

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.steps: list[Step] = []

    def share(self, costs: Costs) -> float:
        """Executed share of the dense decoder's FLOPs; 1 for a dense run."""
        if not self.steps:
            return 1.0
        return share_of(self.steps, costs)

    def same(self, wanted: Sequence[Tensor]) -> float:
        """Share of rows whose every answer token is as wanted, [batch, seq] per batch."""
        return float(same_rows(self.predicted, wanted).double().mean())


def same_rows(first: Sequence[Tensor], second: Sequence[Tensor]) -> Bool[Tensor, " rows"]:
    """Whether every answer token of a row is the same in both, [batch, seq] per batch."""
    return torch.cat([(one == other).all(-1) for one, other in zip(first, second, strict=True)])


def always(options: Mapping[str, Any]) -> Options:
    """Options that need nothing of the batch."""
    return lambda batch: options


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[dict[str, Tensor]], options: Options) -> Answers:
    """Run a model over batches with labels, in gathered execution.

    Teacher-forced, which for exact match is what greedy generation gives. Answers do not decide for their prompt.

    Args:
        model: in eval mode.
        batches: with labels.
        options: of `running`, given the batch: most need nothing of it.
    """
    out = Answers()
    for batch in batches:
        moved = to_model(batch, model)
        inputs = {key: value for key, value in moved.items() if key != "labels"}
        labels, trace = moved["labels"], Trace()
        with running(**{"mode": "gathered", "prompt": before_answer(labels), "trace": trace, **options(moved)}):
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        out.predicted.append(logits.argmax(-1).masked_fill(~predicts_answer(labels), IGNORE).cpu())
        out.steps += trace.steps
    return out


def right(batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """The right answers, as `Answers.same` takes them."""
    return [batch["labels"][:, 1:].cpu() for batch in batches]
