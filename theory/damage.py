"""What skipping would do to the answer, without skipping: the Fisher damage of every token, layer and policy.

THEORY: KL(full || skipping) = D + O(|F|^3) with D = 1/2 E_{y ~ p} <grad log p(y), F>^2, where F is the update that
skipping leaves out (docs/theory.md, statement 8). One backward pass per sampled answer gives D for every layer
and token at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skipit.router.attention import visible_keys


def sample_log_likelihood(
    logits: Float[Tensor, "answers vocabulary"], temperature: float, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Sum of log p_T(y) over answer positions, with each y drawn from p_T, the model's distribution at a temperature.

    The scores of different positions are then independent with mean zero, so their squares add up without bias, and the
    damage is that of KL(p_T || q_T). A trained model is often so sure that draws at T = 1 all give the same token,
    whose gradient is near zero; a temperature above 1 shows the alternatives.
    """
    log_probability = torch.log_softmax(logits.float() / temperature, dim=-1)
    drawn = torch.multinomial(log_probability.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    return log_probability.gather(-1, drawn).sum()


def slopes(grad: Float[Tensor, "batch seq dim"], change: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq"]:
    """First-order change of the log-likelihood when a state changes, per token: <grad, change> in fp32."""
    return (grad.float() * change.float()).sum(-1)


def damage_by_row(slope: Float[Tensor, "batch seq"], chosen: Bool[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """Damage per row when all `chosen` tokens change together: the slopes add up before they are squared."""
    return 0.5 * (slope * chosen).sum(-1).square()


@torch.no_grad()
def eviction_change(
    forward: Callable[..., Any],
    hidden: Float[Tensor, "batch seq dim"],
    output: Float[Tensor, "batch seq dim"],
    kwargs: dict[str, Any],
    evicted: Bool[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq dim"]:
    """How a layer's output changes when it skips some tokens and their keys and values do not exist.

    Exact for this layer: a skipped token keeps its state, the others run without the evicted keys.

    Args:
        forward: the layer.
        hidden: states that enter it.
        output: states that leave it when all tokens run.
        kwargs: its other arguments, without a cache.
        evicted: which tokens skip.
    """
    index = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    mask = visible_keys(kwargs.get("attention_mask"), index, index, 0, ~evicted)
    without = forward(hidden, **{**kwargs, "attention_mask": mask})
    without = without[0] if isinstance(without, tuple) else without
    return torch.where(evicted[..., None], hidden, without) - output


class LayerStates:
    """Records what enters and leaves every decoder layer in one forward pass, with the graph between them."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def __enter__(self) -> "LayerStates":
        """Start recording."""
        self._handles = [
            self.layers[0].register_forward_pre_hook(self._require_grad),
            *(layer.register_forward_hook(self._record, with_kwargs=True) for layer in self.layers),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop recording; what was recorded stays."""
        for handle in self._handles:
            handle.remove()

    def _require_grad(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The graph begins here: the embeddings and the vision tower need no gradient.
        return (args[0].detach().requires_grad_(), *args[1:])

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.entered.append(args[0])
        self.left.append(output[0] if isinstance(output, tuple) else output)
        self.kwargs.append({k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")})


class CrossAttention:
    """Measures how much text attends to vision (VAR), and prepares the damage of evicting a key, while a model runs.

    Called by the packed attention function with one layer's queries and keys; keeps two numbers per row and one per
    key, so no attention matrix outlives its layer. The number per key is a bias on its scores for all queries but its
    own token's, zero, with a gradient: to lower it to minus infinity is to evict the key, so minus the gradient is the
    first-order effect of eviction on what others see (ours; exact for a key of vanishing mass, where the derivative
    a (v - o) of the attention output and the change a (v - o) / (1 - a) of removing the key agree).

    Attributes:
        bias: per layer, [batch, 1, 1, seq].
        text: per layer, [batch]: mean attention mass on vision keys over all text queries that can see one.
        last: per layer, [batch]: the same for the last prompt token.
    """

    def __init__(
        self, modality: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"], last: Int[Tensor, " batch"]
    ):
        self.vision = (modality == 1) & real
        sees = self.vision.cumsum(-1) > 0
        self.queries = (modality == 0) & real & sees
        self.last_query = last
        self.text: list[Tensor] = []
        self.last: list[Tensor] = []
        self.bias: list[Tensor] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Add one layer and return its mask with the bias. Query is [batch, heads, seq, head_dim]."""
        self._measure(query, key, mask, scaling)
        batch, seq = query.shape[0], query.shape[2]
        bias = query.new_zeros(batch, 1, 1, seq, requires_grad=True)
        self.bias.append(bias)
        causal = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()[None, None] if mask is None else mask
        if causal.dtype == torch.bool:
            causal = torch.zeros_like(causal, dtype=query.dtype).masked_fill(~causal, torch.finfo(query.dtype).min)
        return causal + bias * (1 - torch.eye(seq, dtype=query.dtype, device=query.device))

    @torch.no_grad()
    def _measure(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = torch.nan_to_num(torch.softmax(scores.float(), dim=-1)).mean(1)
        mass = (weights * self.vision[:, None, :]).sum(-1)
        queries = self.queries.sum(-1)
        mean = (mass * self.queries).sum(-1) / queries  # NaN where a row has no such query
        self.text.append(mean)
        here = mass.gather(1, self.last_query[:, None])[:, 0]
        self.last.append(torch.where(self.vision.any(-1), here, torch.nan))
