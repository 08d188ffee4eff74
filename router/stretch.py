"""What is decided at one decision point: for every layer up to the next point, which tokens run it.

The device is asked once, how many; the places of all of them are then found for all layers together.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .attention import SPAN
from .layout import Layout, Places


class Decision(NamedTuple):
    """What a policy decides about the tokens of one layer, or of several, stacked.

    Attributes:
        run: True where the token runs the layer.
        probability: fp32 with gradient, for straight-through training; None for fixed decisions.
        score: which of too many tokens run, the highest ones; None where it does not matter which.
    """

    run: Bool[Tensor, "*layers batch seq"]
    probability: Float[Tensor, "*layers batch seq"] | None = None
    score: Float[Tensor, "*layers batch seq"] | None = None

    def straight_through(self) -> Float[Tensor, "*layers batch seq"] | None:
        """1 where a token runs, 0 where it skips, with the probability's gradient; None where there is no gradient."""
        if self.probability is None or not (torch.is_grad_enabled() and self.probability.requires_grad):
            return None
        return self.run + (self.probability - self.probability.detach())

    def detached(self) -> "Decision":
        """That without a gradient."""
        return Decision(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]

    def of(self, layer: int) -> "Decision":
        """That of one of several layers."""
        return Decision(*(None if part is None else part[layer] for part in self))  # type: ignore[arg-type]

    def within(self, real: Bool[Tensor, "batch seq"], most: Float[Tensor, "layers batch"]) -> "Decision":
        """The same, but of every row at most so many tokens: those of the highest scores, of equal ones the first.

        Args:
            real: False at padding.
            most: tokens of each row that may run.
        """
        score, run = self.run.float() if self.score is None else self.score, self.run & real
        order = score.masked_fill(~run, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return self._replace(run=run & (order.argsort(dim=-1) < most[..., None]))


class Packing(NamedTuple):
    """Where the tokens that run a layer are in rows of one width, whatever their number.

    Attributes:
        run: True where a token runs.
        columns: the place in its row of each that runs, in order; `seq` where there is none.
        ranks: the place of each token that runs among those.
        exact: whether the width of a single row's tokens is known, not only a bound.
    """

    run: Bool[Tensor, "batch seq"]
    columns: Int[Tensor, "batch width"]
    ranks: Int[Tensor, "batch seq"]
    exact: bool

    @property
    def indices(self) -> Int[Tensor, "batch width"]:
        """The sequence index of each slot, -1 where a row has no token."""
        return self.columns.masked_fill(self.columns == self.run.shape[1], -1)

    def pack(self, tokens: Shaped[Tensor, "*any batch_or_1 seq dim"]) -> Shaped[Tensor, "*any batch width dim"]:
        """The tokens that run, row by row; the last one of all in the places after them."""
        batch, width = self.columns.shape
        tokens = tokens.expand(*tokens.shape[:-3], batch, -1, -1)
        places = self.columns.clamp(max=tokens.shape[-2] - 1)[..., None]
        return tokens.gather(-2, places.expand(*tokens.shape[:-2], width, tokens.shape[-1]))

    def unpack(
        self, tokens: Float[Tensor, "batch width dim"], others: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        """Each packed token at its place, `others` where none was packed."""
        ranks = self.ranks.clamp(0, tokens.shape[1] - 1)[..., None].expand(-1, -1, tokens.shape[2])
        return torch.where(self.run[..., None], tokens.gather(1, ranks), others)


class Stretch:
    """The layers from one decision point to the next, and who runs them.

    Args:
        first: the first layer.
        decision: of all of them, stacked.
        real: False at padding.
        recorded: the same for a record of the call, where replayed layers have a copy of the probabilities.
        bounds: how many tokens of a row may run each layer, where that is known before it is decided.
        past: tokens per row before those of the call.
    """

    def __init__(
        self,
        first: int,
        decision: Decision,
        real: Bool[Tensor, "batch seq"],
        recorded: Decision | None = None,
        bounds: tuple[int, ...] | None = None,
        past: int = 0,
    ) -> None:
        self.first, self.decision, self.recorded, self.bounds = first, decision, recorded or decision, bounds
        self.past = past
        # The real tokens stand below the layers, as if one more were run by all of them.
        self._chosen = torch.cat([decision.run & real, real[None]])
        self._elsewhere: dict[torch.device, Stretch] = {}
        if bounds is None:
            self._totals  # noqa: B018 (asked now, and in no layer)

    @cached_property
    def _counts(self) -> list[list[list[int]]]:
        """How many run, by layer, row and span of columns. This is the one time that the device is waited for."""
        by_span, tokens = self._chosen, self._chosen.shape[-1]
        if tokens > 1:
            span = min(SPAN, tokens)
            by_span = F.pad(by_span, (0, -tokens % span)).unflatten(-1, (-1, span)).sum(-1)
        counts: list[list[list[int]]] = by_span.tolist()
        return counts

    @cached_property
    def _totals(self) -> list[int]:
        return [sum(map(sum, rows)) for rows in self._counts]

    @property
    def tokens(self) -> int:
        """How many are real, over all rows."""
        return self._totals[-1]

    def count(self, layer: int) -> int:
        """How many tokens run a layer, over all rows."""
        return self._totals[layer - self.first]

    def everyone(self, layer: int) -> bool:
        """Whether all real tokens run a layer."""
        return self._totals[layer - self.first] == self.tokens

    def layout(self, layer: int) -> Layout:
        """Where the tokens that run a layer belong."""
        return self._layout(layer - self.first)

    def packing(self, layer: int, multiple: int) -> Packing:
        """The same in rows of one width, a multiple of some number and no longer than a row."""
        at, tokens = layer - self.first, self._chosen.shape[-1]
        width = self.bounds[at] if self.bounds else max(map(sum, self._counts[at]))
        width = min(-(-width // multiple) * multiple, tokens)
        return Packing(
            self._chosen[at],
            self._columns[at, :, :width].contiguous(),
            self._ranks[at],
            self.bounds is None and len(self._chosen[at]) == 1,
        )

    @cached_property
    def _ranks(self) -> Int[Tensor, "layers batch seq"]:
        return self._chosen[:-1].cumsum(-1) - 1

    @cached_property
    def _columns(self) -> Int[Tensor, "layers batch seq_and_1"]:
        tokens = self._chosen.shape[-1]
        places = torch.arange(tokens, device=self._chosen.device).expand_as(self._ranks)
        none = self._ranks.new_full((*self._ranks.shape[:2], tokens + 1), tokens)
        return none.scatter_(-1, self._ranks.masked_fill(~self._chosen[:-1], tokens), places)

    @property
    def padded(self) -> Layout | None:
        """Where the real tokens are; None where there is no padding."""
        return self._layout(-1) if self.tokens < self._chosen[0].numel() else None

    def spans(self, layer: int) -> tuple[tuple[int, int, int], ...]:
        """(first, end, keys) of runs of at least `SPAN` of a row's tokens that see the first `keys` keys at most."""
        spans, begin, end = [], 0, 0
        counts = self._counts[layer - self.first][0]
        for number, count in enumerate(counts):
            end += count
            if end > begin and (end - begin >= SPAN or number + 1 == len(counts)):
                seen = min((number + 1) * SPAN, self._chosen.shape[-1])
                spans.append((begin, end, self.past + seen))
                begin = end
        if end > begin:  # the last columns are skipped
            spans.append((begin, end, self.past + self._chosen.shape[-1]))
        return tuple(spans)

    def to(self, device: torch.device) -> "Stretch":
        """The same on another device: the layers of a model may be spread over several."""
        if self._chosen.device == device:
            return self
        if device not in self._elsewhere:
            there = object.__new__(Stretch)
            vars(there).update(vars(self))
            for made in ("_places", "_ranks", "_columns"):
                vars(there).pop(made, None)
            there.decision = Decision(*(None if t is None else t.to(device) for t in self.decision))  # type: ignore[arg-type]
            there._chosen, there._elsewhere = self._chosen.to(device), {}
            self._elsewhere[device] = there
        return self._elsewhere[device]

    def _layout(self, at: int) -> Layout:
        at %= len(self._totals)
        before = sum(self._totals[:at])
        _, batch, seq = self._chosen.shape
        width = max(map(sum, self._counts[at]), default=0)
        return Layout(batch, seq, width, at, slice(before, before + self._totals[at]), self._places)

    @cached_property
    def _places(self) -> Places:
        return Places(self._chosen, sum(self._totals), self.past)


class Return(torch.autograd.Function):
    """Brings gradients of decisions back to them where layers are replayed by themselves (reentrant checkpointing).

    A replay ends in a backward pass of its own, which must not run on into the gates. It ends at a copy of the
    probabilities, and what has gathered there is handed on when the gradient of the states at the decision point
    comes by, after that of all layers that were decided for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "batch seq dim"],
        probability: Float[Tensor, "layers batch seq"],
        copy: Float[Tensor, "layers batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The states as they are."""
        ctx.copy = copy
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "batch seq dim"]) -> Any:
        """Their gradient as it is, and what has gathered at the copy."""
        gathered, ctx.copy.grad = ctx.copy.grad, None
        return gradients[0], gathered, None
