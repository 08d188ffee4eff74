"""What linear probes read of every row: directions at each layer boundary, averaged over the tokens of a modality."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipit.router import MODALITIES, running
from skipit.router.decoder import find_decoder
from skipit.router.errors import InputError

from .identity import fingerprint
from .inputs import to_model
from .labels import IGNORE, predicts_answer, token_kinds
from .measures import cosine_distance
from .measuring import evaluating
from .states import LayerRun, watching

# The mean over a prompt's text tokens, over its vision tokens, and the state of the last prompt token alone, from which
# the model itself predicts the answer. Answer tokens are never read: they would tell.
SITES = (*MODALITIES, "last")


@dataclass(frozen=True)
class PooledStates:
    """What probes read of every row.

    Attributes:
        states: Mean direction, each token's scaled to root mean square 1; NaN where a row has no such token. Boundary 0
            is what enters layer 0, boundary l + 1 what leaves layer l, the last one before the final norm.
        distance: Mean cosine distance of the same tokens over each layer.
        answer: First answer token of each row.
        model: Fingerprint of the model.
        skipped: Rows left out because a state was not finite.
    """

    states: Float[Tensor, "boundaries sites rows dim"]
    distance: Float[Tensor, "layers sites rows"]
    answer: Int[Tensor, " rows"]
    model: str = ""
    skipped: int = 0


class Pool:
    """Pools one batch's states, boundary after boundary, so that none of them has to be kept.

    Args:
        modality: of every token, -1 for pads.
        labels: -100 everywhere but on answer tokens.

    Raises:
        InputError: a row has no answer token.
    """

    def __init__(self, modality: Int[Tensor, "batch seq"], labels: Int[Tensor, "batch seq"]) -> None:
        asked = predicts_answer(labels)
        if not bool(asked.any(-1).all()):
            raise InputError(f"every row needs `labels` with at least one answer token (not {IGNORE}).")
        last = asked.float().argmax(-1, keepdim=True)
        place = torch.arange(labels.shape[1], device=labels.device)
        prompt = (place <= last) & (modality >= 0)
        self.answer = labels.gather(1, last + 1)[:, 0].cpu()
        self.read = torch.stack([*((modality == m) & prompt for m in range(len(MODALITIES))), place == last])
        self.states: list[Tensor] = []
        self.distance: list[Tensor] = []
        self._before: Tensor | None = None

    def add(self, states: Float[Tensor, "batch seq dim"]) -> None:
        """Add the next boundary."""
        read = self.read.to(states.device)
        weight = read.float() / read.sum(-1, keepdim=True)  # NaN where there is no such token
        real = read.any(0)[..., None]
        # As the gates' `normalize`, but without its epsilon, so that statement 4 is exact.
        direction = F.normalize(states.float(), dim=-1).masked_fill(~real, 0) * states.shape[-1] ** 0.5
        self.states.append(torch.einsum("kbs,bsd->kbd", weight, direction).cpu())
        if self._before is not None:
            moved = cosine_distance(self._before.to(states.device), states).masked_fill(~real[..., 0], 0)
            self.distance.append(torch.einsum("kbs,bs->kb", weight, moved.float()).cpu())
        self._before = states

    def add_layer(self, run: LayerRun) -> None:
        """Add what leaves a layer, and what enters the first."""
        if not self.states:
            self.add(run.entered)
        self.add(run.left)


def join(pools: Iterable[Pool], model: str = "") -> PooledStates:
    """Batches side by side, without rows whose states are not finite.

    Raises:
        InputError: no batch, or no row with finite states.
    """
    states, distance, answer = [], [], []
    skipped = 0
    for pool in pools:
        table = torch.stack(pool.states)
        there = pool.read.any(-1).cpu()
        finite = (table.isfinite().all(-1).all(0) | ~there).all(0)
        skipped += int((~finite).sum())
        states.append(table[:, :, finite])
        distance.append(torch.stack(pool.distance)[:, :, finite])
        answer.append(pool.answer[finite])
    if not states or not sum(map(len, answer)):
        seen = f"{skipped} rows, none of which gave finite states" if skipped else "no batch"
        raise InputError(f"the probes got {seen}; expected at least one row with labels.")
    return PooledStates(torch.cat(states, 2), torch.cat(distance, 2), torch.cat(answer), model, skipped)


@torch.no_grad()
def pool_states(model: nn.Module, batches: Iterable[dict[str, Tensor]], layers: str | None = None) -> PooledStates:
    """Collect what probes read, in one dense forward pass per batch.

    Takes 4 x (layers + 1) x 3 x rows x dim bytes: 0.8 GB for 512 rows of a model of 32 layers and width 4,096.

    Args:
        model: with or without gates, which are not asked.
        batches: with labels.
        layers: decoder path for models whose decoder is not found.

    Raises:
        InputError: no batch, no row with finite states, or a row without an answer token.
    """
    _, _, stack = find_decoder(model, layers)
    pools = []
    with evaluating(model), running(mode="dense"):
        for batch in batches:
            inputs = to_model(batch, model)
            labels = inputs.pop("labels", torch.full_like(inputs["input_ids"], IGNORE))
            pools.append(Pool(token_kinds(model.config, inputs), labels))
            with watching(stack, pools[-1].add_layer):
                model(**inputs, use_cache=False)
    return join(pools, fingerprint(model, layers))
