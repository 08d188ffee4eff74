"""How long a decoder layer takes when a share of its tokens skips it, as `skipit bench` has measured it."""

from dataclasses import asdict, astuple, dataclass
from math import exp, log
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router.call import Route
from skipit.router.config import KVPolicy
from skipit.router.costs import LayerCost
from skipit.router.errors import CheckpointError, InputError
from skipit.router.folders import load_json, provenance, save_json, writing
from skipit.router.measured import bench_file

from .cost import CostModel


@dataclass(frozen=True)
class LayerTime:
    """One measurement.

    Attributes:
        tokens: of the prompt.
        skipped: how many of them skip the layer.
        kv: what becomes of their keys and values.
        route: by which gathered execution ran under `retain`; None where there is no choice.
        ms: of one layer, with its part of what gates and their decisions take.
        relative: to the untouched layer, the median of ratios in turn.
    """

    tokens: int
    skipped: int
    kv: KVPolicy
    route: Route | None
    ms: float
    relative: float


@dataclass(frozen=True)
class StepTime:
    """Of a layer for one token decoded after a prompt.

    Attributes:
        ms: of the untouched layer.
        entered: of a gated layer that the token runs, relative to it.
        left_out: of one that it skips, which is not entered.
    """

    ms: float
    entered: float
    left_out: float


@dataclass(frozen=True)
class LayerTimes:
    """What was measured about layers of one shape.

    Attributes:
        device: its name, with PyTorch's threads on a CPU.
        dtype: of the weights.
        hidden: width of the states.
        linear: FLOPs of one token in a layer's linear maps, by which layers of equal width are told apart.
        clock: what was counted.
        dense: milliseconds of the untouched layer, by tokens.
        rows: the measurements.
        steps: of the token after a prompt, by the prompt's tokens.
    """

    device: str
    dtype: str
    hidden: int
    linear: float
    clock: str
    dense: dict[int, float]
    rows: tuple[LayerTime, ...]
    steps: dict[int, StepTime]

    @property
    def packing_pays(self) -> float:
        """The FLOPs from which on layers are to be packed: those with which the measured cases lose the least time."""
        whole = {(row.tokens, row.skipped): row.relative for row in self.rows if row.route == "whole"}
        pairs = [
            (self._saved(row), row.relative - whole[row.tokens, row.skipped])
            for row in self.rows
            if row.route == "packed"
        ]
        return min(
            [0.0, *sorted(saved for saved, _ in pairs)],
            key=lambda limit: sum(longer for saved, longer in pairs if saved > limit),
        )

    def _saved(self, row: LayerTime) -> float:
        return float(row.skipped * 4 * self.hidden**2)  # as the router counts

    def relative(self, kv: KVPolicy, tokens: float, skipped: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Time of a layer that shares of its tokens skip, dense is 1; linear between the cases that were measured.

        Args:
            kv: K/V policy.
            tokens: of the prompt; beyond those that were measured, as the nearest.
            skipped: shares in [0, 1], which may have a gradient.
        """
        limit, sizes, place = self.packing_pays, sorted(self.dense), self._place(tokens)
        curves = []
        for size in (sizes[int(place)], sizes[min(int(place) + 1, len(sizes) - 1)]):
            rows = [row for row in self.rows if (row.tokens, row.kv) == (size, kv)]
            taken = [r for r in rows if r.route in (None, "packed" if self._saved(r) > limit else "whole")]
            pairs = zip(*sorted((row.skipped / size, row.relative) for row in taken), strict=True)
            shares, times = (torch.tensor(part, dtype=torch.float64, device=skipped.device) for part in pairs)
            after = torch.searchsorted(shares, skipped.detach().double().contiguous()).clamp(1, len(shares) - 1)
            slope = (times.diff() / shares.diff())[after - 1]
            curves.append(times[after - 1] + slope * (skipped - shares[after - 1]))
        return torch.lerp(curves[0], curves[1], place % 1)

    def ms(self, tokens: float) -> float:
        """Milliseconds of the untouched layer for a prompt of so many tokens, as `relative` knows them."""
        logs = [log(self.dense[size]) for size in sorted(self.dense)]
        return exp(float(np.interp(self._place(tokens), range(len(logs)), logs)))

    def step(self, tokens: float) -> StepTime:
        """Of the token after a prompt of so many, linear between those that were measured."""
        place, found = self._place(tokens), [self.steps[size] for size in sorted(self.dense)]
        columns = zip(*(astuple(step) for step in found), strict=True)
        return StepTime(*(float(np.interp(place, range(len(found)), column)) for column in columns))

    def _place(self, tokens: float) -> float:
        """Between the prompts that were measured, in the logarithm: 0 is the shortest."""
        sizes = [log(size) for size in sorted(self.dense)]
        return float(np.interp(log(max(tokens, 1.0)), sizes, range(len(sizes))))

    def check(self, latency: float, least: float, kv: KVPolicy) -> None:
        """Refuse a share of the time that no gates can meet.

        Args:
            latency: share of the dense layers' time.
            least: the share when all tokens skip all layers.
            kv: K/V policy.

        Raises:
            InputError: it is below the least.
        """
        if latency < least:
            raise InputError(
                f"`latency`: got {latency:g}, expected at least {least:.3f} on this machine (kv {kv!r}): so much "
                "of the dense layers' time is spent when every token skips every layer."
            )

    def save(self, path: Path) -> None:
        """Write it, with what the router reads of it.

        Raises:
            CheckpointError: it cannot be written.
        """
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, {**asdict(self), "packing_pays": self.packing_pays, "made_by": provenance()})


def load_times(path: Path) -> LayerTimes:
    """Read what `skipit bench` has written.

    Raises:
        CheckpointError: it is damaged.
    """
    values = load_json(path)
    try:
        known = {name: values[name] for name in ("device", "dtype", "hidden", "linear", "clock")}
        dense = {int(tokens): float(ms) for tokens, ms in values["dense"].items()}
        steps = {int(tokens): StepTime(**step) for tokens, step in values["steps"].items()}
        return LayerTimes(**known, dense=dense, rows=tuple(LayerTime(**row) for row in values["rows"]), steps=steps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what `skipit bench` writes: {error!r}. Run it again.") from error


def times_for(costs: CostModel, hidden: int) -> LayerTimes:
    """What was measured on this machine of layers such as a model's.

    Args:
        costs: of the model's layers.
        hidden: width of its states.

    Raises:
        InputError: nothing, or of other layers as wide as these.
        CheckpointError: it is damaged.
    """
    layers, device = costs.layers, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Costs do not say in what dtype a model is, but what its keys and values take.
    of_size = [d for d in dtypes if any(_element_size(layer, hidden) == d.itemsize for layer in layers)]
    path = next((p for p in (bench_file(device, dtype, hidden) for dtype in of_size) if p.is_file()), None)
    if path is None:
        raise InputError(
            f"`latency`: nothing was measured of layers {hidden} wide on this machine, which takes less than a minute: "
            "`skipit bench MODEL`."
        )
    times = load_times(path)
    if not any(abs(layer.linear / times.linear - 1) < 0.01 for layer in layers):
        raise InputError(
            f"`latency`: {path} is of layers that spend {times.linear:g} FLOPs per token, this model's spend "
            f"{layers[0].linear:g}. Measure them: `skipit bench MODEL`."
        )
    return times


def _element_size(layer: LayerCost, hidden: int) -> int:
    values = layer.keys_values / (2 * hidden)  # numbers of a token in the cache, keys and values
    return round(layer.kv_bytes / values) if values else 0
