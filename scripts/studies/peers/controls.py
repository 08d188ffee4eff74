"""Random controls of what was learned: the same model skips as much, but not the same."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipit.router import MODALITIES, Step
from studies.answers import answers

from .lab import System
from .policies import FixedMask, over_layers, over_rows, over_tokens


class Control(NamedTuple):
    """A way to shuffle the decisions of a step, [layers, batch, seq], by a seed."""

    name: str
    shuffle: Callable[[Step, int], Tensor]


def _within(step: Step, seed: int) -> Tensor:
    """A step's decisions, shuffled over the tokens of each modality."""
    places = [step.real & (step.modality == modality) for modality in range(len(MODALITIES))]
    parts = [over_tokens(step.run & here, here, seed) for here in places]
    return torch.stack(parts).any(0)


OVER_TOKENS = Control("permuted over tokens", lambda step, seed: over_tokens(step.run, step.real, seed))
WITHIN = Control("permuted over tokens of a modality", _within)
OVER_LAYERS = Control("permuted over layers", lambda step, seed: over_layers(step.run, seed))
OVER_ROWS = Control("permuted over rows", lambda step, seed: over_rows(step.run, step.real, seed))


def controlled(learned: System, control: Control, seed: int) -> System:
    """A learned system whose decisions on every batch are shuffled."""

    def options(batch: dict[str, Tensor]) -> Mapping[str, Any]:
        given = learned.options(batch)
        step = answers(learned.model, [batch], learned.options).steps[0]
        return {**given, "policy": FixedMask(control.shuffle(step, seed))}

    return replace(learned, options=options, timed=False)
