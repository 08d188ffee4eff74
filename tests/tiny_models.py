"""Tiny random models of three very different families, and what they may be asked to skip."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import IMAGE, LAYERS, PAD, ROWS, WIDTH, build, inputs
from torch import Tensor

from skipit.router import Decision, FixedUnits, Gated, LayerByLayer, Policy, running, set_gates
from skipit.router.call import Call
from skipit.router.gates import TokenGate

__all__ = [
    "ANSWER",
    "FAMILIES",
    "IMAGE",
    "LAYERS",
    "PAD",
    "PATTERNS",
    "ROWS",
    "WIDTH",
    "TokenTable",
    "build",
    "inputs",
    "labelled",
    "logits",
    "same",
]

ANSWER = 3  # tokens of a labelled row
# Plain causal attention, M-RoPE with dynamic resolution, sliding windows with image tokens that see each other.
FAMILIES = ("llava", "qwen2.5-vl", "gemma3")


@dataclass(frozen=True)
class TokenTable(LayerByLayer):
    """Whether a token runs depends on the layer, its place among the row's tokens and its modality; on no gate."""

    run: Tensor  # bool [layers, places, modalities]

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        return Decision(self.run[layer, call.position.clamp(min=0) % self.run.shape[1], call.modality])


def _units(*run: tuple[int, int]) -> Callable[[Any], Policy]:
    """A fixed set of units: per layer, whether text and whether vision runs."""
    return lambda model: FixedUnits(torch.tensor(run, dtype=torch.bool))


def _random_table(model: Any) -> Policy:
    return TokenTable(torch.rand(LAYERS, 11, 2, generator=torch.Generator().manual_seed(3)) < 0.5)


def _random_gates(model: Any) -> Policy:
    """Real gates that run about half of the tokens, for reasons of the tokens' own."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(LAYERS, 2, WIDTH, generator=generator)
    set_gates(model, weight, torch.randn(LAYERS, 2, generator=generator))
    return Gated(0.0)


# What a gated model may be asked to skip; each makes a policy for a gated model.
PATTERNS: dict[str, Callable[[Any], Policy]] = {
    "first": _units((0, 0), (1, 1), (1, 1), (1, 1)),
    "last": _units((1, 1), (1, 1), (1, 1), (0, 0)),
    "all": _units((0, 0), (0, 0), (0, 0), (0, 0)),
    "units": _units((1, 0), (0, 1), (1, 1), (0, 0)),
    "tokens": _random_table,
    "gates": _random_gates,
}


def labelled(family: str, rows: Any = ROWS, padding: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A batch whose last tokens in every row are the answer."""
    batch = inputs(family, rows, padding, seed)
    real = batch["attention_mask"]
    left = real.flip(1).cumsum(1).flip(1)
    batch["labels"] = batch["input_ids"].masked_fill((real == 0) | (left > ANSWER), -100)
    return batch


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Logits of a forward pass, run as `options` say."""
    with running(**options):
        return model(**batch).logits


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal but for the order in which sums were taken."""
    return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())
