"""What a router spends on what: kinds of question, right and wrong answers, hard rows, cells asked about.

On any data rows are grouped by `kind` and by how they are answered. On the reference's data the patches of the cells
that a question asks about are told from the others. Its image comes before the question, and a causal decoder's image
tokens cannot know what will be asked: a difference between such cells is then chance, or a cell's content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.eval.measure.difficulty import row_difficulty
from skipit.eval.measure.recorded import Kinds, Recorded, Row
from skipit.eval.measure.runner import completed
from skipit.eval.statistics import USUAL, Resampling
from skipit.router import VISION, token_modality
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator, batches
from skipit.train.reference.digits import cell_patches

from .adaptivity import Adaptivity, measure_adaptivity
from .confidence import ReliabilityChange, compare_confidence
from .pattern import row_skip_rates

ASKED = "cells asked about"


@dataclass(frozen=True)
class Spending:
    """What a router does with single rows.

    Attributes:
        adaptivity: executed FLOPs by group, difficulty and kind of token.
        confidence: how well the gated model's matches its accuracy, beside the dense one's.
        skip_rates: share of each row's vision tokens that skip each layer, as `find_pattern` takes it; NaN without.
    """

    adaptivity: Adaptivity
    confidence: ReliabilityChange
    skip_rates: Float[Tensor, "rows layers"]


def measure_spending(
    dense: Recorded,
    gated: Recorded,
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    costs: CostModel,
    *,
    batch_size: int = 32,
    resampling: Resampling = USUAL,
    progress: Callable[[int], None] = lambda rows: None,
) -> Spending:
    """See what a gated model spent on which of the rows that it and the dense one have answered.

    Args:
        dense: what the untouched model did: says which answers skipping changed.
        gated: what the model with gates did, with `asked_cells` as its kinds of token where rows have such.
        model: the untouched model, which says how hard a row is.
        processor: of both.
        rows: that were answered; optionally with `kind`.
        costs: of the gated model's layers.
        batch_size: rows per call.
        resampling: of rows.
        progress: called with the number of rows before each batch whose difficulty is measured.

    Raises:
        InputError: there are no rows, or a row cannot be read or has no answer; the message names it.
    """
    complete = [completed(row, number) for number, row in enumerate(rows)]
    kinds = [row.get("kind") for row in complete]
    groups = {
        "answer": ["right" if right else "wrong" for right in gated.right.tolist()],
        "dense answer": ["right" if right else "wrong" for right in dense.right.tolist()],
        "beside dense": [
            "the same" if mine == theirs else "another"
            for mine, theirs in zip(gated.answers, dense.answers, strict=True)
        ],
    }
    if any(kind is not None for kind in kinds):
        groups = {"question": [str(kind) for kind in kinds], **groups}

    def collate(batch: Sequence[Row]) -> dict[str, Tensor]:
        progress(len(batch))
        return Collator(processor)(batch)

    hard = row_difficulty(model, batches(complete, collate, batch_size))
    adaptivity = measure_adaptivity(
        gated.records,
        costs,
        groups=groups,
        difficulty={f"dense {name}": values.numpy() for name, values in hard.items()},
        resampling=resampling,
    )
    confidence = compare_confidence(dense, gated, resampling=resampling)
    return Spending(adaptivity, confidence, row_skip_rates(gated.records))


def asked_cells(config: Any) -> Kinds:
    """A kind of token on the reference's data: the patches of the cells that a row's `cells` names.

    Another data set may have cells of its own; the reference's come with the nine digits that they show. Rows without
    either have no such tokens.

    Args:
        config: of the model, which tells image tokens.
    """

    def kinds(rows: Sequence[Row], inputs: dict[str, Tensor]) -> dict[str, Bool[Tensor, "batch seq"]]:
        if any(row.get("cells") is None or row.get("digits") is None for row in rows):
            return {}
        vision = token_modality(config, inputs["input_ids"], inputs.get("mm_token_type_ids")) == VISION
        asked = torch.zeros_like(vision)
        for row, values in enumerate(rows):
            places = vision[row].nonzero()[:, 0]
            shown = torch.from_numpy(cell_patches(values["cells"], len(places)))
            asked[row, places[shown.to(places.device)]] = True
        return {ASKED: asked}

    return kinds
