"""The training objective: answer the question, stay close to the full model, keep the compute budget.

loss = CE + kd * KL(full || gated) + k * (executed - budget * dense) / scale, all per answer token.

Every term is a sum over rows divided by the number of answer tokens of the whole optimizer step, so gradients do
not depend on how a batch is split over accumulation steps or ranks. The coefficient k comes from dual ascent on
the measured compute of earlier steps: it is a constant within a step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from skipit.router import Step
from skipit.theory.cost import Compute, CostModel, step_compute
from skipit.theory.labels import predicts_answer


def answer_losses(
    student: Float[Tensor, "batch seq vocabulary"],
    teacher: Float[Tensor, "batch seq vocabulary"] | None,
    labels: Int[Tensor, "batch seq"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and KL(teacher || student), each summed over answer tokens, in nats.

    Args:
        student: logits of the gated model.
        teacher: logits of the full model, or None for no distillation.
        labels: -100 everywhere but on answer tokens; logits at t predict the label at t + 1.
    """
    chosen = predicts_answer(labels)
    predicted = torch.log_softmax(student[:, :-1][chosen].float(), dim=-1)
    ce = F.nll_loss(predicted, labels[:, 1:][chosen], reduction="sum")
    if teacher is None:
        return ce, torch.zeros_like(ce)
    wanted = torch.log_softmax(teacher[:, :-1][chosen].float(), dim=-1)
    return ce, F.kl_div(predicted, wanted, reduction="sum", log_target=True)


def gated_compute(costs: CostModel, step: Step) -> Compute:
    """FLOPs of a masked training step: from the hard decisions, differentiated through the gates' probabilities."""
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
