"""Who runs what in the step that comes: decided from embeddings, before any layer, for all requests in it at once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skipit.router.config import Unit
from skipit.router.costs import LayerCost
from skipit.router.gates import Stacked, TokenGate, logits_of
from skipit.router.modality import token_modality
from skipit.router.spending import row_thresholds

from .requests import Spending

KEPT = 1024  # requests whose counts are kept after they have ended


@dataclass
class Spent:
    """What a request has executed so far.

    Attributes:
        tokens: of the prompt, without those whose keys and values were cached, and generated ones that were fed back.
        token_layers: how many of their layers these tokens ran.
        routed: FLOPs of what they ran, gates included, as skipit counts: those of `skipit.generate`.
        executed: FLOPs of what was computed here, where attention is computed for every token.
        dense: FLOPs without skipping.
    """

    tokens: float = 0
    token_layers: float = 0
    routed: float = 0
    executed: float = 0
    dense: float = 0

    @property
    def share(self) -> float:
        """Share of the FLOPs that the request was routed to."""
        return self.routed / self.dense if self.dense else 1.0


@dataclass
class Row:
    """A request.

    Attributes:
        spending: what it may spend.
        prompt: tokens of its prompt.
        threshold: above which its tokens run; None until its prompt's logits are known.
        counted: tokens from the first that `spent` is of: after a preemption they are run again.
        spent: what it has executed.
    """

    spending: Spending
    prompt: int
    threshold: float | None = None
    counted: int = 0
    spent: Spent = field(default_factory=Spent)


class Chunk(NamedTuple):
    """What of a request is in a step: `tokens` of its tokens, after the first `past`."""

    row: Row
    past: int
    tokens: int


class Decisions:
    """Decides for every step, and holds what its layers then read.

    Buffers keep their places in memory, so that captured graphs may read them.

    Args:
        weight: of all gates.
        bias: of all gates.
        config: of the whole model, which says which tokens are vision.
        costs: of all layers.
        unit: what a token skips.
        most: tokens that a step may have.
        like: a tensor of the dtype and on the device of the decoder's states.
        agree: makes several processes of one model decide alike.
    """

    def __init__(
        self,
        weight: Float[Tensor, "layers modalities dim"],
        bias: Float[Tensor, "layers modalities"],
        config: Any,
        costs: Sequence[LayerCost],
        unit: Unit,
        most: int,
        like: Tensor,
        agree: Callable[[Tensor], Tensor] = lambda run: run,
    ) -> None:
        self.config, self.costs, self.unit, self.agree = config, tuple(costs), unit, agree
        self.gates = [TokenGate(weight.shape[-1], layer) for layer in range(len(weight))]
        for gate, w, b in zip(self.gates, weight, bias, strict=True):
            gate.weight = nn.Parameter(w.float().to(like.device), requires_grad=False)
            gate.bias = nn.Parameter(b.float().to(like.device), requires_grad=False)
        self._held: dict[nn.Module, Stacked] = {}
        self.keep = torch.ones(len(weight), most, 1, dtype=like.dtype, device=like.device)
        self.rows: OrderedDict[str, Row] = OrderedDict()
        self.count: Callable[[Row, Spent], None] = lambda row, spent: None
        self._places: Sequence[Int[Tensor, " tokens"]] | None = None
        columns = [[1.0, cost.linear - cost.keys_values, cost.attention, cost.mlp] for cost in costs]
        self._prices = torch.tensor(columns, dtype=torch.float64, device=like.device).T
        self._gates = sum(cost.gate for cost in costs)

    def places(self, layer: int) -> Int[Tensor, " tokens"] | None:
        """Which tokens of the step run a layer; None: all of them, padding too."""
        return None if self._places is None else self._places[layer]

    def open(self, tokens: int) -> None:
        """Let every token of a step run every layer: of a dummy, by which memory is measured or a graph captured."""
        self._places = None
        self.keep[:, :tokens] = 1

    def close(self) -> None:
        """Forget what was decided: the step has run."""
        self._places = None

    @property
    def decided(self) -> bool:
        """Whether something was decided for the step that comes."""
        return self._places is not None

    @torch.no_grad()
    def decide(
        self,
        embeddings: Float[Tensor, "tokens dim"],
        ids: Int[Tensor, " tokens"],
        chunks: Sequence[Chunk],
        padded: int,
    ) -> None:
        """Decide for a step; the device is waited for once.

        Args:
            embeddings: of its tokens, those of images in place.
            ids: of its tokens.
            chunks: what its tokens are of, in order.
            padded: tokens with those that fill the step up.
        """
        device = embeddings.device
        modality = token_modality(self.config, ids[None].long())
        logits = logits_of(self.gates, embeddings[None], modality, self._held)[:, 0]
        lengths = [chunk.tokens for chunk in chunks]
        for chunk, part in zip(chunks, logits.split(lengths, -1), strict=True):
            if chunk.row.threshold is None:
                chunk.row.threshold = self._threshold(chunk, part)
        per_row = [[chunk.row.threshold, chunk.past, chunk.row.counted] for chunk in chunks]
        owner = torch.arange(len(chunks)).repeat_interleave(torch.tensor(lengths))
        within = torch.cat([torch.arange(length) for length in lengths])
        threshold, past, counted = torch.tensor(per_row, dtype=torch.float64)[owner].T.to(device)
        run = self.agree(logits > threshold.float())
        tokens = run.shape[1]
        self.keep[:, :tokens, 0] = run
        self.keep[:, tokens:padded] = 0
        position = past + within.to(device)
        spent = self._spent(run, position + 1) * (position >= counted)
        by_row = spent.new_zeros(len(spent), len(chunks)).index_add_(1, owner.to(device), spent)
        told = torch.cat([by_row.T.flatten(), run.sum(-1).double()]).tolist()
        counts = [int(count) for count in told[-len(run) :]]
        self._places = torch.nonzero_static(run, size=sum(counts))[:, 1].split(counts)
        for number, (row, before, length) in enumerate(chunks):
            one = Spent(*told[number * len(spent) : (number + 1) * len(spent)])
            row.counted = max(row.counted, before + length)
            for name, value in vars(one).items():
                setattr(row.spent, name, getattr(row.spent, name) + value)
            self.count(row, one)

    def row(self, name: str, spending: Callable[[], Spending], prompt: int) -> Row:
        """The request of a name, from when it is first seen until `KEPT` others have come after it."""
        if name not in self.rows:
            asked = spending()
            self.rows[name] = Row(asked, prompt, asked.threshold)
        return self.rows[name]

    def forget(self, running: Any) -> None:
        """Forget the oldest requests but those that run.

        Args:
            running: a collection of names.
        """
        for name in list(self.rows)[: max(0, len(self.rows) - KEPT)]:
            if name not in running:
                del self.rows[name]

    def _threshold(self, chunk: Chunk, logits: Float[Tensor, "layers tokens"]) -> float:
        row = chunk.row
        if chunk.past > 0 or chunk.tokens < row.prompt:
            raise RuntimeError(
                f"skipit: a budget per input needs the whole prompt in one step, got {chunk.tokens} tokens after "
                f"{chunk.past} of {row.prompt}. Serve with --no-enable-chunked-prefill."
            )
        prompt = torch.ones(1, row.prompt, dtype=torch.bool, device=logits.device)
        seen = torch.arange(1, row.prompt + 1, device=logits.device)[None]
        share = row.spending.share
        assert share is not None
        return float(
            row_thresholds(logits[:, None, : row.prompt], prompt, seen, self.costs, "retain", self.unit, share)
        )

    def _spent(
        self, run: Bool[Tensor, "layers tokens"], seen: Float[Tensor, " tokens"]
    ) -> Float[Tensor, "fields tokens"]:
        """`Spent` of every token, by the formulas of `theory/cost.py`; `seen` counts the token itself."""
        ran, block, pairs, mlp = self._prices @ run.double()
        _, blocks, all_pairs, mlps = self._prices.sum(-1)
        kept = sum(cost.keys_values for cost in self.costs)
        dense = blocks + kept + all_pairs * seen
        executed = dense - mlps + mlp + self._gates
        routed = executed if self.unit == "mlp" else block + pairs * seen + kept + self._gates
        return torch.stack([torch.ones_like(seen), ran, routed, executed, dense])
