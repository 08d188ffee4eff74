"""What one batch adds to a profile: one forward pass, one more of every layer alone, and a backward pass per draw."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from skipit.router import MODALITIES
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.call import image_states
from skipit.router.config import KVPolicy
from skipit.router.errors import InputError

from .damage import (
    Choice,
    CrossAttention,
    apart_output,
    choice_damage,
    draw_choice,
    slopes,
    tempered_damage,
    weighted_change,
)
from .inputs import to_model
from .labels import IGNORE, predicts_answer, token_kinds
from .profile_sums import POLICIES, ProfileSums
from .states import LayerRun, recorded


@dataclass(frozen=True)
class Draws:
    """How the choices of answers are drawn by which the damage is measured.

    Attributes:
        draws: choices per row.
        temperature: at which a choice's alternative is drawn.
        seed: those of a row depend on it and on the row's number in the data, not on the batches.
    """

    draws: int
    temperature: float
    seed: int

    def uniform(self, rows: Iterable[int], draw: int) -> Float[Tensor, "batch 2"]:
        """Numbers in [0, 1) for one draw of each row: the same whatever the batches, and when a run goes on."""
        # In fp32 they stay below 1 when they are scaled in fp64.
        drawn = [np.random.default_rng([self.seed, row, draw]).random(2, dtype=np.float32) for row in rows]
        return torch.from_numpy(np.stack(drawn))


@dataclass(frozen=True)
class BatchMeasurement:
    """Measures batches of one model and adds them up.

    Attributes:
        model: dense, without a parameter that needs a gradient.
        layers: of its decoder.
        of_images: indices of those that attend to images.
        draws: of the damage.
        sums: what is added to.
    """

    model: nn.Module
    layers: nn.ModuleList
    of_images: frozenset[int]
    draws: Draws
    sums: ProfileSums

    def add(self, number: int, batch: dict[str, Tensor]) -> None:
        """Add a batch.

        Args:
            number: of the batch in the data, for errors.
            batch: model inputs with `labels`.

        Raises:
            InputError: a row has no answer token.
        """
        sums, labels = self.sums, batch.get("labels")
        if labels is None or not bool(predicts_answer(labels).any(-1).all()):
            raise InputError(f"batch {number}: every row needs `labels` with at least one answer token (not {IGNORE}).")
        inputs = to_model({k: v for k, v in batch.items() if k != "labels"}, self.model)
        answer = predicts_answer(labels).to(sums.device)
        kinds = token_kinds(self.model.config, inputs)
        attention = CrossAttention(kinds, answer.float().argmax(-1), self.of_images)
        with torch.enable_grad(), recorded(self.layers) as runs:
            logits = self.model(**inputs, use_cache=False, **{OBSERVER_KWARG: attention}).logits
        finite = torch.stack([run.left.detach().isfinite().all(-1) for run in runs]).all(0).all(-1)
        finite &= logits.detach().isfinite().all(-1).all(-1)
        first = sums.rows + sums.bad_rows
        sums.add_rows(finite)
        if not bool(finite.any()):
            return
        taken, at = [self._taken_away(run, kinds) for run in runs], [run.index for run in runs]
        answer, kinds = answer & finite[:, None], kinds.masked_fill(~finite[:, None], -1)
        sums.add_attention(attention, finite, at)
        for run in runs:
            images = image_states(run.kwargs, len(kinds)).held if run.index in self.of_images else None
            sums.add_keys(run.index, kinds, images)
        damage = _BatchDamage(sums, at, taken, kinds, 1 / self.draws.draws)
        leaves = [*(run.left for run in runs), *attention.bias]
        for draw in range(self.draws.draws):
            uniform = self.draws.uniform(range(first, first + len(finite)), draw)
            choice = draw_choice(logits[:, :-1], answer, self.draws.temperature, uniform)
            again = draw + 1 < self.draws.draws
            damage.add(choice, torch.autograd.grad(choice.margin.sum(), leaves, retain_graph=again, allow_unused=True))
        entered = {run.index: run.entered.detach() for run in runs}
        for place, run in enumerate(runs):
            sums.redundancy.update(run.index, entered[run.index], run.left.detach(), kinds)
            sums.add_tokens(run.index, {kv: of[place] for kv, of in damage.tokens.items()}, kinds)
        for number, group in enumerate(sums.groups):
            if entered.keys() >= set(group.layers):
                places = [at.index(layer) for layer in group.layers]
                signal = {kv: of[places] for kv, of in damage.signal.items()}
                # A layer that the model leaves out is entered by what enters the next.
                first = min(layer for layer in at if layer >= group.point)
                sums.add_samples(number, entered[first], signal, kinds)

    def _taken_away(self, run: LayerRun, kinds: Tensor) -> "_Taken":
        full, entered = run.left.detach(), run.entered.detach()
        unobserved = {name: value for name, value in run.kwargs.items() if name != OBSERVER_KWARG}
        apart = apart_output(self.layers[run.index], entered, unobserved, kinds)
        return _Taken(weighted_change(full, entered), weighted_change(full, apart))


class _Taken(NamedTuple):
    """What skips of one layer take away from its output, ready for slopes."""

    own: Tensor
    """From a token that skips."""
    apart: Tensor
    """From a token when all tokens of the other modality skip, and their keys and values do not exist."""


class _BatchDamage:
    """Damages in one batch: those of units go to the sums, those of tokens taken one by one are kept here.

    Args:
        sums: of all batches.
        at: indices of the layers that were there.
        taken: what skips take away, per such layer.
        kinds: the modality of every token, -1 for those that do not count.
        weight: of one draw.

    Attributes:
        tokens: damages per K/V policy, [at, batch, seq].
        signal: what gates learn them from, likewise.
    """

    def __init__(self, sums: ProfileSums, at: list[int], taken: list[_Taken], kinds: Tensor, weight: float) -> None:
        self.sums, self.at, self.taken, self.kinds, self.weight = sums, at, taken, kinds, weight
        self.signal = {kv: torch.zeros(len(at), *kinds.shape, device=kinds.device) for kv in POLICIES}
        self.tokens = {kv: zero.double() for kv, zero in self.signal.items()}

    def add(self, choice: Choice, grads: tuple[Tensor | None, ...]) -> None:
        """Add what one drawn choice per row shows, from the gradients of states and attention biases."""
        count = len(self.taken)
        states = [grad for grad in grads[:count] if grad is not None]
        own, apart = (
            torch.stack([slopes(*pair) for pair in zip(states, changes, strict=True)])
            for changes in zip(*self.taken, strict=True)
        )
        none = torch.zeros_like(own[0])
        seen = torch.stack([none if bias is None else bias[:, 0, 0].float() for bias in grads[count:]])
        margin, mass = choice.margin[:, None], choice.mass[:, None]
        drops: dict[KVPolicy, Tensor] = {"retain": own, "evict": own + seen}
        for kv, alone in drops.items():
            self.tokens[kv].add_(choice_damage(margin, mass, alone), alpha=self.weight)
            self.signal[kv].add_(tempered_damage(margin, alone), alpha=self.weight)
        for m in range(len(MODALITIES)):
            chosen, rest = self.kinds == m, (self.kinds >= 0) & (self.kinds != m)
            drop = (own * chosen).sum(-1)
            retain = choice_damage(choice.margin, choice.mass, drop)
            evict = choice_damage(choice.margin, choice.mass, drop + (apart * rest).sum(-1))
            self.sums.add_damage(m, self.weight * retain, self.weight * evict, chosen.any(-1), self.at)
