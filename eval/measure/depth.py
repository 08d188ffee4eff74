"""How deep each token of one answer was computed, laid out as the image's patches and the text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipit.router import VISION, Step


@dataclass(frozen=True)
class Depth:
    """Layers executed per token.

    Attributes:
        patches: [rows, columns] for the first image.
        tokens: text tokens of the prompt and the answer, in order.
        token_depth: layers executed for each of them.
        layers: of the decoder.
    """

    patches: Tensor
    tokens: list[str]
    token_depth: list[int]
    layers: int


def answer_depth(
    steps: list[Step], ids: Tensor, tokenizer: Any, image_tokens: int | None = None, images: int = 1
) -> Depth:
    """Lay out the trace of one generation of one row.

    Args:
        steps: the trace of a single row, prefill first.
        ids: int64 [seq], prompt and answer as `generate` returns them.
        tokenizer: names the text tokens.
        image_tokens: tokens of the first image; None takes the first run of vision tokens, or an equal share of all
            where images follow each other without a token between them.
        images: how many there are.

    Raises:
        ValueError: the trace has another number of rows than one.
    """
    if steps[0].modality.shape[0] != 1:
        raise ValueError(f"`steps`: got a trace of {steps[0].modality.shape[0]} rows, expected 1.")
    modality = torch.cat([step.modality[0] for step in steps])
    depth = torch.cat([step.run[:, 0].sum(0) for step in steps])
    vision = (modality == VISION).nonzero().flatten()
    if image_tokens is None:
        breaks = (vision.diff() != 1).nonzero().flatten()
        first = int(breaks[0]) + 1 if len(breaks) else len(vision)
        image_tokens = first if len(breaks) + 1 >= images else len(vision) // images
    rows, columns = patch_grid(image_tokens)
    patches = depth[vision[:image_tokens]].float().view(rows, columns)
    # The last generated token never enters the model.
    text = (modality != VISION).nonzero().flatten()
    names = [tokenizer.decode([int(ids[i])]).strip() for i in text]
    return Depth(patches, names, [int(depth[i]) for i in text], len(steps[0].decisions))


def patch_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens: a square, or the most nearly square rectangle."""
    rows = int(tokens**0.5)
    while rows > 1 and tokens % rows:
        rows -= 1
    return max(rows, 1), tokens // max(rows, 1)
