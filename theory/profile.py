"""One pass over a data set that measures everything skipit needs to know about a model, into one artefact."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipit.router import running
from skipit.router.config import KVPolicy, RouterConfig, check_points, decision_points
from skipit.router.decoder import find_decoder, image_layers
from skipit.router.errors import CheckpointError, InputError

from .cost import CostModel
from .damage import EXPONENT
from .identity import fingerprint
from .measuring import evaluating, frozen, routed
from .partial import Partial
from .profile_batch import BatchMeasurement, Draws
from .profile_sums import POLICIES, ProfileSums, groups
from .ridge import RidgeFit


@dataclass(frozen=True)
class Damage:
    """What skipping under one K/V policy does to the answer: a KL divergence, in nats per answer token.

    Attributes:
        unit: when all tokens of the unit skip this layer.
        tokens: the sum of the damages of a row's tokens of the unit, each skipping alone.
        typical: of one such token: the power mean over all, of exponent `EXPONENT`.
        ridge: prediction of a token's log damage from the state that enters the layer's decision point, `weight`
            [layers, modality, dim].
    """

    unit: Float[Tensor, "layers modality"]
    tokens: Float[Tensor, "layers modality"]
    typical: Float[Tensor, "layers modality"]
    ridge: RidgeFit


@dataclass(frozen=True)
class Profile:
    """What was measured about a model, per unit: a layer and a modality. NaN where a unit has no tokens.

    Attributes:
        geometric: mean cosine distance between what enters and leaves the layer, in [0, 2].
        update: mean size of the layer's update relative to its input.
        histogram: tokens per bin of `DISTANCE_EDGES`, by their cosine distance.
        count: tokens measured.
        keys: keys that a token sees, on average.
        tokens_per_row: tokens of a row that has the unit, on average.
        var_text: VAR, the share of attention that text queries pay to vision keys, in [0, 1].
        var_last: VAR of the last prompt token alone.
        damage: by K/V policy.
        costs: of the model's layers.
        model: fingerprint of the model it belongs to.
        about: `rows` measured, `skipped_rows` that were not finite and `skipped_row_numbers` (the first of them, by
            their place in the data), draws, seed and temperature, and whatever the caller wants recorded.
        decide_at: the decision points, as of `RouterConfig`.
    """

    geometric: Float[Tensor, "layers modality"]
    update: Float[Tensor, "layers modality"]
    histogram: Int[Tensor, "layers modality bins"]
    count: Int[Tensor, "layers modality"]
    keys: Float[Tensor, "layers modality"]
    tokens_per_row: Float[Tensor, "layers modality"]
    var_text: Float[Tensor, " layers"]
    var_last: Float[Tensor, " layers"]
    damage: dict[KVPolicy, Damage]
    costs: CostModel
    model: str
    about: dict[str, Any] = field(default_factory=dict)
    decide_at: tuple[int, ...] | None = None

    @property
    def attention(self) -> Float[Tensor, " layers"]:
        """VAR, the larger of all text queries' and the last prompt token's, in [0, 1]."""
        return torch.maximum(self.var_text, self.var_last)

    @property
    def block_influence(self) -> Float[Tensor, " layers"]:
        """ShortGPT's measure: the mean cosine distance over all tokens, whatever their modality."""
        count = self.count.double()
        return (self.geometric.double().nan_to_num(0.0) * count).sum(-1) / count.sum(-1)

    @property
    def tokens(self) -> Float[Tensor, "layers modality"]:
        """Tokens of a row that has the unit; 0 where no row has."""
        return self.tokens_per_row.nan_to_num(0.0)

    @property
    def width(self) -> int:
        """Of the states that gates read."""
        return self.damage["retain"].ridge.weight.shape[-1]

    @property
    def total(self) -> float:
        """FLOPs of the dense decoder for a row with `tokens`."""
        return self.costs.dense(self.tokens, self.keys.nan_to_num(1.0))

    def saving(self, kv: KVPolicy) -> Float[Tensor, "layers modality"]:
        """FLOPs that one skipped token of a unit saves."""
        return self.costs.saving(self.keys.nan_to_num(1.0), kv)

    def unit_cost(self, kv: KVPolicy) -> Float[Tensor, "layers modality"]:
        """FLOPs that a row saves when a whole unit is skipped; 0 where a unit has no tokens."""
        return self.tokens * self.saving(kv)

    def floor(self, kv: KVPolicy) -> float:
        """FLOPs of a row of which every unit is skipped."""
        return self.total - float(self.unit_cost(kv).sum())

    def least(self, kv: KVPolicy) -> float:
        """Share of the dense FLOPs that is spent when every unit is skipped, with what the gates themselves cost."""
        return (self.floor(kv) + float((self.costs.column("gate")[:, None] * self.tokens).sum())) / self.total


def profile(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    draws: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    layers: str | None = None,
    decide_at: tuple[int, ...] | None = RouterConfig.decide_at,
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
        decide_at: layers at which gates will decide: a token's damage is predicted from the state that enters the last
            of them before or at its layer. None: each layer's own.
        partial: where to keep the sums while measuring, and to go on from; remove it when the profile is written.

    Raises:
        InputError: no batch, no row with finite states, or a batch without labels or without a labelled token.
        CheckpointError: `partial` is of something else.
        RouterConfigError: `decide_at` is not ascending layers of the model that begin with 0.
    """
    points = check_points(decide_at)
    with routed(model, layers), evaluating(model), running(mode="dense"), frozen(model):
        return _profile(model, batches, Draws(draws, temperature, seed), layers, points, partial)


def _profile(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    draws: Draws,
    path: str | None,
    decide_at: tuple[int, ...] | None,
    partial: Partial | None,
) -> Profile:
    _, decoder, layers = find_decoder(model, path)
    of_images, count = image_layers(decoder.config), len(layers)
    grouped = groups(decision_points(decide_at, count), count, of_images)
    sums = ProfileSums(count, int(decoder.config.hidden_size), next(model.parameters()).device, grouped)  # type: ignore[union-attr, arg-type]
    measurement = BatchMeasurement(model, layers, of_images, draws, sums)
    # JSON has lists.
    of = {"model": fingerprint(model, path), "decide_at": decide_at and list(decide_at), **asdict(draws)}
    if partial is not None:
        _restore(sums, partial, of)
    for number, batch in enumerate(batches) if partial is None else partial.unmeasured(batches):
        measurement.add(number, batch)
        if partial is not None:
            partial.save(number, sums.state)
    if sums.rows == 0:
        seen = f"{sums.bad_rows} rows, none of which gave finite states and logits" if sums.bad_rows else "no batch"
        raise InputError(f"the profile got {seen}; expected at least one row with labels.")
    rows = {"rows": sums.rows, "skipped_rows": sums.bad_rows, "skipped_row_numbers": sums.bad_numbers}
    about = {**rows, **asdict(draws)}
    return _from_sums(sums, costs=CostModel.of(model, path), model=of["model"], about=about, decide_at=decide_at)


def _restore(sums: ProfileSums, partial: Partial, of: dict[str, Any]) -> None:
    state = partial.begin(of)
    if state is None:
        return
    try:
        sums.restore(state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{partial.folder} is damaged, or of another version: {error}") from error


def _from_sums(sums: ProfileSums, **known: Any) -> Profile:
    """Means of what was added up, on the CPU."""
    redundancy, ridge = sums.redundancy.cpu().compute(), sums.ridge_fits()
    unit = {name: table.cpu() for name, table in sums.sums.items()}
    var_text, var_last = ((mass / rows).cpu() for mass, rows in zip(sums.var, sums.var_rows, strict=True))
    return Profile(
        geometric=redundancy.geometric,
        update=redundancy.update,
        histogram=redundancy.histogram,
        count=redundancy.count,
        keys=unit["keys"] / unit["count"],
        tokens_per_row=unit["count"] / unit["unit_rows"],
        var_text=var_text,
        var_last=var_last,
        damage={
            kv: Damage(
                unit=unit[kv] / unit["unit_rows"],
                tokens=unit[f"tokens_{kv}"] / unit["unit_rows"],
                typical=(unit[f"powers_{kv}"] / unit["count"]).pow(1 / EXPONENT),
                ridge=ridge[kv],
            )
            for kv in POLICIES
        },
        **known,
    )
