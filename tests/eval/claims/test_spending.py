"""What a router spends on what: groups, difficulty and kinds of token come from the right rows and places."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skipit.eval.claims.spending import ASKED, Spending, asked_cells, measure_spending
from skipit.eval.measure.recorded import Recorded
from skipit.eval.measure.runner import run_dataset
from skipit.eval.metrics import agreement
from skipit.eval.statistics import Resampling
from skipit.router import Decision, LayerByLayer, attach, token_modality
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.digits import cell_patches

FEW = Resampling(resamples=200)
SIZE = 12


class VisionInLayers(LayerByLayer):
    """Vision skips odd layers; patches of the grid's last cell skip even ones, too."""

    def decide_layer(self, layer: int, hidden: Tensor, call: Any, gate: Any) -> Decision:
        place = call.modality.cumsum(-1) - 1  # of a vision token among the image's
        last = torch.from_numpy(cell_patches([8], 36)).to(place.device)[place.clamp(0, 35)]
        vision = call.modality.bool()
        return Decision(~vision | ((layer % 2 == 0) & ~last))


@pytest.fixture(scope="module")
def models() -> Any:
    dense, processor = load_model("reference")
    gated, _ = load_model("reference")
    attach(gated)
    return dense, gated, processor


def spend(models: Any, rows: Any, batch_size: int = 32) -> tuple[Spending, Recorded, Recorded]:
    """What is spent on rows, and what the dense and the gated model did with them."""
    dense, gated, processor = models
    prompts, costs = Collator(processor, with_completion=False), CostModel.of(gated)
    settings: dict[str, Any] = {"batch_size": batch_size, "kinds": asked_cells(gated.config)}
    before = run_dataset(dense, processor, rows, prompts, costs, "retain", **settings).recorded
    after = run_dataset(gated, processor, rows, prompts, costs, "retain", **settings, policy=VisionInLayers()).recorded
    seen: list[int] = []
    found = measure_spending(
        before, after, dense, processor, rows, costs, resampling=FEW, batch_size=batch_size, progress=seen.append
    )
    assert sum(seen) == len(rows)
    return found, before, after


@pytest.fixture(scope="module")
def spent(models: Any) -> tuple[Spending, Recorded, Recorded]:
    return spend(models, reference_dataset("test", SIZE, kinds=["cell", "row"]), batch_size=5)


def test_rows_are_grouped_by_question_and_by_answers(spent: tuple[Spending, Recorded, Recorded]) -> None:
    found, dense, gated = spent
    groups = found.adaptivity.groups
    assert {level: c.rows for level, c in groups["question"].items()} == {"cell": SIZE // 2, "row": SIZE // 2}
    for factor, recorded in (("answer", gated), ("dense answer", dense)):
        right = int(recorded.right.sum())
        assert sum(c.rows for c in groups[factor].values()) == SIZE
        assert groups[factor].get("right") is None or groups[factor]["right"].rows == right
    same = agreement(dense.answers, gated.answers)
    assert sum(c.rows for level, c in groups["beside dense"].items() if level == "the same") == round(same * SIZE)
    assert set(found.adaptivity.difficulty) == {"dense loss", "dense entropy"}
    assert found.confidence.rows == SIZE
    assert found.confidence.gated.accuracy.value == gated.right.double().mean()
    json.dumps({"a": found.adaptivity.to_json(), "c": found.confidence.to_json()}, allow_nan=False)


def test_skip_rates_are_those_of_vision_by_row_and_layer(spent: tuple[Spending, Recorded, Recorded]) -> None:
    found, _, _ = spent
    assert found.skip_rates.shape == (SIZE, 12)
    assert found.skip_rates[:, 1::2].eq(1).all()
    assert torch.allclose(found.skip_rates[:, ::2], torch.full((SIZE, 6), 4 / 36).double())


def test_cells_asked_about_are_the_rows_own(models: Any) -> None:
    rows = [dict(row) for row in reference_dataset("test", 8, kinds=["cell"])]
    # The router skips more of the last cell: rows that ask about it, and about another.
    last, first = ([{**row, "cells": [cell]} for row in rows] for cell in (8, 0))
    asked_last, asked_first = (spend(models, r)[0].adaptivity.tokens[ASKED] for r in (last, first))
    assert asked_last.rows == 8
    assert asked_last.share < asked_last.rest
    assert asked_last.difference < 0 < asked_first.difference
    neither = [{k: v for k, v in row.items() if k != "digits"} for row in rows]
    assert spend(models, neither)[0].adaptivity.tokens == {}


def test_masks_are_in_the_prompt_s_places(models: Any) -> None:
    _, gated, processor = models
    rows = reference_dataset("test", 6)
    inputs = Collator(processor, with_completion=False)([dict(row) for row in rows])
    masks = asked_cells(gated.config)([dict(row) for row in rows], inputs)[ASKED]
    vision = token_modality(gated.config, inputs["input_ids"]).bool()
    assert not (masks & ~vision).any()
    for row, mask, image in zip(rows, masks, vision, strict=True):
        assert mask[image].tolist() == cell_patches(row["cells"], 36).tolist()


def test_patches_of_a_cell_are_where_its_pixels_are() -> None:
    pixels = np.zeros((48, 48), bool)
    pixels[16:32, 32:48] = True  # row 1, column 2: cell 5
    patches = pixels.reshape(6, 8, 6, 8).any((1, 3)).ravel()
    assert cell_patches([5], 36).tolist() == patches.tolist()
    assert cell_patches(range(9), 9).all()
    assert not cell_patches([], 36).any()
    with pytest.raises(ValueError, match="`patches`: got 35, expected a square whose side is a multiple of 3"):
        cell_patches([0], 35)
    with pytest.raises(ValueError, match=r"`cells`: got \[9\], expected numbers from 0 to 8"):
        cell_patches([9], 36)
