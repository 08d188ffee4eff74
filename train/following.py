"""What gates learn where the threshold follows them: which tokens are worth their cost, never how many run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router.call import NO_IMAGES, Call, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.router.gates import TokenGate
from skipit.theory.calibrate import Listening
from skipit.theory.cost import Costs
from skipit.theory.sharded import sharded


class _Stretch(NamedTuple):
    """What gates of some layers have said, and of what."""

    layers: range
    hidden: Float[Tensor, "batch seq dim"]
    gates: Sequence[TokenGate]
    said: Float[Tensor, "layers batch seq"]


@dataclass(frozen=True)
class Following(Listening):
    """Gates under a threshold that follows them, so that a budget stays spent, in what they learn, too.

    A logit that rises makes the threshold rise, and all others run less. Without that part of the derivative each gate
    learns that to run is better, and what all have in common drowns what tells them apart. With it a token is worth
    what it brings, less what its cost would bring elsewhere: the multiplier of a constraint that binds.

    The threshold moves as expected spending makes it, in which a token runs with its gate's probability, in every batch
    by itself. Where gates decide at several points, it moves by their weights alone, not by the states that they read;
    and not at all there where weights are in shards, as under ZeRO-3.

    Args:
        threshold: of this step.
        costs: of the model's layers, in what the budget is a share of.
    """

    costs: Costs = field(kw_only=True)
    _rising: list["_Rising"] = field(default_factory=list, init=False)  # of the call that goes on; none, or one

    def logits(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Float[Tensor, "layers batch seq"]:
        """What is compared with the threshold; the derivatives of anything by these sum to zero."""
        said = super().logits(layers, hidden, call, gates)
        if len(layers) == self.costs.depth:
            if not said.requires_grad:
                return said
            move = (self._moves_in(said, call) * said).sum()
            return said - (move - move.detach())
        if layers.start == 0:
            weights = [weight for gate in call.gates for weight in gate.parameters() if weight.requires_grad]
            follows = torch.is_grad_enabled() and weights and not sharded(weights)
            self._rising[:] = [_Rising(weights)] if follows else []
        for rising in self._rising:
            rising.stretches.append(_Stretch(layers, hidden.detach(), gates, said.detach()))
            said = said - rising.by
            if layers.stop == self.costs.depth:
                rising.moves.extend(self.moves_by_weights(rising.stretches, call, rising.weights))
        return said

    def _moves_in(self, said: Float[Tensor, "layers batch seq"], call: Call) -> Float[Tensor, "layers batch seq"]:
        images = NO_IMAGES if call.step is None else call.step.images
        return self.moves(said, call.real, call.kv, call.unit, images)

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

        Where a token more takes less time, as a layer of which few skip may, the threshold does not follow its logit;
        and where that is so of all, it follows none.

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
        rises = rises.clamp(min=0)
        return rises / rises.sum().clamp(min=torch.finfo(rises.dtype).tiny)

    @torch.enable_grad()
    def moves_by_weights(
        self, stretches: Sequence[_Stretch], call: Call, weights: Sequence[nn.Parameter]
    ) -> Sequence[Tensor]:
        """By how much the threshold rises with each weight of the gates.

        Args:
            stretches: of a whole call, in turn.
            call: the call.
            weights: of its gates.
        """
        moves = self._moves_in(torch.cat([each.said for each in stretches]), call)
        again = [super(Listening, self).logits(each.layers, each.hidden, call, each.gates) for each in stretches]
        return torch.autograd.grad((moves * torch.cat(again)).sum(), weights)


class _Rising:
    """By how much the threshold rises during a call: by nothing, but it has derivatives.

    At one point those by the gates of the later ones are not known yet. But what comes back to a number that all logits
    have been compared with is the sum of what came back to all of them.

    Its graph must lead to nothing that leads to it, as the call does: it would never be freed.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.stretches: list[_Stretch] = []
        self.moves: list[Tensor] = []  # known when the last point has been reached
        self.by: Tensor = _Risen.apply(self.moves, *weights)


class _Risen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moves: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.moves = moves
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *derivative: Tensor) -> Any:
        return None, *(derivative[0] * move for move in ctx.moves)
