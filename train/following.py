"""What gates learn where the threshold follows them: which tokens are worth their cost, never how many run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from skipit.router.call import NO_IMAGES, Call, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.router.gates import TokenGate
from skipit.theory.calibrate import Listening
from skipit.theory.cost import Costs


@dataclass(frozen=True)
class Following(Listening):
    """Gates under a threshold that follows them, so that a budget stays spent, in what they learn, too.

    A logit that rises makes the threshold rise, and all others run less. Without that part of the derivative each gate
    learns that to run is better, and what all have in common drowns what tells them apart. With it a token is worth
    what it brings, less what its cost would bring elsewhere: the multiplier of a constraint that binds.

    The threshold moves as expected spending makes it, in which a token runs with its gate's probability, in every batch
    by itself. Where gates decide at several points it is left out: at the first, what the others say is not known.

    Args:
        threshold: of this step.
        costs: of the model's layers, in what the budget is a share of.
    """

    costs: Costs = field(kw_only=True)

    def logits(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Float[Tensor, "layers batch seq"]:
        """What is compared with the threshold; the derivatives of anything by these sum to zero."""
        said = super().logits(layers, hidden, call, gates)
        if not said.requires_grad or len(layers) < self.costs.depth:
            return said
        images = NO_IMAGES if call.step is None else call.step.images
        move = (self.moves(said, call.real, call.kv, call.unit, images) * said).sum()
        return said - (move - move.detach())

    @torch.enable_grad()
    def moves(
        self,
        said: Float[Tensor, "layers batch seq"],
        real: Bool[Tensor, "batch seq"],
        kv: KVPolicy,
        unit: Unit = "block",
        images: ImageStates = NO_IMAGES,
    ) -> Float[Tensor, "layers batch seq"]:
        """By how much the threshold rises with each logit, if spending is to stay what it is; together by 1.

        Args:
            said: all gates' logits.
            real: False at padding.
            kv: what skipped tokens leave behind.
            unit: what a token skips.
            images: what cross-attention layers attend to.
        """
        said = said.detach().requires_grad_()
        run = torch.sigmoid(said - self.threshold).double()
        spent, _ = self.costs.spend(run, real, kv, unit=unit, images=images)
        (rises,) = torch.autograd.grad(spent.sum(), said)
        return rises / rises.sum().clamp(min=torch.finfo(rises.dtype).tiny)
