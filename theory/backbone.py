"""Redundancy of any stack of layers: vision encoders, text encoders, decoders of any attention pattern.

Geometric and proximal redundancy and the relative update ask only for a token's state before and after a layer, so they
transfer to every residual network without change. Cross-attention and the damage do not: an encoder has no answer, and
a single modality nothing to attend across.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from skipit.router.errors import DecoderNotFoundError, InputError, short
from skipit.router.modality import MODALITIES

from .identity import fingerprint
from .inputs import to_model
from .measuring import evaluating
from .redundancy import Redundancy
from .states import LayerRun, watching

# What only a decoder over text and vision has, by the name of its table in a profile, and why a stack has none.
MISSING = {
    "var_text": "cross-attention needs text queries and vision keys in one sequence",
    "var_last": "cross-attention needs text queries and vision keys in one sequence",
    "damage_retain": "damage is measured on answer tokens, which only a decoder with labels has",
    "damage_evict": "damage is measured on answer tokens, which only a decoder with labels has",
}


@dataclass(frozen=True)
class Backbone:
    """What was measured about a stack of layers.

    Attributes:
        redundancy: [layers, modalities]; NaN in the column of the modality that was not there.
        modality: of its tokens, "text" or "vision".
        layers: path of the stack in its model.
        rows: inputs measured: images, or texts.
        model: fingerprint of the stack.
    """

    redundancy: Redundancy
    modality: str
    layers: str
    rows: int
    model: str

    def table(self, name: str) -> Tensor:
        """One value per layer, such as `geometric`, `angle`, `update`, `count`; `histogram` has one row per layer.

        Raises:
            InputError: the notion does not exist for a single stack, or there is no such table.
        """
        if name in MISSING:
            raise InputError(
                f"`{name}` does not exist for the {self.modality} stack `{self.layers}`: {MISSING[name]}. "
                "Profile a vision-language decoder with `skipit.profile`."
            )
        known = list(vars(self.redundancy))
        if name not in known:
            raise InputError(f"`name` is {short(name)}, expected one of {', '.join(known)}.")
        table: Tensor = getattr(self.redundancy, name)
        return table[:, MODALITIES.index(self.modality)]


@torch.no_grad()
def profile_backbone(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], modality: str, *, layers: str | None = None
) -> Backbone:
    """Measure the redundancy of a stack of layers, in one forward pass per batch.

    Args:
        model: any model that runs the stack; the whole vision-language model to measure its vision tower, of which
            then the tower alone runs.
        batches: its inputs; pads are told by `attention_mask`, where it covers the stack's tokens.
        modality: of the stack's tokens, "text" or "vision".
        layers: dotted path of the stack; by default that of `find_part`.

    Raises:
        DecoderNotFoundError: no such stack, or several; the message lists what there is.
        InputError: no batch, or an unknown modality.
    """
    if modality not in MODALITIES:
        raise InputError(f"`modality` is {short(modality)}, expected one of {', '.join(MODALITIES)}.")
    path, stack = find_part(model, modality, layers)
    run, accepted = _entry(model, modality)
    # Imported here, because importing torchmetrics takes longer than importing torch.
    from .accumulate import RedundancyMetric

    metric = RedundancyMetric(len(stack))
    metric.to(next(model.parameters()).device)
    column, rows = MODALITIES.index(modality), 0
    current: dict[str, Tensor] = {}

    def add(layer: LayerRun) -> None:
        before, after = layer.entered, layer.left
        if before.dim() == 2:  # some encoders run all images as one sequence
            before, after = before[None], after[None]
        metric.update(layer.index, before, after, _kinds(before, column, current.get("attention_mask")))

    with evaluating(model), watching(stack, add):
        for batch in batches:
            current = to_model({key: value for key, value in batch.items() if key in (accepted or batch)}, model)
            if not current:  # no image in these rows
                continue
            # Some towers get the patches of all images side by side, and beside them one line per image.
            rows += min(map(len, current.values()))
            run(**current)
    if rows == 0:
        what = "image" if modality == "vision" else "batch"
        raise InputError(f"the profile got no {what}; expected at least one.")
    redundancy: Redundancy = metric.cpu().compute()
    return Backbone(redundancy, modality, path, rows, fingerprint(model, path))


def find_part(model: nn.Module, modality: str, layers: str | None = None) -> tuple[str, nn.ModuleList]:
    """The layers of a model's encoder of one modality, as transformers names it, or of a model that is one.

    Raises:
        DecoderNotFoundError: there is no such stack, or more than one to choose from.
    """
    lookup = getattr(model, "get_encoder", None)
    if layers is not None or lookup is None:
        return find_stack(model, layers)
    encoder = lookup("image") if modality == "vision" else lookup()
    return find_stack(model, None, next(name for name, module in model.named_modules() if module is encoder))


def _entry(model: nn.Module, modality: str) -> tuple[Callable[..., Any], set[str]]:
    """What runs the encoder of a modality and not the rest of the model, where it can, and the arguments it takes."""
    name = "get_image_features" if modality == "vision" else "get_text_features"
    run = getattr(model, name, model)
    return run, set(inspect.signature(run.forward if run is model else run).parameters) - {"labels", "kwargs", "args"}


def find_stack(model: nn.Module, layers: str | None = None, within: str = "") -> tuple[str, nn.ModuleList]:
    """The list of layers at a path, or the only list of two or more layers of one class inside the module `within`.

    Raises:
        DecoderNotFoundError: there is none, or more than one to choose from.
    """
    inside = f"{within}." if within else ""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.startswith(inside)}
    if layers is not None and layers in lists:
        return layers, lists[layers]
    stacks = {n: m for n, m in lists.items() if len(m) > 1 and len({type(layer) for layer in m}) == 1}
    # A list inside another's layers is a part of them.
    outer = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks)}
    if layers is None and len(outer) == 1:
        return next(iter(outer.items()))
    described = ", ".join(f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in outer.items())
    wanted = f"no layers at `layers={layers!r}`" if layers else "not exactly one stack of layers"
    raise DecoderNotFoundError(
        f"{wanted} in `{type(model).__name__}`. Stacks found: {described or 'none'}. Name one with `layers`."
    )


def _kinds(states: Tensor, column: int, mask: Tensor | None) -> Int[Tensor, "batch seq"]:
    kinds = torch.full(states.shape[:2], column, device=states.device)
    if mask is not None and mask.shape == kinds.shape:
        kinds = kinds.masked_fill(mask.to(kinds.device) == 0, -1)
    return kinds
