"""What the tokens of a row are: its answer, by labels as transformers has them, and their modality."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from skipit.router import token_modality

IGNORE = -100


def predicts_answer(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch predicted"]:
    """Where the logits at a token predict an answer token, the one after it; the last token predicts none."""
    return labels[:, 1:] != IGNORE


def before_answer(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Tokens of the prompt, before the first answer token; what is asked later, or stands behind an end, is none."""
    return (labels != IGNORE).cumsum(-1) == 0


def token_kinds(config: Any, inputs: dict[str, Tensor]) -> Int[Tensor, "batch seq"]:
    """The modality of every token that a model is given, -1 for pads."""
    modality = token_modality(config, inputs["input_ids"], inputs.get("mm_token_type_ids"))
    return modality.masked_fill(~inputs.get("attention_mask", torch.ones_like(modality)).bool(), -1)
