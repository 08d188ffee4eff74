"""One pass over a data set that measures everything skipit needs to know about a model, into one artefact."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipit.router import MODALITIES, attach, detach, find_router, running, token_modality
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.router.errors import InputError, SkipItError
from skipit.router.gates import normalize

from .accumulate import RedundancyMetric
from .cost import CostModel
from .damage import CrossAttention, LayerStates, damage_by_row, eviction_change, sample_log_likelihood, slopes
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
    temperature: float = 2.0,
    seed: int = 0,
    layers: str | None = None,
) -> Profile:
    """Measure a dense model on batches with labels: one forward and `draws` backward passes through the decoder each.

    Args:
        model: a model without gates, or with gates, which are ignored.
        batches: model inputs with `labels` (-100 everywhere but on answer tokens).
        draws: sampled answers per batch for the Fisher damage.
        temperature: at which answers are drawn.
        seed: of the draws.
        layers: decoder path for models whose decoder is not found.

    Raises:
        InputError: no batch, or a batch without labels or without a labelled token.
    """
    gated = True
    try:
        find_router(model)
    except SkipItError:
        gated = False
        attach(model)
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
        raise InputError("the profile got no batch; expected at least one with labels.")
    about = {"rows": sums.rows, "skipped_rows": sums.bad_rows, "draws": draws, "temperature": temperature, "seed": seed}
    return Profile(sums.tables(), CostModel.of(model, path), fingerprint(model), about)


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
    updates = [(left - entered).detach() for left, entered in zip(states.left, states.entered, strict=True)]
    changes = [
        {
            m: eviction_change(layer, x.detach(), y.detach(), kwargs, real & (modality == m))
            for m in range(len(MODALITIES))
        }
        for layer, x, y, kwargs in zip(layers, states.entered, states.left, states.kwargs, strict=True)
    ]
    token_damage = {kv: [torch.zeros_like(real, dtype=torch.float32) for _ in layers] for kv in POLICIES}
    answers = answer.sum(-1).clamp(min=1)
    for draw in range(draws):
        score = sample_log_likelihood(logits[:, :-1][answer], temperature, generator)
        grads = torch.autograd.grad(
            score, [*states.left, *attention.bias], retain_graph=draw + 1 < draws, allow_unused=True
        )
        for index, grad in enumerate(grads[: len(layers)]):
            own, others = slopes(grad, updates[index]), grads[len(layers) + index]
            alone = {"retain": own, "evict": own if others is None else own + others[:, 0, 0].float()}
            for kv in POLICIES:
                token_damage[kv][index] += 0.5 * alone[kv].square() / (answers[:, None] * draws)
            for m in range(len(MODALITIES)):
                chosen = real & (modality == m)
                retain = damage_by_row(own, chosen) / answers
                evict = damage_by_row(slopes(grad, changes[index][m]), real) / answers
                sums.damage(index, m, retain / draws, evict / draws, chosen.any(-1) & finite, draw == 0)
    for index, x in enumerate(states.entered):
        damages = {kv: token_damage[kv][index] for kv in POLICIES}
        sums.tokens(index, x.detach(), states.left[index].detach(), damages, modality, real)


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
        self, layer: int, x: Tensor, y: Tensor, damages: dict[KVPolicy, Tensor], modality: Tensor, real: Tensor
    ) -> None:
        self.redundancy.update(layer, x, y, modality.masked_fill(~real, -1))
        keys = real.cumsum(-1)
        states = normalize(x)
        for m in range(len(MODALITIES)):
            chosen = real & (modality == m)
            self.sums["keys"][layer, m] += keys[chosen].sum()
            self.sums["count"][layer, m] += chosen.sum()
            for kv, damage in damages.items():
                self.sums[f"tokens_{kv}"][layer, m] += damage[chosen].double().sum()
                # A token after which no answer depends on this layer has no damage at all, hence no logarithm.
                used = chosen & (damage > 0)
                for half in (0, 1):
                    rows = used[half::2]
                    self.ridge[kv][layer][m].add(half, states[half::2][rows], damage[half::2][rows].log())

    def tables(self) -> dict[str, Tensor]:
        s = self.sums
        redundancy = self.redundancy.compute()
        fits = {kv: [[unit.solve() for unit in layer] for layer in self.ridge[kv]] for kv in POLICIES}
        ridge = {
            f"ridge_{name}_{kv}": torch.stack([torch.stack([getattr(fit, name) for fit in layer]) for layer in fits[kv]])
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
