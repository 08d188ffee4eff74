"""Ridge regression of a token's log damage on its normalized state, per layer and modality, in closed form.

Sums only (Gram matrix, moments), so batches and data-parallel ranks add up; two halves of the samples are kept
apart, and the penalty that predicts the other half best is chosen. All targets (one per K/V policy and layer that
reads this state) are regressed on the same samples, so they share one Gram matrix, which is nearly all of the memory.
Its size is bounded: states wider than `MOST_FEATURES` are projected first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_FEATURES = 1024


class RidgeFit(NamedTuple):
    """Linear predictions of log damage, one per unit of any kind: a target, or a layer and modality.

    Attributes:
        weight: on the state.
        bias: beside it.
        mean: of the prediction over the samples.
        std: of the prediction over the samples.
        r2: share of the variance of log damage predicted in the half that was not fitted; below 0 is worse than
            the mean; NaN without samples.
    """

    weight: Float[Tensor, "*units dim"]
    bias: Float[Tensor, "*units"]
    mean: Float[Tensor, "*units"]
    std: Float[Tensor, "*units"]
    r2: Float[Tensor, "*units"]


@dataclass
class RidgeSums:
    """Moments of augmented features [x, 1] and of targets, in fp64, in two halves.

    Attributes:
        gram: [2, dim + 1, dim + 1]; its last entry is the number of samples.
        cross: [2, dim + 1, targets].
        square: [2, targets].
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    @classmethod
    def empty(cls, dim: int, targets: int, device: torch.device) -> "RidgeSums":
        """No samples yet."""
        gram = torch.zeros(2, dim + 1, dim + 1, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(2, dim + 1, targets), gram.new_zeros(2, targets))

    def add(self, half: int, x: Float[Tensor, "tokens dim"], y: Float[Tensor, "tokens targets"]) -> None:
        """Add samples to one half."""
        features = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1)
        target = y.double()
        self.gram[half] += features.T @ features
        self.cross[half] += features.T @ target
        self.square[half] += target.square().sum(0)

    def solve(self) -> RidgeFit:
        """Fit on all samples, each target with the penalty that does best from each half on the other.

        A penalty is one Cholesky factorization of the centred moments per half, for all targets.
        """
        dim, targets = self.gram.shape[-1] - 1, self.square.shape[-1]
        count = self.gram[:, -1, -1].sum()
        if count == 0:
            nan = torch.full((targets,), torch.nan)
            return RidgeFit(torch.zeros(targets, dim), nan, nan, nan, nan)
        even, odd = (_Moments.of(self.gram[half], self.cross[half]) for half in (0, 1))
        errors = torch.stack([self._error(1, even.fit(a)) + self._error(0, odd.fit(a)) for a in PENALTIES])
        lowest, best = errors.min(0)
        both = _Moments.of(self.gram.sum(0), self.cross.sum(0))
        fits = {i: both.fit(PENALTIES[i]) for i in set(best.tolist())}
        fit = torch.stack([fits[i][:, target] for target, i in enumerate(best.tolist())])
        weight, bias = fit[:, :-1], fit[:, -1]
        variance = ((weight @ both.covariance) * weight).sum(-1)
        total = self.square.sum(0) - count * both.target.square()
        parts = (weight, bias, weight @ both.mean + bias, variance.clamp(min=0).sqrt(), 1 - lowest / total.clamp(1e-30))
        return RidgeFit(*(part.float().cpu() for part in parts))

    def _error(self, half: int, fit: Float[Tensor, "features targets"]) -> Float[Tensor, " targets"]:
        """Squared error of a fit on one half."""
        explained = 2 * self.cross[half] - self.gram[half] @ fit
        return self.square[half] - (fit * explained).sum(0)


class _Moments(NamedTuple):
    """Means and centred second moments: the intercept, which has no penalty, is eliminated."""

    mean: Float[Tensor, " dim"]
    target: Float[Tensor, " targets"]
    covariance: Float[Tensor, "dim dim"]
    cross: Float[Tensor, "dim targets"]

    @classmethod
    def of(cls, gram: Tensor, cross: Tensor) -> "_Moments":
        count = gram[-1, -1].clamp(min=1)
        mean, target = gram[-1, :-1] / count, cross[-1] / count
        covariance = gram[:-1, :-1] / count - torch.outer(mean, mean)
        return cls(mean, target, covariance, cross[:-1] / count - torch.outer(mean, target))

    def fit(self, penalty: float) -> Float[Tensor, "features targets"]:
        """Weights and, last, the intercept. States have mean square 1 per coordinate: that is the penalty's unit."""
        ridge = self.covariance + penalty * torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        weight = torch.cholesky_solve(self.cross, torch.linalg.cholesky(ridge))
        return torch.cat([weight, (self.target - self.mean @ weight)[None]])


def projection(dim: int, most: int = MOST_FEATURES, seed: int = 0) -> Float[Tensor, "dim features"] | None:
    """A fixed random projection of states onto at most `most` features, or None where they are no more than that.

    Its columns are orthonormal, so features keep mean square 1 per coordinate. A weight w of the features is exactly
    the weight `projection @ w` of the states. A regression on randomly projected features is compressed least squares
    (Maillard and Munos 2009); its use and size here are ours.
    """
    if dim <= most:
        return None
    random = torch.randn(dim, most, generator=torch.Generator().manual_seed(seed))
    columns: Tensor = torch.linalg.qr(random).Q
    return columns
