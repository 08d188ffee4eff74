"""Which tokens are text and which are vision, read from the inputs and the model's own configuration."""

from functools import reduce
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import InputError

TEXT, VISION = 0, 1
MODALITIES = ("text", "vision")

# The names under which transformers' configurations keep the placeholder ids of image and video tokens.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def vision_token_ids(config: Any) -> list[int]:
    """Token ids that stand for image or video features in `input_ids`, from a model's configuration."""
    # Not by `getattr(config, name)`, which takes some microseconds for all names: this is asked at every step.
    own, kind = vars(config), type(config)
    ids = {own.get(name, getattr(kind, name, None)) for name in PLACEHOLDERS}
    return sorted(i for i in ids if isinstance(i, int) and i >= 0)


def token_modality(
    config: Any,
    input_ids: Int[Tensor, "batch seq"] | None,
    mm_token_type_ids: Int[Tensor, "batch all"] | None = None,
    length: int | None = None,
) -> Int[Tensor, "batch tokens"]:
    """The modality of every token of a call: 0 text, 1 vision.

    Args:
        config: the configuration of the whole model.
        input_ids: with image and video placeholders in place.
        mm_token_type_ids: as some processors return: 0 text, above 0 image or video; wins when it covers the call's
            tokens.
        length: tokens of this call, when `mm_token_type_ids` may be longer (the whole sequence, in decoding).

    Raises:
        InputError: neither is there to tell.
    """
    if mm_token_type_ids is not None and length in (None, mm_token_type_ids.shape[1]):
        return (mm_token_type_ids > 0).long()
    if input_ids is None:
        raise InputError(
            "cannot tell text from vision tokens: got `inputs_embeds` without `input_ids` or `mm_token_type_ids`. "
            "Pass `input_ids`, or, to a model that takes them, `mm_token_type_ids` [batch, seq] (0 text, 1 vision)."
        )
    placeholders = vision_token_ids(config)
    if not placeholders:
        return torch.zeros_like(input_ids, dtype=torch.long)
    return reduce(torch.logical_or, [input_ids == placeholder for placeholder in placeholders]).long()
