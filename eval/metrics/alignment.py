"""How far single decisions to skip agree with the set of units that the theory would skip."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .compute import SkipRate, skip_counts

# Of skipped and all tokens in the set, and of both outside it: sums or means of them, along the last axis.
FIGURES: dict[str, Callable[[Any], Any]] = {
    "inside": lambda sums: sums[..., 0] / sums[..., 1],
    "outside": lambda sums: sums[..., 2] / sums[..., 3],
    "balanced": lambda sums: (sums[..., 0] / sums[..., 1] + 1 - sums[..., 2] / sums[..., 3]) / 2,
    "agreement": lambda sums: (sums[..., 0] + sums[..., 3] - sums[..., 2]) / (sums[..., 1] + sums[..., 3]),
}


def alignment_of_counts(
    skipped: Int[Tensor, "layers 2"],
    total: Int[Tensor, "layers 2"],
    theory_set: Bool[Tensor, "layers 2"],
    weight: Float[Tensor, "layers 2"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Compare decisions, counted by unit, with a set T of units to skip.

    With n_u tokens of a unit, s_u of which skip it, and w_u the weight of one decision:

        inside    = sum over T of w s / sum over T of w n                 how much of T is skipped
        outside   = the same over all units that are not in T             how much of the rest is skipped
        balanced  = (inside + 1 - outside) / 2                            balanced accuracy; 0.5 by chance, at any rate
        agreement = (sum over T of w s + sum over the rest of w (n - s)) / sum of w n

    Args:
        skipped: s of shape [layers, 2], columns text and vision, such as `skip_counts` gives.
        total: n of the same shape.
        theory_set: True where the theory skips a unit, of the same shape.
        weight: w of the same shape, at least 0, such as the FLOPs that one skip saves; by default every decision counts
            alike, so that vision counts most.

    Returns:
        The four, float64 in [0, 1]; NaN where T or the rest has no tokens.

    Raises:
        ValueError: If shapes differ, or a weight is negative or not finite.

    Example:
        >>> skipped, total = torch.tensor([[0, 6], [1, 2]]), torch.tensor([[2, 8], [2, 8]])
        >>> found = alignment_of_counts(skipped, total, torch.tensor([[False, True], [False, False]]))
        >>> {name: value.item() for name, value in found.items()}
        {'inside': 0.75, 'outside': 0.25, 'balanced': 0.75, 'agreement': 0.75}
    """
    weights = torch.ones(total.shape, dtype=torch.float64) if weight is None else weight.double()
    if not skipped.shape == total.shape == theory_set.shape == weights.shape:
        shapes = [tuple(table.shape) for table in (skipped, total, theory_set, weights)]
        raise ValueError(
            f"`skipped`, `total`, `theory_set` and `weight` have shapes {shapes}, expected [layers, 2] for all. Pass "
            "tables of the same model."
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(
            f"`weight` goes from {weights.min().item()} to {weights.max().item()}, expected finite numbers of at least "
            "0. Leave it out to count every decision alike."
        )
    weights, chosen = weights.to(total.device), theory_set.to(total.device)
    sums = torch.stack([(n * weights)[where].sum() for where in (chosen, ~chosen) for n in (skipped, total)])
    return {name: figure(sums) for name, figure in FIGURES.items()}


def skip_alignment(
    run: Bool[Tensor, "layers batch seq"],
    modality: Int[Tensor, "batch seq"],
    real: Bool[Tensor, "batch seq"],
    theory_set: Bool[Tensor, "layers 2"],
    weight: Float[Tensor, "layers 2"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Compare the decisions of one forward call with the theory's skip set; see `alignment_of_counts`.

    Args:
        run: Whether a layer ran for a token, bool of shape [layers, batch, seq].
        modality: 0 for text and 1 for vision, of shape [batch, seq].
        real: False at pads, bool of shape [batch, seq].
        theory_set: True where the theory skips a unit, of shape [layers, 2].
        weight: Of one decision, by unit.

    Returns:
        "inside", "outside", "balanced" and "agreement", float64 in [0, 1].

    Example:
        >>> run = torch.tensor([[[True, False, False]], [[True, True, False]]])
        >>> real, modality = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 1]])
        >>> found = skip_alignment(run, modality, real, torch.tensor([[False, True], [False, False]]))
        >>> found["balanced"].item()
        0.875
    """
    return alignment_of_counts(*skip_counts(run, modality, real), theory_set, weight)


class SkipAlignment(SkipRate):
    """How far decisions agree with the theory's skip set; see `alignment_of_counts`.

    Args:
        theory_set: True where the theory skips a unit, of shape [layers, 2], columns text and vision.
        weight: Of one decision, by unit, such as the FLOPs that a skip saves; by default all count alike.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = SkipAlignment(torch.tensor([[False, True]]))
        >>> metric.update(torch.tensor([[[True, False]]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
        >>> metric.compute()["agreement"].item()
        1.0
    """

    def __init__(
        self, theory_set: Bool[Tensor, "layers 2"], weight: Float[Tensor, "layers 2"] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(len(theory_set), **kwargs)
        # Raises on tables that mean nothing: at once, not after a long run.
        alignment_of_counts(self.part.long(), self.whole.long(), theory_set, weight)
        self.theory_set, self.weight = theory_set, weight

    def compute(self) -> dict[str, Tensor]:
        """The "inside", "outside", "balanced" and "agreement", float64, NaN where there are no tokens."""
        return alignment_of_counts(self.part.long(), self.whole.long(), self.theory_set, self.weight)
