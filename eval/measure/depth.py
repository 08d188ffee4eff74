"""How deep each token of one answer was computed, laid out on the picture and along the text."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router import VISION, Step

from .patches import Area, View, on_the_picture


@dataclass(frozen=True)
class Depth:
    """Layers executed per token.

    Attributes:
        patches: of the first picture; the mean where several tokens show a cell.
        area: of that picture which they show.
        tokens: text tokens of the prompt and the answer, in order.
        token_depth: layers executed for each of them.
        layers: of the decoder.
    """

    patches: Float[Tensor, "rows columns"]
    area: Area
    tokens: list[str]
    token_depth: list[int]
    layers: int


def answer_depth(steps: list[Step], ids: Tensor, tokenizer: Any, views: list[View]) -> Depth:
    """Lay out the trace of one generation of one row.

    Args:
        steps: the trace of a single row, prefill first.
        ids: int64 [seq], prompt and answer as `generate` returns them.
        tokenizer: names the text tokens.
        views: where the vision tokens of the first picture lie; empty without one.

    Raises:
        ValueError: the trace has another number of rows than one.
    """
    if steps[0].modality.shape[0] != 1:
        raise ValueError(f"`steps`: got a trace of {steps[0].modality.shape[0]} rows, expected 1.")
    modality = torch.cat([step.modality[0] for step in steps]).cpu()
    depth = torch.cat([step.run[:, 0].sum(0) for step in steps]).cpu()
    area, patches = on_the_picture(views, depth[modality == VISION].float())
    ids = ids.cpu()
    # The last generated token never enters the model.
    text = (modality != VISION).nonzero().flatten()
    names = [tokenizer.decode([int(ids[i])]).strip() for i in text]
    return Depth(patches, area, names, [int(depth[i]) for i in text], len(steps[0].decisions))
