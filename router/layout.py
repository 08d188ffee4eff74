"""Where the tokens that run a layer belong: side by side in one sequence, in rows, and among all tokens of a call.

What there is to know about packed tokens is made for all layers of a decision at once, when a layer first asks for it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Places:
    """Of the tokens that run, layer after layer, row after row, where each is.

    Args:
        chosen: True where a token runs.
        total: how many do.
        past: tokens per row before those of the call.
    """

    def __init__(self, chosen: Bool[Tensor, "layers batch seq"], total: int, past: int) -> None:
        self.chosen, self.total, self.past = chosen, total, past

    @cached_property
    def _found(self) -> Int[Tensor, "3 tokens"]:
        """Layer, row and column."""
        return torch.nonzero_static(self.chosen, size=self.total).T.contiguous()

    @property
    def columns(self) -> Int[Tensor, " tokens"]:
        """The place among the tokens of its row."""
        return self._found[2]

    @cached_property
    def places(self) -> Int[Tensor, " tokens"]:
        """The place among the tokens of all rows, one row after the other."""
        _, batch, seq = self.chosen.shape
        return self.columns if batch == 1 else self._found[1] * seq + self.columns

    @cached_property
    def _ranks(self) -> Int[Tensor, "layers batch seq"]:
        return self.chosen.cumsum(-1) - 1

    @cached_property
    def slots(self) -> Int[Tensor, " tokens"]:
        """The place where a layer's rows have as many as its fullest row needs, one row after the other."""
        layer, row, column = self._found
        return row * self.chosen.sum(-1).amax(1)[layer] + self._ranks[layer, row, column]

    @cached_property
    def index(self) -> Int[Tensor, "layers batch seq_and_1"]:
        """The sequence index of each slot, -1 where there is no token."""
        seq = self.chosen.shape[-1]
        index = torch.arange(self.past, self.past + seq, device=self.chosen.device)
        none = self._ranks.new_full((*self._ranks.shape[:2], seq + 1), -1)
        return none.scatter_(-1, self._ranks.masked_fill(~self.chosen, seq), index.expand_as(self._ranks))

    @cached_property
    def position(self) -> Int[Tensor, " tokens"]:
        """The sequence index."""
        return self.columns + self.past if self.past else self.columns


@dataclass(frozen=True)
class Layout:
    """Where packed tokens belong.

    Attributes:
        batch: rows.
        seq: tokens of a row in the call.
        width: packed tokens of the fullest row.
        layer: which one of those that were decided together.
        some: its tokens among theirs.
        of_all: where these are.
        spans: (first, end, keys) of runs of packed tokens that together see only the first `keys` keys; empty where
            that is not known.
    """

    batch: int
    seq: int
    width: int
    layer: int
    some: slice
    of_all: Places
    spans: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, chosen: Bool[Tensor, "batch seq"], past: int = 0) -> "Layout":
        """The layout of the tokens where `chosen` is True, of a single layer."""
        counts: list[int] = chosen.sum(-1).tolist()
        batch, seq = chosen.shape
        return cls(batch, seq, max(counts), 0, slice(0, sum(counts)), Places(chosen[None], sum(counts), past))

    @cached_property
    def places(self) -> Int[Tensor, " tokens"]:
        """Of each packed token, among the tokens of all rows, one row after the other."""
        return self.of_all.places[self.some]

    @cached_property
    def slots(self) -> Int[Tensor, " tokens"]:
        """Where each packed token is when the rows have a place for `width` tokens each, one row after the other."""
        return self.of_all.slots[self.some]

    @cached_property
    def index(self) -> Int[Tensor, "batch width"]:
        """The sequence index of each slot, -1 where a row has no token."""
        if self.batch == 1:
            return self.of_all.position[self.some][None]
        return self.of_all.index[self.layer, :, : self.width]

    def pack(self, tokens: Shaped[Tensor, "*any batch_or_1 seq dim"]) -> Shaped[Tensor, "*any 1 tokens dim"]:
        """The packed tokens' states, or whatever else there is per token."""
        if tokens.shape[-3] == 1:
            return tokens.index_select(-2, self.of_all.columns[self.some])
        return tokens.flatten(-3, -2).index_select(-2, self.places).unsqueeze(-3)

    def to_rows(self, heads: Shaped[Tensor, "1 heads tokens head_dim"]) -> Shaped[Tensor, "batch heads width head_dim"]:
        """Each packed token in its row, zeros where a row has no token."""
        return heads if self.batch == 1 else self._spread(heads, self.slots, self.width)

    def to_columns(self, heads: Float[Tensor, "1 heads tokens head_dim"]) -> Float[Tensor, "batch heads seq head_dim"]:
        """Each packed token at its place among those of the call, zeros where none was packed."""
        return self._spread(heads, self.places, self.seq)

    def _spread(
        self, heads: Shaped[Tensor, "1 heads tokens head_dim"], places: Int[Tensor, " tokens"], width: int
    ) -> Shaped[Tensor, "batch heads {width} head_dim"]:
        out = heads.new_zeros(self.batch * width, heads.shape[1], heads.shape[3])
        return out.index_copy_(0, places, heads[0].transpose(0, 1)).unflatten(0, (self.batch, width)).transpose(1, 2)

    def unpack(
        self, tokens: Float[Tensor, "1 tokens dim"], others: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq dim"]:
        """Each packed token at its place in the call, `others` where none was packed."""
        return others.flatten(0, 1).index_copy(0, self.places, tokens[0]).view_as(others)

    def from_rows(self, rows: Float[Tensor, "batch width heads head_dim"]) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Undo `to_rows`, for what attention makes of the queries."""
        return rows if self.batch == 1 else rows.flatten(0, 1).index_select(0, self.slots)[None]
