"""A batch where a model is."""

from collections.abc import Mapping

from torch import Tensor, nn


def to_model(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch on a model's device, what is no integer in its dtype: not every vision tower casts its pixels itself."""
    from transformers import BatchFeature

    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return dict(BatchFeature(dict(batch)).to(first.device, first.dtype))
