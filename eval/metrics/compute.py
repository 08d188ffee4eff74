"""What a router executes: skip rates, its share of the dense model's FLOPs, and its speed."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.router import MODALITIES

from .ratio import Ratio


def skip_counts(
    run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> tuple[Int[Tensor, "layers 2"], Int[Tensor, "layers 2"]]:
    """Count skipped and all tokens of each (layer, modality) in one forward call; pads never count.

    Args:
        run: Whether a layer ran for a token, bool of shape [layers, batch, seq].
        modality: 0 for text and 1 for vision, of shape [batch, seq]; any value at pads.
        real: False at pads, bool of shape [batch, seq].

    Returns:
        The number of skipped and of all tokens, both int64 of shape [layers, 2]. They add up over calls and ranks.

    Raises:
        ValueError: If shapes do not fit or a real token has another modality.

    Example:
        >>> run = torch.tensor([[[True, False, False]]])
        >>> skipped, total = skip_counts(run, torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]]))
        >>> skipped.tolist(), total.tolist()
        ([[0, 1]], [[1, 1]])
    """
    if run.ndim != 3 or modality.shape != run.shape[1:] or real.shape != run.shape[1:]:
        raise ValueError(
            f"`run` has shape {tuple(run.shape)}, `modality` {tuple(modality.shape)} and `real` {tuple(real.shape)}, "
            "expected [layers, batch, seq], [batch, seq] and [batch, seq]. Pass the masks of one forward call."
        )
    other = sorted(set(modality[real].unique().tolist()) - {0, 1})
    if other:
        raise ValueError(
            f"`modality` has {other} at real tokens, expected 0 (text) or 1 (vision). Mark pads as False in `real`."
        )
    members = torch.stack([(modality == index) & real for index in range(len(MODALITIES))])
    skipped = (~run[:, None] & members).sum(dim=(-2, -1))
    total = members.sum(dim=(-2, -1)).expand(run.shape[0], -1).clone()
    return skipped, total


class SkipRate(Ratio):
    """The share of real tokens that skipped each (layer, modality); see `skip_rate`.

    Args:
        layers: Number of decoder layers.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = SkipRate(layers=1)
        >>> metric.update(torch.tensor([[[True, False]]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
        >>> metric.compute().tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__([layers, len(MODALITIES)], **kwargs)

    def update(
        self, run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Add the masks of one forward call.

        Raises:
            ValueError: If `run` has another number of layers, or the shapes do not fit each other.
        """
        if len(run) != len(self.whole):
            raise ValueError(
                f"`run` has {len(run)} layers, expected {len(self.whole)}. "
                f"Make a {type(self).__name__} for the {len(run)} layers of this model."
            )
        self.count(*skip_counts(run, modality, real))


def skip_rate(
    run: Bool[Tensor, "layers batch seq"], modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "layers 2"]:
    """The share of real tokens that skipped each (layer, modality) in one forward call; see `skip_counts`.

    Args:
        run: Whether a layer ran for a token, bool of shape [layers, batch, seq].
        modality: 0 for text and 1 for vision, of shape [batch, seq].
        real: False at pads, bool of shape [batch, seq].

    Returns:
        Rates of shape [layers, 2] in [0, 1], float64; NaN where a unit has no tokens.

    Example:
        >>> run = torch.tensor([[[True, True, False, False]]])
        >>> skip_rate(run, torch.tensor([[0, 1, 1, 0]]), torch.tensor([[True, True, True, False]])).tolist()
        [[0.0, 0.5]]
    """
    skipped, total = skip_counts(run, modality, real)
    return skipped.double() / total.double()


def compute_share(executed: float, dense: float) -> float:
    """The share of the dense model's compute that was executed.

    Args:
        executed: FLOPs executed, gates included.
        dense: FLOPs of the same inputs with every layer run.

    Returns:
        A share, usually in [0, 1]; slightly above 1 when the gates cost more than they save.

    Raises:
        ValueError: If `dense` is not positive or `executed` is negative.

    Example:
        >>> compute_share(executed=3.2e9, dense=6.4e9)
        0.5
    """
    if not dense > 0 or not executed >= 0:
        raise ValueError(
            f"`executed` is {executed} and `dense` is {dense} FLOPs, expected executed >= 0 and dense > 0. "
            "Count both on the same inputs."
        )
    return executed / dense


class ComputeShare(Ratio):
    """FLOPs executed as a share of the dense model's, over all updates; see `compute_share`.

    Example:
        >>> metric = ComputeShare()
        >>> metric.update(executed=1e9, dense=2e9)
        >>> metric.update(executed=1e9, dense=6e9)
        >>> metric.compute().item()
        0.25
    """

    higher_is_better = False

    def update(self, executed: float, dense: float) -> None:
        """Add the FLOPs executed on some inputs and those of the dense model on the same inputs."""
        compute_share(executed, dense)  # raises on numbers that mean nothing
        self.count(executed, dense)


def speed_up(t_dense: float, t: float) -> float:
    """How many times faster the router is: t_dense / t.

    Args:
        t_dense: Time of the dense model, in any unit.
        t: Time of the router on the same input, in the same unit.

    Returns:
        A positive factor; below 1 the router is slower.

    Raises:
        ValueError: If a time is not positive.

    Example:
        >>> speed_up(t_dense=120.0, t=80.0)
        1.5
    """
    if not (t_dense > 0 and t > 0):
        raise ValueError(
            f"`t_dense` is {t_dense} and `t` is {t}, expected two positive times in the same unit. Measure both again."
        )
    return t_dense / t
