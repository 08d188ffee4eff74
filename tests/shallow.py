"""The reference architecture with few layers and random weights."""

import copy
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from studies.architecture import build_model


def shallow_reference(layers: int) -> Any:
    """A LLaVA of so many decoder layers and one of vision, the same each time, in eval mode."""
    config = copy.deepcopy(build_model().config)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = layers, 1
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()
