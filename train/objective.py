"""The training objective: answer the question, stay close to the full model. The budget is kept by the threshold.

loss = CE + kd * KL(full || gated), both per answer token.

Every term is a sum over rows divided by the number of answer tokens of the whole optimizer step, so gradients do
not depend on how a batch is split over accumulation steps or ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
