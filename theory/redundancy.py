"""What the distances of a layer's tokens sum up to: redundancies, and the histogram that answers for any threshold."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from skipit.router.modality import MODALITIES

from .measures import check_modality

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
    """Tokens per bin of `DISTANCE_EDGES`; ask it with `prox` and `prox_bounds`."""


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
    if histogram.shape[-1] != len(DISTANCE_EDGES):
        raise ValueError(
            f"`histogram` has {histogram.shape[-1]} bins, expected {len(DISTANCE_EDGES)}, one per edge of "
            "`DISTANCE_EDGES`. Make it with `distance_histogram` of this version."
        )
    if not 0 <= t <= 2:
        raise ValueError(f"`t` is {t}, expected a cosine distance in [0, 2]. Pass the threshold unscaled.")
    beyond = histogram.flip(-1).cumsum(-1).flip(-1).double() / histogram.sum(-1, keepdim=True)
    j = _bin_of(t)
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
    j = _bin_of(t)
    if j == len(DISTANCE_EDGES) - 1:
        return upper
    left, right = DISTANCE_EDGES[j].item(), DISTANCE_EDGES[j + 1].item()
    return lower + (upper - lower) * (right - t) / (right - left)


def _bin_of(t: float) -> int:
    return int(torch.searchsorted(DISTANCE_EDGES, torch.tensor(t, dtype=torch.float64), right=True)) - 1
