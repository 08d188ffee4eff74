"""One pass over a data set that measures everything skipit needs to know about a model, into one artefact."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from skipit.router import MODALITIES, RouterConfig, attach, detach, find_router, running, token_modality
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.router.errors import InputError, SkipItError
from skipit.router.gates import normalize

from .accumulate import RedundancyMetric
from .cost import CostModel
from .damage import (
    Choice,
    CrossAttention,
    LayerStates,
    choice_damage,
    draw_choice,
    evicted_output,
    slopes,
    tempered_damage,
    weighted_change,
)
from .identity import fingerprint
from .ridge import RidgeSums

IGNORE = -100
POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)


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
        about: samples, tokens, seed, temperature and whatever the caller wants recorded.
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
) -> Profile:
    """Measure a dense model on batches with labels: one forward and `draws` backward passes through the decoder each.

    Args:
        model: a model without gates, or with gates, which are ignored.
        batches: model inputs with `labels` (-100 everywhere but on answer tokens).
        draws: drawn choices per row for the damage.
        temperature: at which a choice's alternative is drawn.
        seed: of the draws.
        layers: decoder path for models whose decoder is not found.

    Raises:
        InputError: no batch, no row with finite states, or a batch without labels or without a labelled token.
    """
    gated = True
    try:
        find_router(model)
    except SkipItError:
        gated = False
        attach(model, RouterConfig(layers=layers))
    was_training = model.training
    try:
        with running(mode="dense"):
            return _profile(model.eval(), batches, draws, temperature, seed, layers)
    finally:
        model.train(was_training)
        if not gated:
            detach(model)


def _profile(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], draws: int, temperature: float, seed: int, path: str | None
) -> Profile:
    _, decoder, layers = find_decoder(model, path)
    sums = _Sums(len(layers), int(decoder.config.hidden_size), next(model.parameters()).device)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(batches):
        _measure(model, layers, batch, number, sums, draws, temperature, generator)
    if sums.rows == 0:
        seen = f"{sums.bad_rows} rows, none of which gave finite states and logits" if sums.bad_rows else "no batch"
        raise InputError(f"the profile got {seen}; expected at least one row with labels.")
    about = {"rows": sums.rows, "skipped_rows": sums.bad_rows, "draws": draws, "temperature": temperature, "seed": seed}
    return Profile(sums.tables(), CostModel.of(model, path), fingerprint(model, path), about)


def _measure(
    model: nn.Module,
    layers: nn.ModuleList,
    batch: dict[str, Tensor],
    number: int,
    sums: "_Sums",
    draws: int,
    temperature: float,
    generator: torch.Generator,
) -> None:
    labels = batch.get("labels")
    if labels is None or not bool((labels[:, 1:] != IGNORE).any(-1).all()):
        raise InputError(f"batch {number}: every row needs `labels` with at least one answer token (not {IGNORE}).")
    inputs = {k: v.to(sums.device) for k, v in batch.items() if k != "labels"}
    answer = (labels[:, 1:] != IGNORE).to(sums.device)
    modality = token_modality(model.config, inputs["input_ids"], inputs.get("mm_token_type_ids"))
    real = inputs.get("attention_mask", torch.ones_like(modality)).bool()
    attention = CrossAttention(modality, real, answer.float().argmax(-1))
    with torch.enable_grad(), LayerStates(layers) as states:
        logits = model(**inputs, use_cache=False, **{OBSERVER_KWARG: attention}).logits
    finite = torch.stack([left.detach().isfinite().all(-1) for left in states.left]).all(0).all(-1)
    finite &= logits.detach().isfinite().all(-1).all(-1)
    sums.rows += int(finite.sum())
    sums.bad_rows += int((~finite).sum())
    if not bool(finite.any()):
        return
    real, answer = real & finite[:, None], answer & finite[:, None]
    sums.attention(attention, finite)
    sums.keys(modality, real)
    taken = _taken_away(layers, states, modality, real)
    tokens = _TokenSums.zeros(real, len(layers))
    for draw in range(draws):
        choice = draw_choice(logits[:, :-1], answer, temperature, generator)
        grads = torch.autograd.grad(
            choice.margin.sum(), [*states.left, *attention.bias], retain_graph=draw + 1 < draws, allow_unused=True
        )
        _add_draw(choice, grads, taken, modality, real, finite, sums, tokens, 1 / draws, draw == 0)
    for index, x in enumerate(states.entered):
        sums.redundancy.update(index, x.detach(), states.left[index].detach(), modality.masked_fill(~real, -1))
        for kv in POLICIES:
            sums.tokens(index, kv, x.detach(), tokens.damage[kv][index], tokens.signal[kv][index], modality, real)


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


def _add_draw(
    choice: Choice,
    grads: tuple[Tensor | None, ...],
    taken: "list[_Taken]",
    modality: Tensor,
    real: Tensor,
    finite: Tensor,
    sums: "_Sums",
    tokens: _TokenSums,
    weight: float,
    first: bool,
) -> None:
    """Add the damages that one drawn choice per row shows, of every layer, modality and policy."""
    for index, change in enumerate(taken):
        grad, others = grads[index], grads[len(taken) + index]
        assert grad is not None
        own = slopes(grad, change.retain)
        alone = {"retain": own, "evict": own if others is None else own + others[:, 0, 0].float()}
        for kv in POLICIES:
            single = choice_damage(choice.margin[:, None], choice.mass[:, None], alone[kv])
            tokens.damage[kv][index] += weight * single
            tokens.signal[kv][index] += weight * tempered_damage(choice.margin[:, None], alone[kv])
        for m in range(len(MODALITIES)):
            chosen = real & (modality == m)
            retain = choice_damage(choice.margin, choice.mass, (own * chosen).sum(-1))
            evict = choice_damage(choice.margin, choice.mass, (slopes(grad, change.evict[m]) * real).sum(-1))
            sums.damage(index, m, weight * retain, weight * evict, chosen.any(-1) & finite, first)


class _Taken(NamedTuple):
    """What skips of one layer take away from its output, ready for slopes: of each token, and with a whole modality."""

    retain: Tensor
    evict: list[Tensor]


def _taken_away(layers: nn.ModuleList, states: LayerStates, modality: Tensor, real: Tensor) -> list[_Taken]:
    taken = []
    for layer, x, y, kwargs in zip(layers, states.entered, states.left, states.kwargs, strict=True):
        before, after = y.detach(), x.detach()
        units = [real & (modality == m) for m in range(len(MODALITIES))]
        evict = [weighted_change(before, evicted_output(layer, after, kwargs, unit)) for unit in units]
        taken.append(_Taken(weighted_change(before, after), evict))
    return taken


class _Sums:
    """Everything a profile adds up, over batches."""

    def __init__(self, layers: int, dim: int, device: torch.device) -> None:
        self.device = device
        units = (layers, len(MODALITIES))
        self.rows = self.bad_rows = 0
        self.redundancy = RedundancyMetric(layers).to(device)
        self.names = ("retain", "evict", "unit_rows", "tokens_retain", "tokens_evict", "keys", "count")
        self.sums = {name: torch.zeros(units, dtype=torch.float64, device=device) for name in self.names}
        self.var = torch.zeros(2, layers, dtype=torch.float64, device=device)
        self.var_rows = torch.zeros(2, layers, dtype=torch.float64, device=device)
        self.ridge = {
            kv: [[RidgeSums.empty(dim, device) for _ in MODALITIES] for _ in range(layers)] for kv in POLICIES
        }

    def attention(self, measured: CrossAttention, finite: Tensor) -> None:
        for kind, values in enumerate((measured.text, measured.last)):
            rows = torch.stack(values).double()
            good = rows.isfinite() & finite
            self.var[kind] += rows.masked_fill(~good, 0).sum(-1)
            self.var_rows[kind] += good.sum(-1)

    def damage(self, layer: int, m: int, retain: Tensor, evict: Tensor, rows: Tensor, first: bool) -> None:
        self.sums["retain"][layer, m] += retain[rows].double().sum()
        self.sums["evict"][layer, m] += evict[rows].double().sum()
        if first:
            self.sums["unit_rows"][layer, m] += rows.sum()

    def tokens(
        self, layer: int, kv: KVPolicy, x: Tensor, damage: Tensor, signal: Tensor, modality: Tensor, real: Tensor
    ) -> None:
        """Add the damages of tokens taken one by one, and the signal from which gates learn to tell tokens apart."""
        states = normalize(x)
        for m in range(len(MODALITIES)):
            chosen = real & (modality == m)
            self.sums[f"tokens_{kv}"][layer, m] += damage[chosen].sum()
            # A token after which no answer depends on this layer has no signal at all, hence no logarithm.
            used = chosen & (signal > 0)
            for half in (0, 1):
                rows = used[half::2]
                self.ridge[kv][layer][m].add(half, states[half::2][rows], signal[half::2][rows].log())

    def keys(self, modality: Tensor, real: Tensor) -> None:
        keys = real.cumsum(-1)
        for m in range(len(MODALITIES)):
            chosen = real & (modality == m)
            self.sums["keys"][:, m] += keys[chosen].sum()
            self.sums["count"][:, m] += chosen.sum()

    def tables(self) -> dict[str, Tensor]:
        s = self.sums
        redundancy = self.redundancy.compute()
        fits = {kv: [[unit.solve() for unit in layer] for layer in self.ridge[kv]] for kv in POLICIES}
        ridge = {
            f"ridge_{name}_{kv}": torch.stack(
                [torch.stack([getattr(fit, name) for fit in layer]) for layer in fits[kv]]
            )
            for name in ("weight", "bias", "mean", "std", "r2")
            for kv in POLICIES
        }
        tables = {
            "geometric": redundancy.geometric,
            "update": redundancy.update,
            "histogram": redundancy.histogram,
            "count": redundancy.count,
            "damage_retain": s["retain"] / s["unit_rows"],
            "damage_evict": s["evict"] / s["unit_rows"],
            "damage_tokens_retain": s["tokens_retain"] / s["unit_rows"],
            "damage_tokens_evict": s["tokens_evict"] / s["unit_rows"],
            "keys": s["keys"] / s["count"],
            "tokens_per_row": s["count"] / s["unit_rows"],
            "var_text": self.var[0] / self.var_rows[0],
            "var_last": self.var[1] / self.var_rows[1],
        }
        return {k: v.cpu().contiguous() for k, v in (tables | ridge).items()}
