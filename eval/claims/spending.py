"""What a router spends on what: kinds of question, right and wrong answers, hard rows, cells asked about.

On any data rows are grouped by `kind` and by how they are answered. On the reference's data the patches of the cells
that a question asks about are told from the others. Its image comes before the question, and a causal decoder's image
tokens cannot know what will be asked: a difference between such cells is then chance, or a cell's content.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.eval.measure.difficulty import row_difficulty
from skipit.eval.measure.recorded import Kinds, Recorded, record_rows
from skipit.eval.statistics import USUAL, Resampling
from skipit.router import VISION, token_modality
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator, batches
from skipit.train.reference.digits import cell_patches

from .adaptivity import Adaptivity, measure_adaptivity
from .confidence import CalibrationChange, compare_calibration
from .pattern import row_skip_rates

ASKED = "cells asked about"


@dataclass(frozen=True)
class Spending:
    """What a router does with single rows.

    Attributes:
        adaptivity: executed FLOPs by group, difficulty and kind of token.
        calibration: of the gated model's confidence beside the dense one's.
        skip_rates: share of each row's vision tokens that skip each layer, as `find_pattern` takes it; NaN without.
        dense: answers of the dense model.
        gated: answers of the gated one.
    """

    adaptivity: Adaptivity
    calibration: CalibrationChange
    skip_rates: Float[Tensor, "rows layers"]
    dense: Recorded
    gated: Recorded


def measure_spending(
    dense: Any,
    gated: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    resampling: Resampling = USUAL,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> Spending:
    """Answer rows with both models, and see what the gated one spends on what.

    Args:
        dense: the untouched model: says how hard a row is, and which answers skipping changed.
        gated: the model with gates.
        processor: of both.
        rows: with completions; optionally with `kind`, and `cells` on the reference's data.
        batch_size: rows per call.
        resampling: of rows.
        progress: called with the number of rows of each finished batch of each model: twice the rows in all.
        **options: of `skipit.running` for the gated model, such as `budget`.

    Raises:
        InputError: there are no rows, or a row cannot be read or has no answer; the message names it.
    """
    prompts = Collator(processor, with_completion=False)
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    before = record_rows(dense, processor, rows, prompts, **settings)
    columns = [tuple(row.get(name) for name in ("kind", "cells", "digits")) for row in rows]
    # Another data set may have cells of its own; the reference's come with the nine digits that they show.
    of_reference = all(cells is not None and digits is not None for _, cells, digits in columns)
    kinds = asked_cells(gated.config) if of_reference else None
    after = record_rows(gated, processor, rows, prompts, kinds=kinds, **settings, **options)
    groups = {
        "answer": ["right" if right else "wrong" for right in after.right.tolist()],
        "dense answer": ["right" if right else "wrong" for right in before.right.tolist()],
        "beside dense": [
            "the same" if mine == theirs else "another"
            for mine, theirs in zip(after.answers, before.answers, strict=True)
        ],
    }
    if any(kind is not None for kind, _, _ in columns):
        groups = {"question": [str(kind) for kind, _, _ in columns], **groups}
    hard = row_difficulty(dense, batches(rows, Collator(processor), batch_size))
    adaptivity = measure_adaptivity(
        after.records,
        CostModel.of(gated),
        groups=groups,
        difficulty={f"dense {name}": values.numpy() for name, values in hard.items()},
        resampling=resampling,
    )
    calibration = compare_calibration(before, after, resampling=resampling)
    return Spending(adaptivity, calibration, row_skip_rates(after.records), before, after)


def asked_cells(config: Any) -> Kinds:
    """A kind of token on the reference's data: the patches of the cells that a row's `cells` names.

    Args:
        config: of the model, which tells image tokens.
    """

    def kinds(rows: Sequence[Mapping[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Bool[Tensor, "batch seq"]]:
        vision = token_modality(config, inputs["input_ids"], inputs.get("mm_token_type_ids")) == VISION
        asked = torch.zeros_like(vision)
        for row, values in enumerate(rows):
            places = vision[row].nonzero()[:, 0]
            shown = torch.from_numpy(cell_patches(values["cells"], len(places)))
            asked[row, places[shown.to(places.device)]] = True
        return {ASKED: asked}

    return kinds
