"""What a run of gated layers takes of the dense layers' time for a prompt, by what `skipit bench` has measured here."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router.call import NO_IMAGES, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.router.decoder import find_decoder
from skipit.router.errors import InputError

from .cost import CostModel
from .layer_times import LayerTimes, times_for


@dataclass(frozen=True)
class TimeModel:
    """The time of decoder layers, which are taken to be alike; stands in for a `CostModel`.

    Attributes:
        times: measured of such layers.
        depth: how many there are.
    """

    times: LayerTimes
    depth: int

    @classmethod
    def of(cls, model: nn.Module) -> "TimeModel":
        """Read what was measured on this machine of layers like a model's.

        Raises:
            InputError: nothing, or of other layers as wide as these.
        """
        costs, width = CostModel.of(model), find_decoder(model)[1].config.hidden_size  # type: ignore[union-attr]
        return cls(times_for(costs, int(width)), costs.depth)  # type: ignore[arg-type]

    def spend(
        self,
        run: Float[Tensor, "layers batch seq"],
        real: Bool[Tensor, "batch seq"],
        kv: KVPolicy,
        held: Float[Tensor, "layers batch"] | None = None,
        seen: Float[Tensor, " batch"] | None = None,
        unit: Unit = "block",
        images: ImageStates = NO_IMAGES,
    ) -> tuple[Float[Tensor, "layers batch seq"], Float[Tensor, "layers batch seq"]]:
        """Milliseconds in every layer, each row being a prompt by itself, in even parts of its tokens; see `CostModel`.

        Raises:
            InputError: `unit` is a part of a layer, or this is no prompt: neither was measured.
        """
        if unit != "block" or seen is not None:
            what = f"unit {unit!r}" if unit != "block" else "tokens after a prompt"
            raise InputError(f"`latency`: `skipit bench` measures whole layers for prompts, got {what}.")
        tokens = real.sum(-1).clamp(min=1)
        skipped = 1 - (run * real).sum(-1) / tokens
        rows = [(self.times.relative(kv, n, skipped[:, row]), n) for row, n in enumerate(tokens.tolist())]
        dense = real * torch.tensor([self.times.ms(n) / n for _, n in rows], device=real.device)[:, None]
        return torch.stack([relative for relative, _ in rows], -1)[..., None] * dense, dense.expand_as(run)


def point_of(latency: float) -> str:
    """The name of an operating point at a latency."""
    return f"latency-{latency:g}"
