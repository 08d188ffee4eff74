"""Which tokens of a row are its answer: labels as transformers has them, -100 everywhere else."""

from jaxtyping import Bool, Int
from torch import Tensor

IGNORE = -100


def predicts_answer(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch predicted"]:
    """Where the logits at a token predict an answer token, the one after it; the last token predicts none."""
    return labels[:, 1:] != IGNORE


def before_answer(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Tokens of the prompt, before the first answer token; what is asked later, or stands behind an end, is none."""
    return (labels != IGNORE).cumsum(-1) == 0
