"""Everything a profile adds up over batches."""

from dataclasses import fields

import torch
from torch import Tensor

from skipit.router import MODALITIES
from skipit.router.config import KVPolicy
from skipit.router.gates import normalize

from .damage import CrossAttention
from .ridge import RidgeFit, RidgeSums, projection

POLICIES: tuple[KVPolicy, ...] = ("retain", "evict")
RIDGE_FIELDS = tuple(field.name for field in fields(RidgeSums))
# A longer list of rows that were left out says no more than its beginning.
MOST_NAMED = 100


class ProfileSums:
    """Sums over batches; those of two parts of the data add up to those of all of it.

    Args:
        layers: of the decoder.
        dim: of its states.
        device: on which to add up.
    """

    def __init__(self, layers: int, dim: int, device: torch.device) -> None:
        # Imported here, because importing torchmetrics takes longer than importing torch.
        from .accumulate import RedundancyMetric

        self.device = device
        units = (layers, len(MODALITIES))
        self.rows = self.bad_rows = 0
        self.bad_numbers: list[int] = []
        self.redundancy = RedundancyMetric(layers).to(device)
        names = ("retain", "evict", "unit_rows", "tokens_retain", "tokens_evict", "keys", "count")
        self.sums = {name: torch.zeros(units, dtype=torch.float64, device=device) for name in names}
        self.var = torch.zeros(2, layers, dtype=torch.float64, device=device)
        self.var_rows = torch.zeros(2, layers, dtype=torch.float64, device=device)
        columns = projection(dim)
        self.projection = None if columns is None else columns.to(device)
        features = dim if columns is None else columns.shape[1]
        self.ridge = [[RidgeSums.empty(features, len(POLICIES), device) for _ in MODALITIES] for _ in range(layers)]

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

    def add_tokens(
        self, layer: int, x: Tensor, damage: dict[KVPolicy, Tensor], signal: dict[KVPolicy, Tensor], kinds: Tensor
    ) -> None:
        """Add the damages of tokens taken one by one, and the signal from which gates learn to tell tokens apart.

        Both policies learn from the same tokens, those that have a signal under both: they share the sums of the
        states (ours). Halves are even and odd rows of the data, whatever the batches; `add_rows` must have counted
        this batch.

        Args:
            layer: index.
            x: states that enter it.
            damage: per K/V policy, [batch, seq].
            signal: the same.
            kinds: the modality of every token, -1 for those that do not count.
        """
        states = normalize(x)
        if self.projection is not None:
            states = states @ self.projection
        targets = torch.stack([signal[kv] for kv in POLICIES], dim=-1)
        # A token after which no answer depends on this layer has no signal at all, hence no logarithm.
        used = (targets > 0).all(-1)
        first = self.rows + self.bad_rows - len(x)
        half = (first + torch.arange(len(x), device=x.device)) % 2
        for m in range(len(MODALITIES)):
            chosen = kinds == m
            for kv in POLICIES:
                self.sums[f"tokens_{kv}"][layer, m] += damage[kv][chosen].sum()
            for number in (0, 1):
                tokens = used & chosen & (half == number)[:, None]
                self.ridge[layer][m].add(number, states[tokens], targets[tokens].log())

    def ridge_fits(self) -> dict[KVPolicy, RidgeFit]:
        """Predictions of a token's log damage under each K/V policy, on the CPU, of every layer and modality."""
        fits = [[unit.solve() for unit in layer] for layer in self.ridge]
        back = None if self.projection is None else self.projection.T.cpu()

        def stacked(at: int) -> RidgeFit:
            tables = (
                torch.stack([torch.stack([getattr(unit, name)[at] for unit in layer]) for layer in fits])
                for name in RidgeFit._fields
            )
            fit = RidgeFit(*tables)
            return fit if back is None else fit._replace(weight=fit.weight @ back)

        return {kv: stacked(at) for at, kv in enumerate(POLICIES)}

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
        return [(f"{layer}.{m}", unit) for layer, row in enumerate(self.ridge) for m, unit in enumerate(row)]
