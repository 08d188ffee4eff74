"""What the layers of a model must know during one call, what is decided in it, and the record of what ran.

A `Call` travels with the keyword arguments of a forward call. Nothing is kept on a module, so interleaved generations,
threads and gradient checkpointing (which replays a layer with the same arguments) cannot mix calls up.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attention import Layout
from .cache import SkipCache, SkipCacheLayer
from .config import Granularity, KVPolicy, Unit
from .errors import InputError
from .gates import TokenGate
from .modality import MODALITIES

Mode = Literal["masked", "gathered", "dense"]
KWARG = "skipit_call"
DENSE: Mode = "dense"  # what stands in the place of a `Call` where every layer runs for every token


class Decision(NamedTuple):
    """What a policy decides about the tokens of one layer.

    Attributes:
        run: True where the token runs the layer.
        probability: fp32 with gradient, for straight-through training; None for fixed decisions.
    """

    run: Bool[Tensor, "batch seq"]
    probability: Float[Tensor, "batch seq"] | None = None

    def straight_through(self) -> Float[Tensor, "batch seq"] | None:
        """1 where a token runs, 0 where it skips, with the probability's gradient; None where there is no gradient."""
        if self.probability is None or not (torch.is_grad_enabled() and self.probability.requires_grad):
            return None
        return self.run + (self.probability - self.probability.detach())


class Policy(Protocol):
    """Decides, before a layer runs, which tokens run it. Deterministic, and causal: a token's own past only."""

    def decide(self, layer: int, hidden: Float[Tensor, "batch seq dim"], call: "Call", gate: TokenGate) -> Decision:
        """Decide for the states that enter `layer`."""
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


def image_states(kwargs: dict[str, Any], batch: int, store: SkipCacheLayer | None = None) -> ImageStates:
    """What a layer that attends to images attends to in a call, from its arguments and before it has run."""
    states = kwargs.get("cross_attention_states")
    new = 0 if states is None else states.shape[:-1].numel() // batch
    return ImageStates(new + (0 if store is None else store.get_seq_length()), new)


@dataclass
class Step:
    """A record of one call of the model (a prefill, or one decoding step): which token ran which layer.

    Attributes:
        modality: 0 text, 1 vision.
        real: False at padding.
        past: tokens per row already in the cache, padding counted.
        kv: what became of the keys and values of skipped tokens.
        unit: what they skipped.
        decisions: by layer index; the first one counts when gradient checkpointing replays a layer.
        layers: of the model; those without a decision were left out by the model itself, and no token ran them. 0
            stands for as many as have one.
        images: what cross-attention layers attend to.
        detached: layers decided without the gradients that the call has: reentrant checkpointing runs them so at first.
    """

    modality: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    past: int
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    decisions: dict[int, Decision] = field(default_factory=dict)
    layers: int = 0
    images: ImageStates = NO_IMAGES
    detached: bool = False

    @property
    def run(self) -> Bool[Tensor, "layers batch seq"]:
        """Which token ran which layer; False at padding."""
        return torch.stack([decision.run.to(self.real.device) for decision in self._ordered()]) & self.real

    @property
    def probability(self) -> Float[Tensor, "layers batch seq"]:
        """The gates' run probabilities, fp32 with gradient; a fixed decision counts as 0 or 1.

        Raises:
            InputError: a gradient is wanted, and reentrant checkpointing has left none.
        """
        if self.detached and torch.is_grad_enabled():
            raise InputError(
                "the gates' probabilities have no gradient under reentrant gradient checkpointing. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or read them under `torch.no_grad()`.'
            )
        every = [d.run.float() if d.probability is None else d.probability for d in self._ordered()]
        return torch.stack([probability.to(self.real.device) for probability in every])

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


@dataclass(frozen=True)
class Call:
    """One forward call of a gated model.

    Attributes:
        policy: decides which token runs which layer.
        kv: what becomes of the keys and values of skipped tokens.
        unit: what a token skips.
        granularity: who decides.
        mode: `masked` computes every token and discards; `gathered` computes only the tokens that run.
        modality: 0 text, 1 vision.
        real: False at padding.
        prompt: the tokens that decide for their row under `sequence`.
        position: how many real tokens of the row come before; the same however it is padded.
        past: tokens per row already in the cache, padding counted.
        tokens: how many are real, over all rows.
        cache: of keys and values, and of what a prompt has decided; or None.
        step: where decisions are recorded, or None.
        learning: whether it was made with gradients.
    """

    policy: Policy
    kv: KVPolicy
    unit: Unit
    granularity: Granularity
    mode: Mode
    modality: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    prompt: Bool[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    past: int
    tokens: int
    cache: SkipCache | None
    step: Step | None
    learning: bool

    def to(self, device: torch.device) -> "Call":
        """The call with its tensors on a device: the layers of a model may be spread over several."""
        if self.real.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("modality", "real", "prompt", "position")}
        return replace(self, **moved)

    @cached_property
    def padded(self) -> Layout | None:
        """Where the real tokens are, the same for every layer; None where there is no padding."""
        return Layout.of(self.real) if self.tokens < self.real.numel() else None

    def pooled(self, layer: int, logits: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Logits of every token replaced by their mean over the prompt's tokens of row and modality.

        What a prompt has decided is kept in the cache and holds for the tokens after it. A token of a modality that no
        prompt has had decides for itself.
        """
        chosen = F.one_hot(self.modality, len(MODALITIES)) * self.prompt[..., None]
        count = chosen.sum(1)
        means, known = (logits[..., None] * chosen).sum(1) / count.clamp(min=1), count > 0
        if self.cache is not None:
            held = self.cache.layers[layer]
            if held.decided is not None and self.past > 0:  # of earlier calls; gradient checkpointing replays this one
                earlier = ~held.decided.isnan()
                means, known = torch.where(earlier, held.decided, means), known | earlier
            held.decided = means.masked_fill(~known, torch.nan)
        return torch.where(known.gather(1, self.modality), means.gather(1, self.modality), logits)
