"""What a run of gated layers really cost in floating-point operations, and what the dense decoder would have.

The formulas are checked against torch's own FLOP counter in the tests; what is counted is said in `router/costs.py`.

A cross-attention layer has no keys from tokens. Each of its tokens sees all image states of its row, those that a mask
hides too; to skip it leaves no key behind; and the keys and values of the images themselves are made once, whatever
tokens do: the tokens of the call in which that happens share it evenly. Without images there is no such layer.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import MODALITIES, Step
from skipit.router.call import NO_IMAGES, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.router.costs import LayerCost, layer_costs
from skipit.router.decoder import find_decoder, image_layers


class Costs(Protocol):
    """What tokens spend in every layer: FLOPs by a `CostModel`, or milliseconds by a `TimeModel`."""

    @property
    def depth(self) -> int:
        """How many layers there are."""
        ...

    def spend(
        self,
        run: Float[Tensor, "layers batch seq"],
        real: Bool[Tensor, "batch seq"],
        kv: KVPolicy,
        held: Float[Tensor, "layers batch"] | None = None,
        seen: Float[Tensor, " batch"] | None = None,
        unit: Unit = "block",
        images: ImageStates = NO_IMAGES,
    ) -> tuple[Float[Tensor, "layers batch seq"], Float[Tensor, "layers batch seq"]]:
        """What every token of one call spends: executed, and in the dense decoder; see `CostModel.spend`."""
        ...


@dataclass(frozen=True)
class CostModel:
    """The cost of every decoder layer, in order."""

    layers: tuple[LayerCost, ...]

    @classmethod
    def of(cls, model: nn.Module, layers: str | None = None) -> "CostModel":
        """Read the costs off a model's modules; works on the meta device, and with or without gates attached.

        Raises:
            UnsupportedModelError: a layer has no attention whose heads can be read off.
        """
        _, decoder, found = find_decoder(model, layers)
        return cls(layer_costs(found, int(decoder.config.hidden_size), image_layers(decoder.config)))  # type: ignore[union-attr, arg-type]

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for an artefact."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_json(cls, values: list[dict[str, Any]]) -> "CostModel":
        """Undo `to_json`."""
        return cls(tuple(LayerCost(**layer) for layer in values))

    def column(self, name: str) -> Tensor:
        """One attribute of all layers, fp64 [layers]."""
        return torch.tensor([getattr(layer, name) for layer in self.layers], dtype=torch.float64)

    def saving(self, keys: Float[Tensor, "layers modality"], kv: KVPolicy) -> Float[Tensor, "layers modality"]:
        """FLOPs that one skipped token saves, per unit, when it would have seen `keys` keys on average."""
        saved = self.column("linear")[:, None] + self.column("attention")[:, None] * keys
        return saved - self.column("keys_values")[:, None] if kv == "retain" else saved

    def dense(self, tokens: Float[Tensor, "layers modality"], keys: Float[Tensor, "layers modality"]) -> float:
        """FLOPs of the dense decoder for a row with so many tokens of each unit, which see `keys` keys on average."""
        images = self.column("image") * keys.amax(-1)
        return float((tokens * self.saving(keys, "evict")).sum() + images.sum())

    def spend(
        self,
        run: Float[Tensor, "layers batch seq"],
        real: Bool[Tensor, "batch seq"],
        kv: KVPolicy,
        held: Float[Tensor, "layers batch"] | None = None,
        seen: Float[Tensor, " batch"] | None = None,
        unit: Unit = "block",
        images: ImageStates = NO_IMAGES,
    ) -> tuple[Float[Tensor, "layers batch seq"], Float[Tensor, "layers batch seq"]]:
        """FLOPs of every token in every layer in one call of the model: executed, and those of the dense decoder.

        Args:
            run: 1 where a token runs a layer, 0 where it skips; may be soft (the FLOPs are then the expected ones of
                independent decisions), and carry a gradient.
            real: False at padding.
            kv: what skipped tokens leave behind.
            held: keys per layer and row from earlier calls; None is none.
            seen: real tokens per row from earlier calls; None is none.
            unit: what a token skips.
            images: what cross-attention layers attend to.
        """
        names = ("linear", "attention", "keys_values", "mlp", "gate", "image")
        linear, pair, kept, mlp, gate, image = (self.column(name).to(run)[:, None, None] for name in names)
        run, tokens = run * real, real.to(run.dtype)
        everything = tokens.cumsum(-1) if seen is None else tokens.cumsum(-1) + seen[:, None]
        # Where keys are evicted, a token that runs sees itself in full; a soft gate weighs the keys of others.
        others = run.cumsum(-1) - run + (0 if held is None else held[..., None])
        everything = torch.where(image > 0, images.held, everything)
        keys = everything if kv == "retain" or unit == "mlp" else torch.where(image > 0, images.held, others + 1)
        shared = image * images.new * tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
        if not images.held:
            run, tokens = run * (image == 0), tokens * (image == 0)
        dense = tokens * linear + tokens * pair * everything
        if unit == "mlp":
            executed = dense - (tokens - run) * mlp
        else:
            executed = run * (linear + pair * keys)
            if kv == "retain":
                executed = executed + (tokens - run) * kept
            if unit == "attention":
                executed = executed + (tokens - run) * mlp
        return executed + gate * tokens + shared, dense + shared


@dataclass
class Compute:
    """FLOPs (or time) by unit, [layers, modalities], summed over tokens."""

    executed: Tensor
    dense: Tensor

    @property
    def share(self) -> Tensor:
        """Executed over dense FLOPs of the whole decoder, a scalar; above 0, at most 1 plus the gates' own cost."""
        return self.executed.sum() / self.dense.sum()


def trace_compute(costs: Costs, steps: list[Step]) -> Compute:
    """FLOPs of a prefill and the decoding steps after it, from what ran in each.

    Args:
        costs: of this model's layers.
        steps: of one trace, one generation; a step whose `past` is 0 begins a new one.
    """
    executed, dense = (
        torch.stack([_by_modality(values, step.modality) for step, values in zip(steps, every, strict=True)]).sum(0)
        for every in trace_flops(costs, steps)
    )
    return Compute(executed, dense)


def total_of(steps: Iterable[Step], costs: Costs) -> tuple[float, float]:
    """What steps that are each a whole input executed, and what the dense decoder spends on them."""
    found = [trace_compute(costs, [step]) for step in steps]
    return float(sum(c.executed.sum() for c in found)), float(sum(c.dense.sum() for c in found))


def share_of(steps: Iterable[Step], costs: Costs) -> float:
    """Executed share of what the dense decoder spends, over steps that are each a whole input."""
    executed, dense = total_of(steps, costs)
    return executed / dense


def trace_flops(costs: Costs, steps: list[Step]) -> tuple[list[Tensor], list[Tensor]]:
    """FLOPs of every token in every layer, executed and dense, [layers, batch, seq] for each step of a trace.

    Raises:
        ValueError: there are no steps.
    """
    if not steps:
        raise ValueError("`steps`: got none; run the model inside `with running(trace=trace)`.")
    executed: list[Tensor] = []
    dense: list[Tensor] = []
    held = seen = None
    for step in steps:
        if step.past == 0:
            held = seen = None
        run = step.run.double()
        spent, full = costs.spend(run, step.real, step.kv, held, seen, step.unit, step.images)
        executed.append(spent if step.decided else full)
        dense.append(full)
        kept = run if step.kv == "evict" and step.unit != "mlp" else step.real.double().expand_as(run)
        held = kept.sum(-1) if held is None else held + kept.sum(-1)
        seen = step.real.double().sum(-1) if seen is None else seen + step.real.double().sum(-1)
    return executed, dense


def _by_modality(values: Tensor, modality: Tensor) -> Tensor:
    flat = values.flatten(1)
    out = flat.new_zeros(len(flat), len(MODALITIES))
    return out.index_add(1, modality.flatten(), flat)
