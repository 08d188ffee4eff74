"""What a model is called with: a batch where it is, and no logits that nobody reads."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn


def keeps_logits(model: Any) -> bool:
    """Whether a model, or the one within PEFT's, takes `logits_to_keep`: those of a whole vocabulary cost much."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in signature(own.forward).parameters


def to_model(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch on a model's device, what is no integer in its dtype: not every vision tower casts its pixels itself."""
    from transformers import BatchFeature

    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return dict(BatchFeature(dict(batch)).to(first.device, first.dtype))
