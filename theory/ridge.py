"""Ridge regression of a token's log damage on its normalized state, per layer and modality, in closed form.

Sums only (Gram matrix, moments), so batches and data-parallel ranks add up; two halves of the samples are kept
apart, and the penalty that predicts the other half best is chosen.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class RidgeFit(NamedTuple):
    """A linear prediction of log damage.

    Attributes:
        weight: [dim].
        bias: scalar.
        mean: of the prediction over the samples.
        std: of the prediction over the samples.
        r2: share of the variance of log damage predicted in the half that was not fitted; below 0 is worse than
            the mean; NaN without samples.
    """

    weight: Float[Tensor, " dim"]
    bias: Float[Tensor, ""]
    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]
    r2: Float[Tensor, ""]


@dataclass
class RidgeSums:
    """Moments of augmented features [x, 1] and targets y, in fp64, in two halves: [2, dim + 1, dim + 1] and so on."""

    gram: Tensor
    cross: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device) -> "RidgeSums":
        """No samples yet."""
        gram = torch.zeros(2, dim + 1, dim + 1, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(2, dim + 1), gram.new_zeros(2), gram.new_zeros(2))

    def add(self, half: int, x: Float[Tensor, "tokens dim"], y: Float[Tensor, " tokens"]) -> None:
        """Add samples to one half."""
        ones = torch.ones(len(x), 1, device=x.device)
        features = torch.cat([x.float(), ones], dim=1).double()
        target = y.double()
        self.gram[half] += features.T @ features
        self.cross[half] += features.T @ target
        self.square[half] += target.square().sum()
        self.count[half] += len(x)

    def solve(self) -> RidgeFit:
        """Fit on all samples, with the penalty that does best from each half on the other."""
        dim = self.gram.shape[-1] - 1
        if self.count.sum() == 0:
            nan = torch.tensor(torch.nan)
            return RidgeFit(torch.zeros(dim), nan, nan, nan, nan)
        errors = [sum(self._error(1 - half, self._fit(half, a)) for half in (0, 1)) for a in PENALTIES]
        best = min(range(len(PENALTIES)), key=lambda i: float(errors[i]))
        total = self.square.sum() - self.cross[:, -1].sum() ** 2 / self.count.sum()
        fit = self._fit(None, PENALTIES[best])
        weight, bias = fit[:-1], fit[-1]
        moments = self.gram.sum(0) / self.count.sum()
        centre = moments[:-1, -1]
        variance = weight @ (moments[:-1, :-1] - torch.outer(centre, centre)) @ weight
        r2 = 1 - errors[best] / total.clamp(min=1e-30)
        parts = (weight, bias, weight @ centre + bias, variance.clamp(min=0).sqrt(), r2)
        return RidgeFit(*(part.float().cpu() for part in parts))

    def _fit(self, half: int | None, penalty: float) -> Tensor:
        gram = self.gram.sum(0) if half is None else self.gram[half]
        cross = self.cross.sum(0) if half is None else self.cross[half]
        count = gram[-1, -1].clamp(min=1)
        # The states have mean square 1 per coordinate, so the penalty is in units of one sample's information;
        # the intercept is (all but) free.
        diagonal = torch.full((len(gram),), penalty, dtype=gram.dtype, device=gram.device)
        diagonal[-1] = 1e-9
        fitted: Tensor = torch.linalg.solve(gram / count + diagonal.diag(), cross / count)
        return fitted

    def _error(self, half: int, fit: Tensor) -> Tensor:
        error: Tensor = self.square[half] - 2 * fit @ self.cross[half] + fit @ self.gram[half] @ fit
        return error
