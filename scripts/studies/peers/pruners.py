"""Vision tokens dropped where the decoder begins, by what they are and not by attention: pruners before the LLM.

Here the decision point 0 does it: what is dropped skips every layer under `evict`, which is what not being there means.
The cost of choosing, which is below a percent of the decoder's, is not counted, as none of the authors does.
Re-implemented from the formulas; both read the states that enter the decoder.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.router import TEXT, VISION, Decision, Step
from skipit.router.call import Call, Policy
from skipit.router.gates import TokenGate
from skipit.theory.cost import Costs, share_of

from .policies import uniform

# From the states of a prompt's vision and text tokens, and how many stay, the places of those that stay.
Choose = Callable[[Float[Tensor, "vision dim"], Float[Tensor, "text dim"], int], Int[Tensor, " kept"]]
PIVOTS = 4  # of each modality, as DART's authors have


def dart(vision: Float[Tensor, "vision dim"], text: Float[Tensor, "text dim"], count: int) -> Int[Tensor, " kept"]:
    """DART (arXiv 2502.11494): pivots, and the tokens that duplicate them least.

    Pivots are the 4 vision and 4 text tokens of largest L1 norm. dup(p, x) = cos(p, x); vision pivots stay, and each
    pivot in turn keeps an equal number of those not yet kept whose dup is least. The authors do this after the second
    layer, with norms of keys; here, where nothing has run, they are norms of states.
    """
    similar = F.normalize(vision.float(), dim=-1)
    own = _pivots(vision)[:count]
    pivots = torch.cat([similar[own], F.normalize(text[_pivots(text)].float(), dim=-1)])
    free = torch.ones(len(vision), dtype=torch.bool, device=vision.device)
    free[own] = False
    rest = count - len(own)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + int(number < rest % len(pivots))
        least = (similar @ pivot).masked_fill(~free, torch.inf).argsort(stable=True)[:share]
        free[least] = False
    return (~free).nonzero()[:, 0]


def _pivots(states: Float[Tensor, "tokens dim"]) -> Int[Tensor, " pivots"]:
    return states.float().abs().sum(-1).argsort(descending=True, stable=True)[:PIVOTS]


def cdpruner(vision: Float[Tensor, "vision dim"], text: Float[Tensor, "text dim"], count: int) -> Int[Tensor, " kept"]:
    """CDPruner (arXiv 2506.10967): the most diverse tokens, given how relevant each is to the instruction.

    argmax over S of det(L~_S), L~ = diag(r) L diag(r), L the cosine similarities of the vision tokens and r their
    relevance, scaled to [0, 1]; greedy, by conditional variances (Chen et al., arXiv 1709.05135). r is the mean cosine
    similarity to the prompt's text, whose embeddings are the decoder's own here, where the authors have CLIP's.
    """
    unit = F.normalize(vision.double(), dim=-1)
    relevance = (unit @ F.normalize(text.double(), dim=-1).T).mean(-1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    left, factors = kernel.diagonal().clone(), kernel.new_zeros(count, len(vision))
    kept = torch.zeros(count, dtype=torch.long, device=vision.device)
    for number in range(count):
        best = left.argmax()
        known = factors[:number, best] @ factors[:number]
        factors[number] = (kernel[best] - known) / left[best].clamp(min=1e-12).sqrt()
        left -= factors[number].square()
        left[kept[:number]] = -torch.inf
        left[best] = -torch.inf
        kept[number] = best
    return kept.sort().values


def at_random(
    vision: Float[Tensor, "vision dim"], text: Float[Tensor, "text dim"], count: int, seed: int
) -> Int[Tensor, " kept"]:
    """As many at random places, the same ones in every row: the control."""
    draw = uniform(torch.arange(len(vision), device=vision.device), -1, seed)
    return draw.argsort(stable=True)[:count].sort().values


PRUNERS: dict[str, Choose] = {"dart": dart, "cdpruner": cdpruner}


def random_pruners(seed: int, draws: int = 5) -> list[Choose]:
    """Several draws of random places."""
    return [partial(at_random, seed=1000 * seed + draw) for draw in range(draws)]


def staying(modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"], keep: float) -> list[int]:
    """How many vision tokens of each row stay: floor(keep |V|)."""
    # The small number: 0.3 * 10 is a little below 3 in binary.
    return [int(keep * number + 1e-6) for number in ((modality == VISION) & real).sum(-1).tolist()]


@dataclass(frozen=True)
class Pruned:
    """The vision tokens that a pruner keeps, and all text; of these, who runs which layer is another policy's matter.

    For `kv="evict"`, and with `attended.BY_PROMPT` where answers are part of the input; every token decides for itself
    nevertheless.

    Attributes:
        choose: the pruner.
        keep: share of a row's vision tokens that stays.
        rest: decides for what stays, at the same decision point; None runs it all.
    """

    choose: Choose
    keep: float
    rest: Policy | None = None
    decide_at: ClassVar = (0,)

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where a token stays and the other policy lets it."""
        stays = self.stays(hidden, call).expand(len(layers), -1, -1)
        if self.rest is None:
            return Decision(stays)
        decision = self.rest.decide(layers, hidden, replace(call, granularity="token"), gates)
        return decision._replace(run=decision.run & stays)

    @torch.no_grad()
    def stays(self, hidden: Float[Tensor, "batch seq dim"], call: Call) -> Bool[Tensor, "batch seq"]:
        """Who is not dropped."""
        vision = (call.modality == VISION) & call.real
        stays = ~vision
        text = call.prompt & (call.modality == TEXT)
        for row, count in enumerate(staying(call.modality, call.real, self.keep)):
            if count:
                places = vision[row].nonzero()[:, 0]
                stays[row, places[self.choose(hidden[row, places], hidden[row, text[row]], count)]] = True
        return stays


def pruned_share(keep: float, steps: Iterable[Step], costs: Costs) -> float:
    """The share of FLOPs that is spent when so many vision tokens stay; which ones does not matter to it.

    It does where text stands between a row's pictures: there it is what keeping the first ones spends.
    """
    planned = []
    for step in steps:
        vision = (step.modality == VISION) & step.real
        counts = torch.tensor(staying(step.modality, step.real, keep), device=vision.device)
        decision = Decision(~vision | (vision.cumsum(-1) <= counts[:, None]))
        planned.append(replace(step, kv="evict", unit="block", decisions=dict.fromkeys(step.decisions, decision)))
    return share_of(planned, costs)
