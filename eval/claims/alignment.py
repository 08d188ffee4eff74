"""How far a router's single decisions agree with the theory's skip set, with intervals over rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.eval.measure.recorded import STRATA, Record
from skipit.eval.metrics.alignment import FIGURES, alignment_of_counts
from skipit.eval.statistics import USUAL, Figures, Interval, Resampling, row_interval
from skipit.router import InputError


@dataclass(frozen=True)
class Alignment(Figures):
    """Agreement of decisions with a set of units to skip; `skipit.eval.metrics.alignment` has the formulas.

    Attributes:
        inside: share of the set that is skipped.
        outside: share of the rest that is skipped.
        balanced: (inside + 1 - outside) / 2; 0.5 for a router that does not know the set, whatever it skips.
        agreement: share of decisions that are the set's.
        rows: how many.
    """

    inside: Interval
    outside: Interval
    balanced: Interval
    agreement: Interval
    rows: int


def align(
    records: Sequence[Record],
    theory_set: Bool[Tensor, "layers modality"],
    weight: Float[Tensor, "layers modality"] | None = None,
    resampling: Resampling = USUAL,
) -> Alignment:
    """Compare the decisions of recorded rows with the set of units that the theory would skip.

    Args:
        records: of all batches; answer tokens count as text.
        theory_set: True where the theory skips a unit, such as the complement of `skipit.theory.plan.skip_set` at the
            router's own compute.
        weight: of one decision, by unit, such as the FLOPs that a skip saves; by default all count alike.
        resampling: of rows.

    Raises:
        InputError: there are no records.
        ValueError: tables differ in shape, or a weight is negative.
    """
    if not records:
        raise InputError("`records`: got none, expected those of at least one batch. A dense run records nothing.")
    weights = torch.ones(theory_set.shape, dtype=torch.float64) if weight is None else weight.double()
    columns: list[Tensor] = []
    for record in records:
        vision = record.stratum == STRATA.index("vision")
        here = torch.stack([record.real & ~vision, record.real & vision])  # [modality, batch, seq]
        skipped = (here & ~record.run[:, None]).sum(-1)  # [layers, modality, batch]
        total = here.sum(-1).expand_as(skipped)
        # Raises on tables that do not fit.
        alignment_of_counts(skipped.sum(-1), total.sum(-1), theory_set, weights)
        by_row = [
            (counts * weights[..., None])[chosen] for chosen in (theory_set, ~theory_set) for counts in (skipped, total)
        ]
        columns.append(torch.stack([values.sum(0) for values in by_row], -1))
    table = torch.cat(columns).numpy()
    figures = {name: row_interval(table, figure, resampling) for name, figure in FIGURES.items()}
    return Alignment(**figures, rows=len(table))
