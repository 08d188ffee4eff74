"""What is measured on a model's states and attention: pure functions of tensors, one value per token.

Half-precision input is widened to float32 before any arithmetic (float64 stays float64), and every sum over tokens is
taken in float64. Non-finite input gives a non-finite value for that token only; `per_unit_sums` counts such values and
leaves them out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skipit.router.modality import MODALITIES


@dataclass(frozen=True)
class UnitSums:
    """Sums over tokens, one entry per modality; two batches merge by adding field by field."""

    total: Float[Tensor, " modality"]
    count: Int[Tensor, " modality"]
    dropped: Int[Tensor, " modality"]


def cosine_distance(x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """The cosine distance 1 - cos(x, y), never rescaled.

    It is computed as half the squared chord between the directions, |x/|x| - y/|y||^2 / 2: subtracting a cosine from 1
    would lose every distance below the rounding error of 1, and adjacent layers are often closer than that.

    The zero vector counts as a direction of its own, orthogonal to all others. Then distance, chord and angle still
    come from points on one sphere (with one more axis), so every statement about them holds for zero states too.

    Args:
        x: States, any floating type and any finite size.
        y: States compared with `x` one by one.

    Returns:
        Distances in [0, 2], float32 or wider: 0 for two zero vectors, 1 where exactly one is zero.

    Example:
        >>> cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).item()
        1.0
    """
    x_unit, x_zero = _directions(x)
    y_unit, y_zero = _directions(y)
    distance = (x_unit - y_unit).square().sum(-1) / 2
    one_is_zero = (x_zero ^ y_zero) & ~distance.isnan()
    return torch.where(one_is_zero, torch.ones_like(distance), distance).clamp(0, 2)


def angular_distance(x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """The angle between x and y in radians; unlike the cosine distance it obeys the triangle inequality.

    Kahan's form 2 atan2(|u - v|, |u + v|) with unit vectors u and v is accurate at every angle; arccos is not near 0
    and pi.

    Args:
        x: States.
        y: States compared with `x` one by one.

    Returns:
        Angles in [0, pi], float32 or wider: 0 for two zero vectors, pi/2 where exactly one is zero.

    Example:
        >>> round(angular_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])).item(), 4)
        1.5708
    """
    x_unit, _ = _directions(x)
    y_unit, _ = _directions(y)
    apart = torch.linalg.vector_norm(x_unit - y_unit, dim=-1)
    together = torch.linalg.vector_norm(x_unit + y_unit, dim=-1)
    return (2 * torch.atan2(apart, together)).clamp(0, torch.pi)


def block_angles(states: Float[Tensor, "depth *batch dim"], length: int) -> Float[Tensor, "starts *batch"]:
    """The angle that every block of `length` layers turns a state by.

    Args:
        states: The states that enter layers 0..L-1 and, last, the output of layer L-1: depth = L + 1.
        length: Layers in a block, 1..L.

    Returns:
        Angles between states l and l + length, for every start l, in [0, pi].

    Raises:
        ValueError: If no block of this length fits.
    """
    if not 1 <= length < len(states):
        raise ValueError(
            f"`length` is {length}, but {len(states)} states hold blocks of 1 to {len(states) - 1} layers. "
            "Pass a length in this range."
        )
    return angular_distance(states[:-length], states[length:])


def relative_update(x: Float[Tensor, "*batch dim"], x_next: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """The size of a layer's update relative to its input, |x_next - x| / |x|.

    Args:
        x: States that enter the layer.
        x_next: The same tokens' states after it.

    Returns:
        Ratios >= 0, float32 or wider: 0 where nothing changed (two zero vectors included), infinite where a zero vector
        changed, since no ratio exists there.

    Example:
        >>> relative_update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])).item()
        0.20000000298023224
    """
    before = _widened(x)
    update_size, update_peak = _scaled_norm(_widened(x_next) - before)
    size, peak = _scaled_norm(before)
    # Ratio of the scaled norms times ratio of the scales: neither norm is ever formed, so neither can overflow.
    ratio = (update_size / size) * (update_peak / peak)
    return torch.where(update_peak == 0, torch.zeros_like(ratio), ratio)


def attention_scores(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    mask: Bool[Tensor, "#batch #heads query key"] | Float[Tensor, "#batch #heads query key"] | None,
    scaling: float | None,
) -> Float[Tensor, "batch heads query key"]:
    """What attention takes the softmax of.

    Args:
        query: Query states.
        key: Key states; with grouped-query attention `kv_heads` divides `heads`.
        mask: True where a query sees a key, or what to add to the scores; None is causal.
        scaling: Of the scores; None is 1 over the root of `head_dim`.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def eviction_term(
    weights: Float[Tensor, "batch heads query key"],
    values: Float[Tensor, "batch kv_heads key head_dim"],
    evicted: Bool[Tensor, "batch key"],
) -> Float[Tensor, "batch heads query head_dim"]:
    """What each head's output loses when keys are evicted: o - o' = a (v_E - v_K), exact.

    a is the mass on the evicted keys; v_E and v_K are the attention-weighted means of evicted and of kept values
    (statement 9 of the theory). The weights alone cannot tell: a sink with tiny values near v_K does no harm at any
    mass.

    Args:
        weights: Attention weights after softmax, evicted keys included. A model with a learned sink beside the keys is
            covered by appending that sink as one more key with value zero.
        values: Value states; with grouped-query attention `kv_heads` divides `heads`.
        evicted: True at the keys that will not exist.

    Returns:
        o - o' before the output projection, float32 or wider; 0 for queries that do not attend to evicted keys, NaN for
        those that attend to nothing else, since no output exists without them.

    Raises:
        ValueError: If the heads cannot be grouped.
    """
    heads, kv_heads = weights.shape[1], values.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"`weights` has {heads} heads and `values` {kv_heads}: the first must be a multiple of the second. "
            "Pass the value states of the same layer."
        )
    wide = _widened(weights)
    gone = evicted[:, None, :, None].to(wide)
    grouped = _widened(values).to(wide.dtype).repeat_interleave(heads // kv_heads, dim=1)
    lost_mass, kept_mass = wide @ gone, wide @ (1 - gone)
    lost, kept = wide @ (grouped * gone), wide @ (grouped * (1 - gone))
    # a (v_E - v_K) with a = lost/(lost + kept), written without a division by the lost mass, which is often zero.
    return (lost - lost_mass / kept_mass * kept) / (lost_mass + kept_mass)


def per_unit_sums(values: Float[Tensor, "batch seq"], modality: Int[Tensor, "batch seq"]) -> UnitSums:
    """Sum one value per token over the tokens of each modality.

    Args:
        values: One value per token.
        modality: 0 text, 1 vision, -1 for pads and all else that must not count.

    Returns:
        `total` (float64) and `count` (int64) of the finite values, `dropped` (int64) the number of non-finite ones.

    Raises:
        ValueError: If `modality` holds another id.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, float("nan"), 9.0]])
        >>> sums = per_unit_sums(values, torch.tensor([[0, 1, 1, -1]]))
        >>> sums.total.tolist(), sums.count.tolist(), sums.dropped.tolist()
        ([1.0, 2.0], [1, 1], [0, 1])
    """
    check_modality(modality)
    kinds = torch.arange(len(MODALITIES), device=modality.device)
    member = modality.flatten()[:, None] == kinds
    column = values.flatten()[:, None].double()
    usable = member & column.isfinite()
    total = torch.where(usable, column, torch.zeros_like(column)).sum(0)
    return UnitSums(total, usable.sum(0), (member & ~usable).sum(0))


def check_modality(modality: Int[Tensor, "*batch"]) -> None:
    """Refuse modality ids that no column stands for.

    Args:
        modality: Ids to check.

    Raises:
        ValueError: If an id is neither -1 nor that of a modality.
    """
    unknown = modality[(modality < -1) | (modality >= len(MODALITIES))]
    if unknown.numel():
        names = ", ".join(f"{i} {name}" for i, name in enumerate(MODALITIES))
        raise ValueError(
            f"`modality` holds the id {int(unknown[0])}, expected {names} or -1 for tokens that do not count. "
            "Map other ids first."
        )


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled_norm(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of wide/peak and peak = max|wide|: their product is the norm, which alone could overflow."""
    peak = wide.abs().amax(-1)
    return torch.linalg.vector_norm(wide / torch.where(peak == 0, 1, peak)[..., None], dim=-1), peak


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors along the last axis, zeros for zero vectors, and where those are."""
    wide = _widened(x)
    size, peak = _scaled_norm(wide)
    zero = peak == 0
    scale = torch.where(zero, 1, peak)[..., None]
    return wide / scale / torch.where(zero, 1, size)[..., None], zero
