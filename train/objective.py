"""The training objective: answer the question, stay close to the full model, keep the compute budget.

loss = CE + kd * KL(full || gated) + k * (executed - budget * dense) / scale, all per answer token.

Every term is a sum over rows divided by the number of answer tokens of the whole optimizer step, so gradients do
not depend on how a batch is split over accumulation steps or ranks. The coefficient k comes from dual ascent on
the measured compute of earlier steps: it is a constant within a step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from skipit.router import Step
from skipit.theory.cost import Compute, Costs, step_compute
from skipit.theory.labels import IGNORE, predicts_answer


class AnswerLosses(NamedTuple):
    """Sums over the answer tokens of some rows.

    Attributes:
        ce: cross-entropy, nats.
        kl: KL(teacher || student), nats.
        correct: how many tokens the student would choose itself.
    """

    ce: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    correct: Int[Tensor, ""]


def answer_targets(labels: Int[Tensor, "batch seq"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, "batch kept"]]:
    """The positions whose logits predict an answer token in any row, and the labels predicted there, or -100.

    Args:
        labels: -100 everywhere but on answer tokens; logits at t predict the label at t + 1.
    """
    kept = predicts_answer(labels).any(0).nonzero()[:, 0]
    return kept, labels[:, kept + 1]


def answer_losses(
    student: Float[Tensor, "batch kept vocabulary"],
    teacher: Float[Tensor, "batch kept vocabulary"] | None,
    targets: Int[Tensor, "batch kept"],
) -> AnswerLosses:
    """Cross-entropy, KL(teacher || student) and correct tokens, each summed over answer tokens.

    Args:
        student: logits of the gated model at the positions that `answer_targets` names.
        teacher: logits of the full model there, or None for no distillation.
        targets: what they predict, -100 where a row has no answer token.
    """
    chosen = targets != IGNORE
    predicted, wanted = torch.log_softmax(student[chosen].float(), dim=-1), targets[chosen]
    ce = F.nll_loss(predicted, wanted, reduction="sum")
    correct = (predicted.argmax(-1) == wanted).sum()
    if teacher is None:
        return AnswerLosses(ce, torch.zeros_like(ce), correct)
    full = torch.log_softmax(teacher[chosen].float(), dim=-1)
    return AnswerLosses(ce, F.kl_div(predicted, full, reduction="sum", log_target=True), correct)


def gated_compute(costs: Costs, step: Step) -> Compute:
    """What a masked training step spends: from the hard decisions, differentiated through the gates' probabilities."""
    probability = step.probability
    straight_through = step.run.float() + (probability - probability.detach())
    return step_compute(costs, straight_through, step.modality, step.real, step.kv, unit=step.unit, images=step.images)


@dataclass
class DualAscent:
    """The price of compute, adjusted until the budget is met.

    Augmented Lagrangian: price k = multiplier + damping * violation, where the multiplier adds up the violations
    (executed share - budget) of all steps so far. It may become negative, which buys compute that is left over.

    Attributes:
        budget: share of dense compute to spend.
        rate: step size.
        damping: see above.
        multiplier: the integral part, in nats per unit of compute share.
        violation: of the last step.
    """

    budget: float
    rate: float
    damping: float
    multiplier: float = 0.0
    violation: float = 0.0

    @property
    def price(self) -> float:
        """What one dense forward's worth of compute costs, in nats."""
        return self.multiplier + self.damping * self.violation

    def update(self, share: float) -> None:
        """Learn the share of compute that the last optimizer step executed."""
        self.violation = share - self.budget
        self.multiplier += self.rate * self.violation
