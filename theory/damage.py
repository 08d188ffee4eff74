"""What skipping would do to the answer, without skipping: the damage of every token, layer and policy.

The model's answer is reduced to one choice: its first answer y_1 against another y_2 that is drawn. Skipping lowers the
margin log p(y_1) - log p(y_2) by about <grad margin, F>, where F is the update that is left out, and the damage is the
exact KL divergence of the choice (docs/theory.md, statement 8; its second-order form there is the Fisher damage). One
backward pass per drawn choice gives it for every layer and token at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .measures import attention_scores

# The path from a state to its opposite leads through zero, where the weight below is infinite.
NEARLY_ONE = 1 - 1e-6
# Of the power mean that stands for a unit's tokens. Their damages spread over decades, and their mean is that of a few
# rows whose answer hangs by a thread; gates decide for all rows (ours; docs/evidence.md has the trial).
EXPONENT = 0.25
# Below it the divergence is its second-order form to nine digits, and its exact form mostly rounding.
SMALL_DROP = 1e-4


class Choice(NamedTuple):
    """One choice per row between the model's first answer and another.

    Attributes:
        margin: log p(first) - log p(other) >= 0, with the graph that leads there; 0 where a row has no answer.
        mass: p(first) + p(other).
    """

    margin: Float[Tensor, " batch"]
    mass: Float[Tensor, " batch"]


def draw_choice(
    logits: Float[Tensor, "batch seq vocabulary"],
    answer: Bool[Tensor, "batch seq"],
    temperature: float,
    uniform: Float[Tensor, "batch 2"],
) -> Choice:
    """Draw an answer position of every row, and there an alternative to the most likely token.

    Args:
        logits: of the next token.
        answer: positions that predict an answer token; rows without any are left out.
        temperature: of the distribution p^(1/T), without the first answer, from which the alternative is drawn.
        uniform: numbers in [0, 1) that make both draws of a row, so that they depend on nothing but the row.
    """
    rows = answer.any(-1).nonzero()[:, 0]
    first_draw, second_draw = uniform.to(logits.device)[rows].unbind(-1)
    position = _drawn(answer[rows], first_draw)
    log_p = torch.log_softmax(logits[rows, position].float(), dim=-1)
    first = log_p.detach().argmax(-1, keepdim=True)
    others = torch.softmax(log_p.detach().scatter(-1, first, -torch.inf) / temperature, dim=-1)
    other = _drawn(others, second_draw)[:, None]
    pair = log_p.gather(-1, torch.cat([first, other], dim=-1))
    nothing = logits.new_zeros(len(logits), dtype=torch.float32)
    margin = nothing.index_put((rows,), pair[:, 0] - pair[:, 1])
    return Choice(margin, nothing.index_put((rows,), pair.detach().exp().sum(-1)))


def _drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row, in proportion to its weights: the inverse of their distribution function."""
    cumulative = weights.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def choice_damage(margin: Tensor, mass: Tensor, drop: Tensor) -> Tensor:
    """The divergence mass KL(s(m) || s(m - drop)), s the sigmoid: what lowering the margin m of a choice does, in nats.

    By the chain rule of the divergence it is at most KL(p || q) for any two distributions p and q of which p gives the
    choice this mass and margin, and q this lower margin. Its second-order form is mass s(m) s(-m) drop^2 / 2.

    Args:
        margin: log p(first) - log p(other).
        mass: p(first) + p(other).
        drop: by how much the margin falls; broadcasts with both.

    Returns:
        Damages >= 0, float64.

    Example:
        >>> round(choice_damage(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2.0)).item(), 4)
        0.4338
    """
    m, s, d = margin.detach().double(), mass.double(), drop.double()
    win, lose = torch.sigmoid(m), torch.sigmoid(-m)
    exact = win * (F.logsigmoid(m) - F.logsigmoid(m - d)) + lose * (F.logsigmoid(-m) - F.logsigmoid(d - m))
    return s * torch.where(d.abs() < SMALL_DROP, win * lose * d.square() / 2, exact.clamp(min=0))


def tempered_damage(
    margin: Float[Tensor, "batch 1"], drop: Float[Tensor, "*layers batch seq"]
) -> Float[Tensor, "*layers batch seq"]:
    """Second-order damage with the row's confidence taken at temperature 2: s(m/2) s(-m/2) drop^2.

    For regressing a token's damage on its state. How sure a row is of its answer spreads over many decades, of which a
    token's state predicts a part. Kept whole, this factor drowns the slopes; left out, gates spend the budget on rows
    that no skip can change. Temperature 2 lies between (ours; docs/evidence.md has the trial, which is small).
    """
    half = margin.detach().float() / 2
    return torch.sigmoid(half) * torch.sigmoid(-half) * drop.square()


def path_weight(
    before: Float[Tensor, "batch seq dim"], after: Float[Tensor, "batch seq dim"]
) -> Float[Tensor, "batch seq 1"]:
    """Mean of |before| / |state| on the straight path between two states (ours).

    What reads a state through a norm sees its direction only, so its gradient grows like 1 / |state|. The integral of
    statement 7 along the path of a skip then is the slope at its start times this weight. It is 1 for small updates,
    and large where a layer writes far more than what entered it, as first layers do: there the slope at the full state
    says almost nothing about the state that a skip leaves.

    In closed form, the potential of a uniform rod: 2 |before| / |u| artanh(|u| / (|before| + |after|)), u the change.
    """
    before, after = before.float(), after.float()
    start, end = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
    length = (after - before).norm(dim=-1, keepdim=True)
    ratio = (length / (start + end).clamp(min=1e-30)).clamp(max=NEARLY_ONE)
    # artanh(r) / r, with its limit 1 where nothing changes.
    growth = torch.where(ratio > 1e-4, ratio.clamp(min=1e-4).atanh() / ratio.clamp(min=1e-4), 1.0)
    return 2 * start / (start + end).clamp(min=1e-30) * growth


def weighted_change(
    before: Float[Tensor, "batch seq dim"], after: Float[Tensor, "batch seq dim"]
) -> Float[Tensor, "batch seq dim"]:
    """What a skip takes away, `before` - `after`, in fp32 and times `path_weight`."""
    return (before.float() - after.float()) * path_weight(before, after)


def slopes(grad: Float[Tensor, "batch seq dim"], change: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq"]:
    """First-order change of the margin when a state changes, per token: <grad, change> in fp32."""
    return (grad.float() * change.float()).sum(-1)


@torch.no_grad()
def apart_output(
    forward: Callable[..., Any],
    hidden: Float[Tensor, "batch seq dim"],
    kwargs: dict[str, Any],
    kinds: Int[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq dim"]:
    """A layer's output when the tokens of each modality see no key of another.

    That is what a token leaves with when all tokens of the other modality skip the layer and their keys and values do
    not exist, exact for this layer; one forward pass answers it for text and vision at once (ours).

    Args:
        forward: the layer.
        hidden: states that enter it.
        kwargs: its other arguments, without a cache.
        kinds: the modality of every token, -1 for pads, whose output means nothing.
    """
    seq = hidden.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=hidden.device).tril()
    other = (kinds[:, :, None] != kinds[:, None, :]) & (kinds >= 0)[:, :, None]
    mask = mask.masked_fill(other[:, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    output = forward(hidden, **{**kwargs, "attention_mask": mask})
    alone: Tensor = output[0] if isinstance(output, tuple) else output
    return alone


class CrossAttention:
    """Measures how much text attends to vision (VAR), and prepares the damage of evicting a key, while a model runs.

    Called by the packed attention function with one layer's queries and keys; keeps two numbers per row and one per
    key, so no attention matrix outlives its layer. The number per key is a bias on its scores for all queries but its
    own token's, zero, with a gradient: to lower it to minus infinity is to evict the key, so minus the gradient is the
    first-order effect of eviction on what others see (ours; exact for a key of vanishing mass, where the derivative
    a (v - o) of the attention output and the change a (v - o) / (1 - a) of removing the key agree).

    A cross-attention layer attends to nothing but images, so its mass is 1, and it has no key that a token could take
    away.

    Args:
        kinds: the modality of every token, -1 for pads.
        last: place of the last prompt token.
        of_images: indices of the cross-attention layers.

    Attributes:
        bias: per layer, [batch, 1, 1, seq].
        text: per layer, [batch]: mean attention mass on vision keys over all text queries that can see one.
        last: per layer, [batch]: the same for the last prompt token.
    """

    def __init__(
        self, kinds: Int[Tensor, "batch seq"], last: Int[Tensor, " batch"], of_images: frozenset[int] = frozenset()
    ) -> None:
        self.of_images = of_images
        self.vision = kinds == 1
        self.queries = (kinds == 0) & (self.vision.cumsum(-1) > 0)
        self.last_query = last
        self.text: list[Tensor] = []
        self.last: list[Tensor] = []
        self.bias: list[Tensor] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """Add one layer and return its mask with the bias. Query is [batch, heads, seq, head_dim]."""
        batch, seq = query.shape[0], query.shape[2]
        bias = query.new_zeros(batch, 1, 1, seq, requires_grad=True)
        self.bias.append(bias)
        if getattr(module, "layer_idx", None) in self.of_images:
            self._add(query.new_ones(batch, seq))
            return mask
        self._measure(query, key, mask, scaling)
        causal = (
            torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()[None, None] if mask is None else mask
        )
        if causal.dtype == torch.bool:
            causal = torch.zeros_like(causal, dtype=query.dtype).masked_fill(~causal, torch.finfo(query.dtype).min)
        return causal + bias * (1 - torch.eye(seq, dtype=query.dtype, device=query.device))

    @torch.no_grad()
    def _measure(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        scores = attention_scores(query, key, mask, scaling)
        weights = torch.nan_to_num(torch.softmax(scores.float(), dim=-1)).mean(1)
        self._add((weights * self.vision[:, None, :]).sum(-1))

    def _add(self, mass: Tensor) -> None:
        queries = self.queries.sum(-1)
        mean = (mass * self.queries).sum(-1) / queries  # NaN where a row has no such query
        self.text.append(mean)
        here = mass.gather(1, self.last_query[:, None])[:, 0]
        self.last.append(torch.where(self.vision.any(-1), here, torch.nan))
