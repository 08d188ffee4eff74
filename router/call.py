"""What the layers of a model must know during one call, what is decided in it, and the record of what ran.

A `Call` travels with the keyword arguments of a forward call. Nothing is kept on a module, so interleaved generations,
threads and gradient checkpointing (which replays a layer with the same arguments) cannot mix calls up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .cache import SkipCache
from .config import Granularity, KVPolicy, Unit
from .errors import InputError
from .gates import Stacked, TokenGate
from .modality import MODALITIES
from .recorded import Recordings
from .stretch import Decision, Return, Stretch

Mode = Literal["masked", "gathered", "dense"]
Route = Literal["packed", "whole"]
KWARG = "skipit_call"
CAPACITY_STEP = 64  # tokens


class Policy(Protocol):
    """Decides, at a decision point, which tokens run the layers up to the next. Causal: a token's own past only.

    A policy that does not follow the router's decision points has an attribute `decide_at`, as `RouterConfig` has; one
    that has `skips_nothing`, and it is true, is not asked.
    """

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: "Call", gates: Sequence[TokenGate]
    ) -> Decision:
        """Decide for `layers`, stacked, from the states that enter the first of them; `gates` are theirs."""
        ...


class ImageStates(NamedTuple):
    """What a cross-attention layer attends to, per row: states of images, which are no tokens.

    Attributes:
        held: all there are in this call; 0 where there is no image, and the model leaves such layers out.
        new: those among them whose keys and values were made in this call.
    """

    held: int = 0
    new: int = 0


NO_IMAGES = ImageStates()


class Compiling(NamedTuple):
    """How layers are compiled.

    Attributes:
        options: of `torch.compile`; None where layers are recorded as they are.
        multiple: of which the number of tokens in a packed row is; None is 64, or 1 on a CPU.
        recordings: of layers; None where they are not recorded.
    """

    options: dict[str, Any] | None
    multiple: int | None = None
    recordings: Recordings | None = None


def image_states(kwargs: dict[str, Any], batch: int, seen: int = 0) -> ImageStates:
    """What a layer that attends to images attends to in a call, from its arguments and how many it has seen before."""
    states = kwargs.get("cross_attention_states")
    new = 0 if states is None else states.shape[:-1].numel() // batch
    return ImageStates(new + seen, new)


@dataclass
class Step:
    """A record of one call of the model (a prefill, or one decoding step): which token ran which layer.

    Attributes:
        modality: 0 text, 1 vision.
        real: False at padding.
        past: tokens per row already in the cache, padding counted.
        kv: what became of the keys and values of skipped tokens.
        unit: what they skipped.
        decisions: by layer index.
        layers: of the model; those without a decision were left out by the model itself, and no token ran them. 0
            stands for as many as have one.
        images: what cross-attention layers attend to.
        decided: False where nothing could be skipped, and no gate was asked.
    """

    modality: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    past: int
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    decisions: dict[int, Decision] = field(default_factory=dict)
    layers: int = 0
    images: ImageStates = NO_IMAGES
    decided: bool = True

    @property
    def run(self) -> Bool[Tensor, "layers batch seq"]:
        """Which token ran which layer; False at padding."""
        return torch.stack([decision.run.to(self.real.device) for decision in self._ordered()]) & self.real

    @property
    def probability(self) -> Float[Tensor, "layers batch seq"]:
        """The gates' run probabilities, fp32 with gradient; a fixed decision counts as 0 or 1."""
        every = [d.run.float() if d.probability is None else d.probability for d in self._ordered()]
        return torch.stack([probability.to(self.real.device) for probability in every])

    def detached(self) -> "Step":
        """The same without what probabilities were made of, to be kept after the gradients."""
        decisions = {layer: decision.detached() for layer, decision in self.decisions.items()}
        return replace(self, decisions=decisions)

    def _ordered(self) -> list[Decision]:
        absent = Decision(torch.zeros_like(self.real))
        return [self.decisions.get(layer, absent) for layer in range(self.layers or len(self.decisions))]


@dataclass
class Trace:
    """The steps of the calls made while the trace was active, in order."""

    steps: list[Step] = field(default_factory=list)

    def check_one_pass(self, end: int) -> None:
        """Refuse steps that are not one prompt and the tokens after it, each of which was run once.

        Args:
            end: tokens per row that had to be run: those of the prompt, and the generated ones but for the last.

        Raises:
            InputError: says so.
        """
        after = [(step.past, len(step.real)) for step in self.steps[1:]] + [(end, len(self.steps[-1].real))]
        for step, next_one in zip(self.steps, after, strict=True):
            if next_one != (step.past + step.real.shape[1], len(step.real)):
                raise InputError(
                    "a trace has one entry per token, but tokens were run more than once while generating: with beams, "
                    "prompt lookup, an assistant, guidance, or `use_cache=False`. Leave that out, or read the steps of "
                    "`running(trace=...)` one by one."
                )


class Dense(NamedTuple):
    """In the place of a `Call`: every token runs every layer, and nothing is decided.

    Attributes:
        compiling: how layers are compiled; None where they are not.
        step: where that is recorded, or None.
    """

    compiling: Compiling | None = None
    step: Step | None = None

    def record(self, layer: int) -> None:
        """Put down in the step that all tokens run a layer."""
        assert self.step is not None
        self.step.decisions.setdefault(layer, Decision(self.step.real))


@dataclass(frozen=True)
class Call:
    """One forward call of a gated model.

    Attributes:
        policy: decides which token runs which layer.
        points: layers at which it does.
        gates: of all layers.
        kv: what becomes of the keys and values of skipped tokens.
        unit: what a token skips.
        granularity: who decides.
        mode: `masked` computes every token and discards; `gathered` computes only the tokens that run.
        route: by which gathered execution runs a layer under `retain`; None is the faster one.
        compiling: how layers are compiled in gathered execution; None where they are not.
        capacity: of each layer, the share of a prompt's tokens that may run it; None is no limit.
        adapted: whether adapters are in the model, which may be others when the cache is read.
        modality: 0 text, 1 vision.
        real: False at padding.
        prompt: the tokens that decide for their row under `sequence`.
        seen: where there is padding or was, False at it, for all tokens so far.
        past: tokens per row already in the cache, padding counted.
        cache: of keys and values, and of what a prompt has decided; or None.
        step: where decisions are recorded, or None.
        learning: whether it was made with gradients.
        held: parameters of gates, kept together for as long as `generate` runs.
        stretches: of the layers that have been decided.
    """

    policy: Policy
    points: tuple[int, ...]
    gates: Sequence[TokenGate]
    kv: KVPolicy
    unit: Unit
    granularity: Granularity
    mode: Mode
    route: Route | None
    compiling: Compiling | None
    capacity: tuple[float, ...] | None
    adapted: bool
    modality: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    prompt: Bool[Tensor, "batch seq"]
    seen: Bool[Tensor, "batch all"] | None
    past: int
    cache: SkipCache | None
    step: Step | None
    learning: bool
    held: dict[nn.Module, Stacked] | None = None
    stretches: dict[int, Stretch] = field(default_factory=dict)

    @cached_property
    def position(self) -> Int[Tensor, "batch seq"]:
        """How many real tokens of the row come before each; the same however it is padded."""
        length = self.real.shape[1]
        if self.seen is None:
            return torch.arange(self.past, self.past + length, device=self.real.device).expand(len(self.real), -1)
        return self.seen.cumsum(-1)[:, -length:] - 1

    def decision(self, layer: int) -> Decision:
        """Which tokens run a layer."""
        stretch = self.stretches[layer]
        return stretch.decision.of(layer - stretch.first)

    def decide(
        self, layer: int, hidden: Float[Tensor, "batch seq dim"], replayed: bool
    ) -> Float[Tensor, "batch seq dim"]:
        """Decide for the layers from here to the next decision point.

        A decision point that the model leaves out, as Mllama does without images, is made up for by the next layer: the
        states are the same.

        Args:
            layer: that is about to run, and has not been decided.
            hidden: what enters it.
            replayed: whether reentrant checkpointing will run the layer again, for its gradients.

        Returns:
            What enters the layer.

        Raises:
            InputError: gates learn, and are run without gradients.
        """
        layers = range(layer, next((point for point in self.points if point > layer), len(self.gates)))
        call = self if self.real.device == hidden.device else self._on(hidden.device)
        decision = recorded = self.policy.decide(layers, hidden, call, self.gates[layers.start : layers.stop])
        bounds = None
        if self.capacity is not None and self.past == 0:
            decision, bounds = self._within(self.capacity[layers.start : layers.stop], decision, call.real)
            recorded = decision
        if self.learning and not torch.is_grad_enabled() and self._learns(layers):
            raise InputError(
                "gates get no gradient from checkpoints around decoder layers that are reentrant. Use the model's own "
                "`gradient_checkpointing_enable()`, or checkpoints with use_reentrant=False."
            )
        if replayed and decision.straight_through() is not None:
            copy = decision.probability.detach().requires_grad_()  # type: ignore[union-attr]
            hidden, decision = Return.apply(hidden, decision.probability, copy), Decision(decision.run, copy)
        self.stretches.update(dict.fromkeys(layers, Stretch(layer, decision, call.real, recorded, bounds, self.past)))
        return hidden

    def record(self, layer: int) -> None:
        """Put down in the step what was decided for a layer."""
        stretch = self.stretches[layer]
        assert self.step is not None
        self.step.decisions.setdefault(layer, stretch.recorded.of(layer - stretch.first))

    @staticmethod
    def _within(
        shares: tuple[float, ...], decision: Decision, real: Bool[Tensor, "batch seq"]
    ) -> tuple[Decision, tuple[int, ...]]:
        """A decision of which no row exceeds its share, rounded up to whole steps; and what no row can exceed."""
        share = torch.tensor(shares, dtype=torch.float64, device=real.device)[:, None]
        most = (share * real.sum(-1) / CAPACITY_STEP).ceil() * CAPACITY_STEP
        bounds = (ceil(share * real.shape[1] / CAPACITY_STEP) * CAPACITY_STEP for share in shares)
        return decision.within(real, most), tuple(bounds)

    def _learns(self, layers: range) -> bool:
        return any(p.requires_grad for gate in self.gates[layers.start : layers.stop] for p in gate.parameters())

    def _on(self, device: torch.device) -> "Call":
        moved = {name: getattr(self, name).to(device) for name in ("modality", "real", "prompt")}
        return replace(self, **moved, seen=None if self.seen is None else self.seen.to(device))

    def pooled(self, layers: range, logits: Float[Tensor, "layers batch seq"]) -> Float[Tensor, "layers batch seq"]:
        """Logits of every token replaced by their mean over the prompt's tokens of row and modality.

        What a prompt has decided is kept in the cache and holds for the tokens after it. A token of a modality that no
        prompt has had decides for itself.
        """
        chosen = F.one_hot(self.modality, len(MODALITIES)) * self.prompt[..., None]
        count = chosen.sum(1)
        means = (logits[..., None] * chosen).sum(2) / count.clamp(min=1)
        known = (count > 0).expand_as(means)
        if self.cache is not None:
            held = self.cache.layers[layers.start : layers.stop]
            if self.past > 0:  # what earlier calls have decided
                new = torch.full_like(means[0], torch.nan)
                decided = torch.stack([new if layer.decided is None else layer.decided.to(new) for layer in held])
                means, known = torch.where(decided.isnan(), means, decided), known | ~decided.isnan()
            for layer, values in zip(held, means.masked_fill(~known, torch.nan), strict=True):
                layer.decided = values
        modality = self.modality.expand(len(layers), -1, -1)
        return torch.where(known.gather(2, modality), means.gather(2, modality), logits)
