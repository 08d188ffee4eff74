"""Redundancy of every layer and modality, accumulated over any number of batches and ranks.

Every state is a sum, so adding the states of two data-parallel ranks gives exactly the state of their union.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from skipit.router.modality import MODALITIES

from .measures import angular_distance, check_modality, cosine_distance, per_unit_sums, relative_update

# Distance bins: [0, 1e-10), then 32 per decade up to 2, then the single point 2. Every power of ten is an edge, so the
# usual thresholds are answered exactly, and any other within one bin: 7.5 % of the distance, or 1e-10. Python's power
# is used because torch's is off by a rounding error at some powers of ten.
BINS_PER_DECADE = 32
DISTANCE_EDGES = torch.tensor(
    [0.0, *(10.0 ** (k / BINS_PER_DECADE) for k in range(-10 * BINS_PER_DECADE, 10)), 2.0], dtype=torch.float64
)


@dataclass
class Redundancy:
    """The layer-local redundancies of a model over a data set; means are NaN where nothing was counted.

    Not frozen only because torchmetrics rebuilds what `compute` returns field by field.
    """

    geometric: Float[Tensor, "layers modality"]
    """geo: mean cosine distance between a layer's input and output, in [0, 2]."""
    angle: Float[Tensor, "layers modality"]
    """Mean angle between them in radians; sums of it bound the angle of a block of layers."""
    update: Float[Tensor, "layers modality"]
    """Mean relative update |F|/|x|."""
    count: Int[Tensor, "layers modality"]
    """Tokens behind `geometric`, `angle` and `histogram`."""
    update_count: Int[Tensor, "layers modality"]
    """Tokens behind `update`: `count` without those whose input is the zero vector."""
    dropped: Int[Tensor, "layers modality"]
    """Tokens left out because their distance is not finite."""
    histogram: Int[Tensor, "layers modality bins"]
    """Tokens per bin of `DISTANCE_EDGES`; ask it with `prox`, `prox_bounds` and `quantile`."""


class RedundancyMetric(Metric):
    """Geometric and proximal redundancy and the relative update of every layer and modality.

    Sums are float64, counts and histogram int64. A token with a non-finite state is counted in `dropped` and changes
    nothing else.

    Args:
        num_layers: Decoder layers.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> metric = RedundancyMetric(num_layers=1)
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> turned = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]])
        >>> metric.update(0, x, turned, torch.tensor([[0, 1]]))
        >>> metric.compute().geometric.tolist()
        [[1.0, 0.0]]
    """

    full_state_update = False
    is_differentiable = False

    distance_sum: Tensor
    angle_sum: Tensor
    update_sum: Tensor
    count: Tensor
    update_sum_count: Tensor
    dropped: Tensor
    histogram: Tensor

    def __init__(self, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_layers = num_layers
        units = _units(num_layers)
        for name in ("distance_sum", "angle_sum", "update_sum"):
            self.add_state(name, torch.zeros(units, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "update_sum_count", "dropped"):
            self.add_state(name, torch.zeros(units, dtype=torch.int64), dist_reduce_fx="sum")
        bins = torch.zeros((*units, len(DISTANCE_EDGES)), dtype=torch.int64)
        self.add_state("histogram", bins, dist_reduce_fx="sum")

    def update(
        self,
        layer: int,
        x: Float[Tensor, "batch seq dim"],
        x_next: Float[Tensor, "batch seq dim"],
        modality: Int[Tensor, "batch seq"],
    ) -> None:
        """Add one layer's states of one batch.

        Args:
            layer: Index of the layer, 0..num_layers-1.
            x: Residual-stream states that enter it.
            x_next: States that leave it, before the final norm.
            modality: 0 text, 1 vision, -1 for pads and all else that must not count.

        Raises:
            ValueError: If there is no such layer or modality.
        """
        _check_layer(layer, self.num_layers)
        distance = cosine_distance(x, x_next)
        sums = per_unit_sums(distance, modality)
        self.distance_sum[layer] += sums.total
        self.count[layer] += sums.count
        self.dropped[layer] += sums.dropped
        self.histogram[layer] += distance_histogram(distance, modality)
        self.angle_sum[layer] += per_unit_sums(angular_distance(x, x_next), modality).total
        updates = per_unit_sums(relative_update(x, x_next), modality)
        self.update_sum[layer] += updates.total
        self.update_sum_count[layer] += updates.count

    def compute(self) -> Redundancy:
        """Means, counts and distribution over everything added so far.

        Returns:
            Tensors of shape [layers, modality].
        """
        return Redundancy(
            self.distance_sum / self.count,
            self.angle_sum / self.count,
            self.update_sum / self.update_sum_count,
            self.count.clone(),
            self.update_sum_count.clone(),
            self.dropped.clone(),
            self.histogram.clone(),
        )


def distance_histogram(
    distance: Float[Tensor, "batch seq"], modality: Int[Tensor, "batch seq"]
) -> Int[Tensor, "modality bins"]:
    """Count the tokens of each modality in every bin of `DISTANCE_EDGES`.

    Bin j holds edge j <= d < edge j+1, so the counts from bin j on are exactly the tokens with d >= edge j.

    Args:
        distance: Cosine distances in [0, 2]; non-finite ones are left out.
        modality: 0 text, 1 vision, -1 for tokens that must not count.

    Returns:
        Counts, int64.

    Raises:
        ValueError: If `modality` holds another id.
    """
    check_modality(modality)
    bins = len(DISTANCE_EDGES)
    usable = (modality >= 0) & distance.isfinite()
    edges = DISTANCE_EDGES.to(distance.device)
    index = torch.searchsorted(edges, distance[usable].double(), right=True) - 1
    flat = modality[usable].long() * bins + index
    return torch.bincount(flat, minlength=len(MODALITIES) * bins).view(len(MODALITIES), bins)


def prox_bounds(
    histogram: Int[Tensor, "*units bins"], t: float
) -> tuple[Float[Tensor, "*units"], Float[Tensor, "*units"]]:
    """The interval that is certain to hold prox(t) = P[d >= t] of the counted tokens.

    Args:
        histogram: Counts from `RedundancyMetric` or `distance_histogram`.
        t: Threshold on the cosine distance, in [0, 2].

    Returns:
        Lower and upper end, which differ by the share of the one bin that holds `t` and are equal when `t` is an edge
        of `DISTANCE_EDGES` (every power of ten is); NaN where nothing was counted.

    Raises:
        ValueError: If `t` or the histogram has the wrong range or shape.

    Example:
        >>> distance = torch.tensor([[0.02, 0.5]])
        >>> histogram = distance_histogram(distance, torch.tensor([[0, 0]]))
        >>> [end[0].item() for end in prox_bounds(histogram, 0.1)]
        [0.5, 0.5]
    """
    _check_histogram(histogram)
    if not 0 <= t <= 2:
        raise ValueError(f"`t` is {t}, expected a cosine distance in [0, 2]. Pass the threshold unscaled.")
    beyond = histogram.flip(-1).cumsum(-1).flip(-1).double() / histogram.sum(-1, keepdim=True)
    j = int(torch.searchsorted(DISTANCE_EDGES, torch.tensor(t, dtype=torch.float64), right=True)) - 1
    upper = beyond[..., j]
    return (upper if DISTANCE_EDGES[j] == t else beyond[..., j + 1]), upper


def prox(histogram: Int[Tensor, "*units bins"], t: float) -> Float[Tensor, "*units"]:
    """Proximal redundancy, the share of tokens with d >= t, linear within the bin that holds `t`.

    Args:
        histogram: Counts from `RedundancyMetric` or `distance_histogram`.
        t: Threshold on the cosine distance, in [0, 2].

    Returns:
        Shares in [0, 1], off by at most the width of `prox_bounds`; NaN where nothing was counted.

    Raises:
        ValueError: If `t` or the histogram has the wrong range or shape.

    Example:
        >>> histogram = distance_histogram(torch.tensor([[0.02, 0.5]]), torch.tensor([[0, 0]]))
        >>> prox(histogram, 0.1)[0].item()
        0.5
    """
    lower, upper = prox_bounds(histogram, t)
    j = int(torch.searchsorted(DISTANCE_EDGES, torch.tensor(t, dtype=torch.float64), right=True)) - 1
    if j == len(DISTANCE_EDGES) - 1:
        return upper
    left, right = DISTANCE_EDGES[j].item(), DISTANCE_EDGES[j + 1].item()
    return lower + (upper - lower) * (right - t) / (right - left)


def quantile(histogram: Int[Tensor, "*units bins"], q: float) -> Float[Tensor, "*units"]:
    """The distance that the share `q` of the counted tokens does not exceed, linear within a bin.

    Args:
        histogram: Counts from `RedundancyMetric` or `distance_histogram`.
        q: Share in [0, 1].

    Returns:
        Distances in [0, 2], within one bin of the sample quantile: 7.5 % of it, or 1e-10; NaN where nothing was
        counted.

    Raises:
        ValueError: If `q` or the histogram has the wrong range or shape.

    Example:
        >>> histogram = distance_histogram(torch.tensor([[0.02, 0.5, 0.5]]), torch.tensor([[0, 0, 0]]))
        >>> 0.47 < quantile(histogram, 0.5)[0].item() < 0.53
        True
    """
    _check_histogram(histogram)
    if not 0 <= q <= 1:
        raise ValueError(f"`q` is {q}, expected a share in [0, 1]. Divide percentages by 100.")
    counts, edges = histogram.double(), DISTANCE_EDGES.to(histogram.device)
    reached = counts.cumsum(-1)
    rank = (q * reached[..., -1:]).clamp(min=1)
    # Of an empty histogram no bin reaches rank 1: the index is cut to the last bin and the division 0/0 there gives
    # NaN.
    j = torch.searchsorted(reached, rank).clamp(max=counts.shape[-1] - 1)
    inside = (rank - (reached - counts).gather(-1, j)) / counts.gather(-1, j)
    inside = torch.where(reached[..., -1:] > 0, inside, torch.nan)
    right = torch.cat([edges[1:], edges[-1:]])
    return (edges[j] + inside * (right[j] - edges[j])).squeeze(-1)


def _check_histogram(histogram: Tensor) -> None:
    if histogram.shape[-1] != len(DISTANCE_EDGES):
        raise ValueError(
            f"`histogram` has {histogram.shape[-1]} bins, expected {len(DISTANCE_EDGES)}, one per edge of "
            "`DISTANCE_EDGES`. Make it with `distance_histogram` of this version."
        )


def _units(num_layers: int) -> tuple[int, int]:
    if num_layers < 1:
        raise ValueError(f"`num_layers` is {num_layers}, expected 1 or more. Pass the number of decoder layers.")
    return num_layers, len(MODALITIES)


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"`layer` is {layer}, expected 0 to {num_layers - 1}. Make the metric with the model's number of layers."
        )
