"""A ratio of two sums as a metric: what every share in this folder is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Ratio(Metric):
    """One sum over another, element by element, over all updates and ranks.

    Args:
        shape: of both sums; by default single numbers.
        kwargs: Options of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    part: Tensor
    whole: Tensor

    def __init__(self, shape: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float64, because FLOPs of a long run overflow int64 and float32 stops adding single batches.
        self.add_state("part", torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("whole", torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")

    def count(self, part: Tensor | float, whole: Tensor | float) -> None:
        """Add to both sums."""
        self.part += torch.as_tensor(part, dtype=torch.float64, device=self.part.device)
        self.whole += torch.as_tensor(whole, dtype=torch.float64, device=self.whole.device)

    def compute(self) -> Any:
        """The ratio so far, usually in [0, 1], float64; NaN where nothing was counted."""
        return self.part / self.whole
