"""The depth of every token of one answer, laid out as the first image's patches and the text."""

import pytest
import torch
from torch import Tensor

from skipit.eval.measure.depth import answer_depth
from skipit.eval.measure.patches import Area, View
from skipit.router import Decision, Step

IMAGE = 40
SQUARE = View(Area(0, 0, 8, 8), torch.tensor([[0, 1], [2, 3]]))


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return f" w{ids[0]} "


def step(modality: list[int], runs: list[list[int]], past: int = 0) -> Step:
    """One call of one row: per layer, which tokens ran."""
    decisions = {layer: Decision(torch.tensor([row], dtype=torch.bool)) for layer, row in enumerate(runs)}
    return Step(torch.tensor([modality]), torch.ones(1, len(modality), dtype=torch.bool), past, decisions=decisions)


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


def test_patches_and_words() -> None:
    prefill = step([0, 1, 1, 1, 1, 0], [[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]])
    decode = step([0], [[1], [0], [0]], past=6)
    depth = answer_depth([prefill, decode], ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7, 8), Tokenizer(), [SQUARE])
    assert depth.patches.tolist() == [[1, 2], [1, 3]]
    # The last token, 8, never entered the model.
    assert list(zip(depth.tokens, depth.token_depth, strict=True)) == [("w5", 2), ("w6", 3), ("w7", 1)]
    assert depth.layers == 3


def test_no_image() -> None:
    depth = answer_depth([step([0, 0], [[1, 0]])], torch.arange(3), Tokenizer(), [])
    assert depth.patches.numel() == 0
    assert depth.token_depth == [1, 0]


def test_more_than_one_row() -> None:
    two = Step(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="`steps`: got a trace of 2 rows, expected 1"):
        answer_depth([two], torch.arange(2), Tokenizer(), [])
