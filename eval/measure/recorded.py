"""What a model did with single rows: what it answered, how sure it was, and what it ran for every token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.router import InputError, Step
from skipit.router.call import NO_IMAGES, ImageStates
from skipit.router.config import KVPolicy, Unit
from skipit.theory.cost import CostModel

STRATA = ("text", "vision", "answer")

Row = Mapping[str, Any]
Kinds = Callable[[Sequence[Row], dict[str, Tensor]], Mapping[str, Bool[Tensor, "batch seq"]]]
"""From some rows and their inputs to kinds of their tokens, by name."""


@dataclass(frozen=True)
class Record:
    """What ran for the rows of one batch, prompt and answer side by side.

    Attributes:
        run: whether a token ran a layer; False at padding.
        stratum: 0 prompt text, 1 vision, 2 answer: an index of `STRATA`.
        real: False at padding.
        kinds: tokens by name of their kind; a token may have several or none. Pads do not count.
        kv: what skipped tokens leave behind.
        unit: what a token skips.
        images: what cross-attention layers attend to.
        decided: False where nothing could be skipped, and no gate was asked.
    """

    run: Bool[Tensor, "layers batch seq"]
    stratum: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    kinds: Mapping[str, Bool[Tensor, "batch seq"]] = field(default_factory=dict)
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    images: ImageStates = NO_IMAGES
    decided: bool = True

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        answer: Bool[Tensor, "batch seq"] | None = None,
        kinds: Mapping[str, Bool[Tensor, "batch seq"]] | None = None,
    ) -> "Record":
        """Join the steps of one call: a whole input, or a prefill and the decoding steps after it.

        Args:
            steps: of one trace; rows that ended earlier than others should have been left out by
                `skipit.eval.measure.runner.leave_out_finished`.
            answer: which tokens of the first step are an answer (a whole input with labels); all later ones are.
            kinds: of the first step's tokens, by name.

        Raises:
            InputError: no steps, more than one generation, or a mask of another shape than the first step.
        """
        if not steps or any(step.past == 0 for step in steps[1:]):
            raise InputError(
                f"`steps`: got {len(steps)} steps of {sum(step.past == 0 for step in steps)} calls, expected those of "
                "one: a prefill and what was decoded after it. Record each batch with a trace of its own."
            )
        first = steps[0]
        for name, mask in {"answer": answer, **(kinds or {})}.items():
            if mask is not None and mask.shape != first.real.shape:
                raise InputError(
                    f"`{name}`: got a mask of shape {tuple(mask.shape)}, expected {tuple(first.real.shape)}, that of "
                    "the first step's tokens (padding counted)."
                )
        stratum = first.modality if answer is None else first.modality.masked_fill(answer, 2)
        later = [torch.full_like(step.modality, 2) for step in steps[1:]]
        decoded = sum(step.real.shape[1] for step in steps[1:])
        return cls(
            torch.cat([step.run for step in steps], -1).cpu(),
            torch.cat([stratum, *later], -1).cpu(),
            torch.cat([step.real for step in steps], -1).cpu(),
            {name: torch.nn.functional.pad(mask.cpu(), (0, decoded)) for name, mask in (kinds or {}).items()},
            first.kv,
            first.unit,
            first.images,
            any(step.decided for step in steps),
        )

    def flops(
        self, costs: CostModel, run: Float[Tensor, "layers batch seq"] | None = None
    ) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
        """FLOPs per token over all layers, executed and dense; `run` may be another, soft one (rates)."""
        run = self.run.double() if run is None else run
        spent, full = costs.spend(run, self.real, self.kv, unit=self.unit, images=self.images)
        return (spent if self.decided else full).sum(0), full.sum(0)


@dataclass(frozen=True)
class Recorded:
    """What a model did with some rows.

    Attributes:
        answers: generated text, one per row.
        right: whether each is the row's answer; of ten humans' answers, whether two or more gave it.
        log_probability: of the generated tokens up to the end of the answer and with it, given those before: log of the
            probability that this very answer would be drawn, in nats, at most 0.
        tokens: how many they are.
        records: what ran, batch by batch; none for a dense run, where everything does.
    """

    answers: list[str]
    right: Bool[Tensor, " rows"]
    log_probability: Float[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    records: list[Record]

    @property
    def product(self) -> Float[Tensor, " rows"]:
        """The probability of each answer as a whole, in [0, 1]: what should be the chance that it is right."""
        return self.log_probability.exp()

    @property
    def mean(self) -> Float[Tensor, " rows"]:
        """The geometric mean of the probabilities of an answer's tokens, in [0, 1]: long answers are not penalized."""
        return (self.log_probability / self.tokens).exp()
