"""Everything a profile adds up over batches."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from skipit.router import MODALITIES
from skipit.router.config import KVPolicy
from skipit.router.gates import normalize

from .damage import EXPONENT, CrossAttention
from .ridge import RidgeFit, RidgeSums, projection

POLICIES: tuple[KVPolicy, ...] = ("retain", "evict")
RIDGE_FIELDS = tuple(field.name for field in fields(RidgeSums))
# A longer list of rows that were left out says no more than its beginning.
MOST_NAMED = 100


class Group(NamedTuple):
    """Layers whose damages are regressed on the same samples: those tokens that have a signal in all of them."""

    point: int
    """The layer at which their gates decide: features are the states that enter it."""
    layers: tuple[int, ...]


def groups(points: Sequence[int], layers: int, of_images: Collection[int] = ()) -> list[Group]:
    """The layers between one decision point and the next, by which tokens have a signal in them.

    In the decoder's last layer no answer depends on a token that predicts none, and layers over images are left out
    where there is no image. With others they would leave those nothing to learn from, so they have groups of their own.

    Args:
        points: of decision, in order, the first of them 0.
        layers: of the decoder.
        of_images: indices of those that attend to images.

    Example:
        >>> groups((0, 2), 5)
        [Group(point=0, layers=(0, 1)), Group(point=2, layers=(2, 3)), Group(point=2, layers=(4,))]
    """
    found: dict[tuple[int, bool, bool], list[int]] = {}
    for layer in range(layers):
        point = max(p for p in points if p <= layer)
        found.setdefault((point, layer in of_images, layer == layers - 1), []).append(layer)
    return [Group(point, tuple(of)) for (point, _, _), of in found.items()]


class ProfileSums:
    """Sums over batches; those of two parts of the data add up to those of all of it.

    Args:
        layers: of the decoder.
        dim: of its states.
        device: on which to add up.
        grouped: its layers, each in one group.
    """

    def __init__(self, layers: int, dim: int, device: torch.device, grouped: Sequence[Group]) -> None:
        # Imported here, because importing torchmetrics takes longer than importing torch.
        from .accumulate import RedundancyMetric

        self.device = device
        units = (layers, len(MODALITIES))
        self.rows = self.bad_rows = 0
        self.bad_numbers: list[int] = []
        self.redundancy = RedundancyMetric(layers).to(device)
        of_policies = (f"{name}{kv}" for name in ("", "tokens_", "powers_") for kv in POLICIES)
        names = (*of_policies, "unit_rows", "keys", "count")
        self.sums = {name: torch.zeros(units, dtype=torch.float64, device=device) for name in names}
        self.var = torch.zeros(2, layers, dtype=torch.float64, device=device)
        self.var_rows = torch.zeros(2, layers, dtype=torch.float64, device=device)
        columns = projection(dim)
        self.projection = None if columns is None else columns.to(device)
        features = dim if columns is None else columns.shape[1]
        self.groups = tuple(grouped)
        self.ridge = [
            [RidgeSums.empty(features, len(group.layers) * len(POLICIES), device) for _ in MODALITIES]
            for group in self.groups
        ]

    def add_rows(self, finite: Tensor) -> None:
        """Count rows, bool [batch]: those that are not finite are left out and named by their number in the data."""
        first = self.rows + self.bad_rows
        bad = (first + (~finite).nonzero()[:, 0]).tolist()
        self.bad_numbers += bad[: MOST_NAMED - len(self.bad_numbers)]
        self.rows += len(finite) - len(bad)
        self.bad_rows += len(bad)

    def add_attention(self, measured: CrossAttention, finite: Tensor, at: list[int]) -> None:
        """Add how much text attends to vision in the layers `at`, of the rows that are finite."""
        for kind, values in enumerate((measured.text, measured.last)):
            rows = torch.stack(values).double()
            good = rows.isfinite() & finite
            self.var[kind, at] += rows.masked_fill(~good, 0).sum(-1)
            self.var_rows[kind, at] += good.sum(-1)

    def add_keys(self, layer: int, kinds: Tensor, images: int | None = None) -> None:
        """Add the tokens of each modality in a layer and the keys they see, [batch, seq]; or all see `images` keys."""
        keys = (kinds >= 0).cumsum(-1) if images is None else torch.full_like(kinds, images)
        for m in range(len(MODALITIES)):
            chosen = kinds == m
            self.sums["keys"][layer, m] += keys[chosen].sum()
            self.sums["count"][layer, m] += chosen.sum()
            self.sums["unit_rows"][layer, m] += chosen.any(-1).sum()

    def add_damage(self, m: int, retain: Tensor, evict: Tensor, rows: Tensor, at: list[int]) -> None:
        """Add what skipping a whole modality in one of the layers `at` does, [at, batch], of the rows that have it."""
        self.sums["retain"][at, m] += retain[:, rows].double().sum(-1)
        self.sums["evict"][at, m] += evict[:, rows].double().sum(-1)

    def add_tokens(self, layer: int, damage: dict[KVPolicy, Tensor], kinds: Tensor) -> None:
        """Add the damages, per K/V policy and [batch, seq], of tokens that skip a layer one by one."""
        for m in range(len(MODALITIES)):
            for kv in POLICIES:
                of_unit = damage[kv][kinds == m]
                self.sums[f"tokens_{kv}"][layer, m] += of_unit.sum()
                self.sums[f"powers_{kv}"][layer, m] += of_unit.pow(EXPONENT).sum()

    def add_samples(self, group: int, x: Tensor, signal: dict[KVPolicy, Tensor], kinds: Tensor) -> None:
        """Add the signal from which the gates of a group's layers learn to tell tokens apart.

        All layers of a group and both policies learn from the same tokens, those that have a signal in all of them:
        they share the sums of the states (ours). Halves are even and odd rows of the data, whatever the batches;
        `add_rows` must have counted this batch.

        Args:
            group: index.
            x: states that enter its decision point.
            signal: per K/V policy, [layers of the group, batch, seq].
            kinds: the modality of every token, -1 for those that do not count.
        """
        states = normalize(x)
        if self.projection is not None:
            states = states @ self.projection
        targets = torch.cat([signal[kv] for kv in POLICIES]).movedim(0, -1)
        # A token after which no answer depends on a layer has no signal there at all, hence no logarithm.
        used = (targets > 0).all(-1)
        first = self.rows + self.bad_rows - len(x)
        half = (first + torch.arange(len(x), device=x.device)) % 2
        for m in range(len(MODALITIES)):
            for number in (0, 1):
                tokens = used & (kinds == m) & (half == number)[:, None]
                self.ridge[group][m].add(number, states[tokens], targets[tokens].log())

    def ridge_fits(self) -> dict[KVPolicy, RidgeFit]:
        """Predictions of a token's log damage under each K/V policy, on the CPU, of every layer and modality."""
        by_layer: dict[int, RidgeFit] = {}  # of each, tables [modality, policy, ...]
        for group, units in zip(self.groups, self.ridge, strict=True):
            fits = [unit.solve() for unit in units]
            tables = [torch.stack(parts).unflatten(1, (len(POLICIES), -1)) for parts in zip(*fits, strict=True)]
            by_layer |= {layer: RidgeFit(*(t[:, :, at] for t in tables)) for at, layer in enumerate(group.layers)}
        whole = RidgeFit(*(torch.stack(parts) for parts in zip(*(by_layer[i] for i in sorted(by_layer)), strict=True)))
        if self.projection is not None:
            whole = whole._replace(weight=whole.weight @ self.projection.T.cpu())
        return {kv: RidgeFit(*(table[:, :, at] for table in whole)) for at, kv in enumerate(POLICIES)}

    def state(self) -> dict[str, Tensor]:
        """All sums, by name; `restore` of a new object takes them back."""
        redundancy = {f"redundancy.{name}": value for name, value in self.redundancy.metric_state.items()}
        ridge = {
            f"ridge.{name}.{field}": getattr(unit, field) for name, unit in self._units() for field in RIDGE_FIELDS
        }
        rows = {"rows": torch.tensor([self.rows, self.bad_rows]), "bad_numbers": torch.tensor(self.bad_numbers).long()}
        sums = {f"sums.{name}": value for name, value in self.sums.items()}
        return {**rows, **sums, **redundancy, **ridge, "var": self.var, "var_rows": self.var_rows}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            KeyError: a sum is missing.
        """
        state = {name: value.to(self.device) for name, value in state.items()}
        self.rows, self.bad_rows = state["rows"].tolist()
        self.bad_numbers = state["bad_numbers"].tolist()
        self.sums = {name: state[f"sums.{name}"] for name in self.sums}
        self.var, self.var_rows = state["var"], state["var_rows"]
        self.redundancy.merge_state({name: state[f"redundancy.{name}"] for name in self.redundancy.metric_state})
        # An update with no token in it: a metric that was only merged warns that it was never updated.
        nothing = torch.zeros(0, 1, 1, device=self.device)
        self.redundancy.update(0, nothing, nothing, nothing[..., 0].long())
        for name, unit in self._units():
            for field in RIDGE_FIELDS:
                setattr(unit, field, state[f"ridge.{name}.{field}"])

    def _units(self) -> list[tuple[str, RidgeSums]]:
        return [(f"{group}.{m}", unit) for group, row in enumerate(self.ridge) for m, unit in enumerate(row)]
