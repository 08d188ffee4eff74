"""Redundancy of every layer and modality, accumulated over any number of batches and ranks.

Every state is a sum, so adding the states of two data-parallel ranks gives exactly the state of their union.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from skipit.router.modality import MODALITIES

from .measures import angular_distance, cosine_distance, per_unit_sums, relative_update
from .redundancy import DISTANCE_EDGES, Redundancy, distance_histogram


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
        if num_layers < 1:
            raise ValueError(f"`num_layers` is {num_layers}, expected 1 or more. Pass the number of decoder layers.")
        self.num_layers, units = num_layers, (num_layers, len(MODALITIES))
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
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"`layer` is {layer}, expected 0 to {self.num_layers - 1}. Make the metric with the model's number of "
                "layers."
            )
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
