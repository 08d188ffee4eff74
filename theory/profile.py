"""One pass over a data set that measures everything skipit needs to know about a model, into one artefact."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skipit.router import MODALITIES, RouterConfig, attach, detach, find_router, running, token_modality
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.call import image_states
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder, image_layers
from skipit.router.errors import CheckpointError, InputError, SkipItError

from .cost import CostModel
from .damage import (
    Choice,
    CrossAttention,
    LayerStates,
    apart_output,
    choice_damage,
    draw_choice,
    slopes,
    tempered_damage,
    weighted_change,
)
from .identity import fingerprint
from .labels import IGNORE, predicts_answer
from .partial import Partial
from .profile_sums import POLICIES, ProfileSums


@dataclass(frozen=True)
class Profile:
    """What was measured about a model. Tables are [layers, modalities], NaN where a unit has no tokens.

    Attributes:
        tables: `geometric`, `update`, `damage_retain`, `damage_evict` (KL per answer token when all tokens of the unit
            skip this layer), `damage_tokens` (sum of the damages of its tokens taken one by one), `log_damage` (its
            mean over tokens), `keys` (keys a token sees), `count`; `var_text` and `var_last` are [layers]; `histogram`
            (of the cosine distance) [layers, modalities, bins]; `ridge_*` the prediction of a token's log damage from
            its state.
        costs: of the model's layers.
        model: fingerprint of the model it belongs to.
        about: `rows` measured, `skipped_rows` that were not finite and `skipped_row_numbers` (the first of them, by
            their place in the data), draws, seed and temperature, and whatever the caller wants recorded.
    """

    tables: dict[str, Tensor]
    costs: CostModel
    model: str
    about: dict[str, Any] = field(default_factory=dict)


def profile(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    draws: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    layers: str | None = None,
    partial: Partial | None = None,
) -> Profile:
    """Measure a dense model on batches with labels: two forward passes and `draws` backward ones through the decoder.

    Args:
        model: a model without gates, or with gates, which are ignored.
        batches: model inputs with `labels` (-100 everywhere but on answer tokens).
        draws: drawn choices per row for the damage.
        temperature: at which a choice's alternative is drawn.
        seed: of the draws; those of a row depend on it and on the row's number in the data, not on the batches.
        layers: decoder path for models whose decoder is not found.
        partial: where to keep the sums while measuring, and to go on from; remove it when the profile is written.

    Raises:
        InputError: no batch, no row with finite states, or a batch without labels or without a labelled token.
        CheckpointError: `partial` is of something else.
    """
    gated = True
    try:
        find_router(model)
    except SkipItError:
        gated = False
        attach(model, RouterConfig(layers=layers))
    was_training = model.training
    try:
        with running(mode="dense"), _frozen(model):
            return _profile(model.eval(), batches, draws, temperature, seed, layers, partial)
    finally:
        model.train(was_training)
        if not gated:
            detach(model)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient, so the graph keeps nothing for one."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _profile(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    draws: int,
    temperature: float,
    seed: int,
    path: str | None,
    partial: Partial | None,
) -> Profile:
    _, decoder, layers = find_decoder(model, path)
    sums = ProfileSums(len(layers), int(decoder.config.hidden_size), next(model.parameters()).device)  # type: ignore[union-attr, arg-type]
    of: dict[str, Any] = {"model": fingerprint(model, path), "draws": draws, "temperature": temperature, "seed": seed}
    if partial is not None:
        _restore(sums, partial, of)
    for number, batch in enumerate(batches) if partial is None else partial.unmeasured(batches):
        _measure(model, layers, image_layers(decoder.config), batch, number, sums, draws, temperature, seed)
        if partial is not None:
            partial.save(number, sums.state)
    if sums.rows == 0:
        seen = f"{sums.bad_rows} rows, none of which gave finite states and logits" if sums.bad_rows else "no batch"
        raise InputError(f"the profile got {seen}; expected at least one row with labels.")
    rows = {"rows": sums.rows, "skipped_rows": sums.bad_rows, "skipped_row_numbers": sums.bad_numbers}
    about = {**rows, "draws": draws, "temperature": temperature, "seed": seed}
    return Profile(sums.tables(), CostModel.of(model, path), of["model"], about)


def _restore(sums: ProfileSums, partial: Partial, of: dict[str, Any]) -> None:
    state = partial.begin(of)
    if state is None:
        return
    try:
        sums.restore(state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{partial.folder} is damaged, or of another version: {error}") from error


def _measure(
    model: nn.Module,
    layers: nn.ModuleList,
    of_images: frozenset[int],
    batch: dict[str, Tensor],
    number: int,
    sums: ProfileSums,
    draws: int,
    temperature: float,
    seed: int,
) -> None:
    labels = batch.get("labels")
    if labels is None or not bool(predicts_answer(labels).any(-1).all()):
        raise InputError(f"batch {number}: every row needs `labels` with at least one answer token (not {IGNORE}).")
    inputs = {k: v.to(sums.device) for k, v in batch.items() if k != "labels"}
    answer = predicts_answer(labels).to(sums.device)
    modality = token_modality(model.config, inputs["input_ids"], inputs.get("mm_token_type_ids"))
    real = inputs.get("attention_mask", torch.ones_like(modality)).bool()
    attention = CrossAttention(modality, real, answer.float().argmax(-1), of_images)
    with torch.enable_grad(), LayerStates(layers) as states:
        logits = model(**inputs, use_cache=False, **{OBSERVER_KWARG: attention}).logits
    finite = torch.stack([left.detach().isfinite().all(-1) for left in states.left]).all(0).all(-1)
    finite &= logits.detach().isfinite().all(-1).all(-1)
    first = sums.rows + sums.bad_rows
    numbers = range(first, first + len(finite))
    sums.add_rows(finite)
    if not bool(finite.any()):
        return
    taken = _taken_away(layers, states, modality, real)
    real, answer = real & finite[:, None], answer & finite[:, None]
    kinds = modality.masked_fill(~real, -1)
    sums.add_attention(attention, finite, states.at)
    for index, kwargs in zip(states.at, states.kwargs, strict=True):
        sums.add_keys(index, modality, real, image_states(kwargs, len(real)).held if index in of_images else None)
    tokens = _TokenSums.zeros(real, len(states.at))
    for draw in range(draws):
        choice = draw_choice(logits[:, :-1], answer, temperature, _uniform(seed, numbers, draw))
        grads = torch.autograd.grad(
            choice.margin.sum(), [*states.left, *attention.bias], retain_graph=draw + 1 < draws, allow_unused=True
        )
        _add_draw(choice, grads, taken, kinds, sums, tokens, 1 / draws, states.at)
    for place, (index, x) in enumerate(zip(states.at, states.entered, strict=True)):
        sums.redundancy.update(index, x.detach(), states.left[place].detach(), kinds)
        damage, signal = ({kv: table[kv][place] for kv in POLICIES} for table in tokens)
        sums.add_tokens(index, x.detach(), damage, signal, kinds)


def _uniform(seed: int, rows: Iterable[int], draw: int) -> Tensor:
    """Numbers in [0, 1) for the draws of each row: the same whatever the batches, and when a run goes on."""
    # In fp32 they stay below 1 when they are scaled in fp64.
    drawn = [np.random.default_rng([seed, row, draw]).random(2, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(drawn))


class _TokenSums(NamedTuple):
    """Per K/V policy, [layers, batch, seq]: damages of tokens taken one by one, and what gates learn them from."""

    damage: dict[KVPolicy, Tensor]
    signal: dict[KVPolicy, Tensor]

    @classmethod
    def zeros(cls, like: Tensor, layers: int) -> "_TokenSums":
        shape = (layers, *like.shape)
        return cls(
            {kv: torch.zeros(shape, dtype=torch.float64, device=like.device) for kv in POLICIES},
            {kv: torch.zeros(shape, device=like.device) for kv in POLICIES},
        )


class _Taken(NamedTuple):
    """What skips of one layer take away from its output, ready for slopes."""

    own: Tensor
    """From a token that skips."""
    apart: Tensor
    """From a token when all tokens of the other modality skip, and their keys and values do not exist."""


def _taken_away(layers: nn.ModuleList, states: LayerStates, modality: Tensor, real: Tensor) -> list[_Taken]:
    taken = []
    for index, x, y, kwargs in zip(states.at, states.entered, states.left, states.kwargs, strict=True):
        full, entered = y.detach(), x.detach()
        unobserved = {name: value for name, value in kwargs.items() if name != OBSERVER_KWARG}
        apart = apart_output(layers[index], entered, unobserved, modality, real)
        taken.append(_Taken(weighted_change(full, entered), weighted_change(full, apart)))
    return taken


def _add_draw(
    choice: Choice,
    grads: tuple[Tensor | None, ...],
    taken: list[_Taken],
    kinds: Tensor,
    sums: ProfileSums,
    tokens: _TokenSums,
    weight: float,
    at: list[int],
) -> None:
    """Add the damages that one drawn choice per row shows, of every layer, modality and policy."""
    count = len(taken)
    states = [grad for grad in grads[:count] if grad is not None]
    own = torch.stack([slopes(grad, change.own) for grad, change in zip(states, taken, strict=True)])
    apart = torch.stack([slopes(grad, change.apart) for grad, change in zip(states, taken, strict=True)])
    seen = torch.stack([torch.zeros_like(own[0]) if bias is None else bias[:, 0, 0].float() for bias in grads[count:]])
    margin, mass = choice.margin[:, None], choice.mass[:, None]
    drops: dict[KVPolicy, Tensor] = {"retain": own, "evict": own + seen}
    for kv, alone in drops.items():
        tokens.damage[kv].add_(choice_damage(margin, mass, alone), alpha=weight)
        tokens.signal[kv].add_(tempered_damage(margin, alone), alpha=weight)
    for m in range(len(MODALITIES)):
        chosen, rest = kinds == m, (kinds >= 0) & (kinds != m)
        drop = (own * chosen).sum(-1)
        retain = choice_damage(choice.margin, choice.mass, drop)
        evict = choice_damage(choice.margin, choice.mass, drop + (apart * rest).sum(-1))
        sums.add_damage(m, weight * retain, weight * evict, chosen.any(-1), at)
