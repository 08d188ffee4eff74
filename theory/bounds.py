"""What is proved about skipping a layer: statements 1 to 11 of docs/theory.md, each a pure function.

The four notions of redundancy are those of Hartman et al., "Skip-It? Theoretical Conditions for Layer Skipping in
Vision-Language Models" (arXiv 2509.25584). Constants and proofs are ours where no other source is named. Entropies and
divergences are in nats.

Measured quantities may be numbers or tensors, units of any shape; results are float64 tensors. NaN (a unit without
samples) stays NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Values = Float[Tensor, "..."] | float | int


# --- 1. Geometric and proximal redundancy


def proximal_from_geometric(geo: Values, t: float) -> Float[Tensor, "..."]:
    """Statement 1: prox(t) <= geo / t (Markov's inequality, since d >= 0). Tight when d takes only the values 0 and t.

    Args:
        geo: Mean cosine distance, in [0, 2].
        t: Threshold of prox, in (0, 2].

    Returns:
        The largest prox(t) that this mean allows, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> proximal_from_geometric(0.25, t=0.5).item()
        0.5
    """
    geo = _within("geo", geo, _DISTANCE)
    _within("t", t, _THRESHOLD)
    return (geo / t).clamp(max=1)


def geometric_from_proximal(prox: Values, t: float) -> Float[Tensor, "..."]:
    """Statement 1, backwards: geo <= (1 - prox) t + 2 prox. Approached when d is just below t or equal to 2.

    Args:
        prox: prox(t) or an upper bound of it, in [0, 1].
        t: Threshold of prox, in (0, 2].

    Returns:
        The largest mean distance that this distribution allows, in [0, 2].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> geometric_from_proximal(0.5, t=0.5).item()
        1.25
    """
    prox = _within("prox", prox, _SHARE)
    _within("t", t, _THRESHOLD)
    return (1 - prox) * t + 2 * prox


# --- 2. Cosine and norm give the update


def update_norm_from_cosine(norm_ratio: Values, distance: Values) -> Float[Tensor, "..."]:
    """Statement 2: |F|/|x| = sqrt((1 - r)^2 + 2 r d), exact for every token (law of cosines).

    So distance alone does not bound an update: a layer that doubles every state has d = 0 and |F| = |x|.

    Args:
        norm_ratio: r = |x_next| / |x| >= 0 of each token; x is not the zero vector.
        distance: d(x, x_next) of the same tokens, in [0, 2].

    Returns:
        |F| / |x| of each token.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> update_norm_from_cosine(2.0, 0.0).item()
        1.0
    """
    ratio = _within("norm_ratio", norm_ratio, _NONNEGATIVE)
    distance = _within("distance", distance, _DISTANCE)
    return ((1 - ratio).square() + 2 * ratio * distance).sqrt()


# --- 3. Blocks of layers


def block_angle_bound(angles: Float[Tensor, "*units layers"]) -> Float[Tensor, "*units"]:
    """Statement 3: the angle across a block is at most the sum of the angles of its layers (triangle inequality).

    It holds for every token and for means over tokens. The cosine distance has no such rule: two turns by the same
    small angle make four times the distance of one.

    Args:
        angles: Angle of each layer of the block in radians, or its mean, in [0, pi].

    Returns:
        A bound on the block's angle, or mean angle, in [0, pi]. One minus its cosine bounds a token's cosine distance.

    Raises:
        ValueError: If an angle is out of range.

    Example:
        >>> block_angle_bound(torch.tensor([0.5, 0.25])).item()
        0.75
    """
    return _within("angles", angles, _ANGLE).sum(-1).clamp(max=math.pi)


def block_geometric_bound(geos: Float[Tensor, "*units layers"]) -> Float[Tensor, "*units"]:
    """Statement 3 for means: geo(block) <= (sum of sqrt geo_l)^2.

    sqrt(2 d) is the chord between two directions, a metric; Minkowski's inequality carries its triangle inequality to
    the mean of d.

    Args:
        geos: Mean cosine distance of each layer of the block, in [0, 2].

    Returns:
        A bound on the mean cosine distance across the block, in [0, 2].

    Raises:
        ValueError: If a distance is out of range.

    Example:
        >>> block_geometric_bound(torch.tensor([0.25, 0.25])).item()
        1.0
    """
    return _within("geos", geos, _DISTANCE).sqrt().sum(-1).square().clamp(max=2)


# --- 4. What a probe can lose


def probe_gap_bound(eps: Values, weight_norm: float) -> Float[Tensor, "..."]:
    """Statement 4: the cross-entropy of a softmax-linear probe changes by at most 2 B sqrt(eps) on average.

    The probe reads logits W n + b from the direction n = x/|x| with |W|_2 <= B. The cross-entropy is sqrt(2)-Lipschitz
    in the logits and |n - n'| = sqrt(2 d). The bound holds for all such probes at once, hence between the optimal ones,
    and so for the V-information gap of that family. The constant is sharp as eps -> 0.

    Args:
        eps: geo, the mean cosine distance, in [0, 2], or an upper bound of it.
        weight_norm: B, the largest singular value of W on unit vectors. A probe behind RMSNorm has B = |W diag(gain)|_2
            sqrt(dim).

    Returns:
        A bound on |E loss(x_next) - E loss(x)| in nats.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> probe_gap_bound(0.25, weight_norm=3.0).item()
        3.0
    """
    _within("weight_norm", weight_norm, _NONNEGATIVE)
    return 2 * weight_norm * _within("eps", eps, _DISTANCE).sqrt()


def probe_gap_bound_from_proximal(prox: Values, t: float, lipschitz: float) -> Float[Tensor, "..."]:
    """Statement 4 from the distribution: gap <= alpha ((1 - prox) sqrt(2 t) + 2 prox).

    Tokens with d < t move by a chord below sqrt(2 t), all others by at most 2.

    Args:
        prox: prox(t) or an upper bound of it, in [0, 1].
        t: Threshold of prox, in (0, 2].
        lipschitz: alpha, the Lipschitz constant of the loss in the direction x/|x|; sqrt(2) B for a softmax-linear
            probe.

    Returns:
        A bound on |E loss(x_next) - E loss(x)| in the loss's unit.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> probe_gap_bound_from_proximal(0.0, t=0.5, lipschitz=3.0).item()
        3.0
    """
    prox = _within("prox", prox, _SHARE)
    _within("t", t, _THRESHOLD)
    _within("lipschitz", lipschitz, _NONNEGATIVE)
    return lipschitz * ((1 - prox) * math.sqrt(2 * t) + 2 * prox)


# --- 5. Information that a layer can add


def neighbour_counts(distances: Float[Tensor, "symbols symbols"], t: float) -> tuple[int, int]:
    """N_min and N_max of statement 5: the fewest and most symbols nearer than t to one symbol, itself included.

    Args:
        distances: Distance between every two symbols of the alphabet.
        t: Threshold; a symbol is near when its distance is below t, the complement of prox's d >= t.

    Returns:
        (N_min, N_max).

    Raises:
        ValueError: If `t` is not positive.
    """
    _within("t", t, _POSITIVE)
    near = (distances < t).sum(-1)
    return int(near.min()), int(near.max())


def fano_entropy_bound(p: Values, alphabet: int, n_min: int, n_max: int) -> Float[Tensor, "..."]:
    """Statement 5: H(x_next | x) <= h2(P) + P log(|X| - N_min) + (1 - P) log N_max, with P = prox(t).

    Distance-based Fano inequality (Duchi and Wainwright, 2013, arXiv 1311.2669) for states quantized to a finite
    alphabet X that holds both x and x_next. It bounds what the layer can add: I(x_next; Z) - I(x; Z) <= H(x_next | x).

    The right side falls again for P > P* = M / (M + N_max), M = |X| - N_min, so an upper bound of prox must not be put
    in beyond P*. The function keeps it at its maximum log(M + N_max) there, and never above log |X|: both are safe.

    Args:
        p: prox(t) or an upper bound of it, in [0, 1].
        alphabet: |X|, the number of symbols.
        n_min: Fewest symbols with d < t around any symbol; see `neighbour_counts`.
        n_max: Most such symbols.

    Returns:
        A bound on the conditional entropy in nats, in [0, log |X|].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(fano_entropy_bound(0.1, alphabet=8, n_min=1, n_max=1).item(), 4)
        0.5197
    """
    if not 1 <= n_min <= n_max <= alphabet:
        raise ValueError(
            f"`n_min`, `n_max`, `alphabet` are {n_min}, {n_max}, {alphabet}, expected 1 <= n_min <= n_max <= alphabet: "
            "a symbol is its own neighbour. Count them with `neighbour_counts`."
        )
    far = alphabet - n_min
    p = _within("p", p, _SHARE).clamp(max=far / (far + n_max))
    far_term = torch.xlogy(p, torch.tensor(float(far))) if far else torch.zeros_like(p)
    return (_binary_entropy(p) + far_term + (1 - p) * math.log(n_max)).clamp(max=math.log(alphabet))


# --- 6. From information to risk


def pinsker_risk_gap(information: Values, loss_range: float) -> Float[Tensor, "..."]:
    """Statement 6: the best risk from x exceeds the best from x_next by at most M sqrt(dI / 2), dI = I(x_next; Z | x).

    Pinsker's inequality and, for large dI, the sharper M sqrt(1 - exp(-dI)) of Bretagnolle and Huber. No Markov
    assumption is needed for the conditional information; under x -> x_next -> Z it equals I(x_next; Z) - I(x; Z). Bound
    it by `fano_entropy_bound`.

    Args:
        information: dI in nats, >= 0, or an upper bound of it.
        loss_range: M; the loss takes values in an interval of this length.

    Returns:
        A bound on the risk gap, in [0, M].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> pinsker_risk_gap(0.02, loss_range=1.0).item()
        0.1
    """
    _within("loss_range", loss_range, _NONNEGATIVE)
    return loss_range * total_variation_from_kl(_within("information", information, _NONNEGATIVE))


# --- 7. The exact effect of one skip


@dataclass(frozen=True)
class PathIntegral:
    """The loss change of a skip by statement 7."""

    change: Tensor
    """loss(skip) - loss(full), by quadrature."""
    bound: Tensor
    """|u| times the largest gradient norm met on the path; never below |change|."""


def path_identity(
    rest: Callable[[Tensor], Tensor],
    x_next: Float[Tensor, "*batch dim"],
    update: Float[Tensor, "*batch dim"],
    nodes: int = 16,
) -> PathIntegral:
    """Statement 7: loss(skip) - loss(full) = - integral over t in [0, 1] of <grad R(x_next - t u), u>.

    Exact for a skip that retains K/V, and for any other change u of the states after one layer. R, the rest of the
    network, must be absolutely continuous along the path (ReLU is; a hard top-k is not). Gauss-Legendre quadrature: the
    error falls geometrically in `nodes` for analytic R, and like 1/nodes across a kink.

    Args:
        rest: R, from the state after the layer to a scalar loss.
        x_next: The full model's state after the layer, all tokens.
        update: u, what the skip takes away: F at the skipped tokens and 0 elsewhere.
        nodes: Quadrature nodes; each costs one forward and one backward pass of `rest`.

    Returns:
        The change and the bound of Cauchy and Schwarz on it, float64 scalars.

    Raises:
        ValueError: If `nodes` is not positive or `rest` does not return a scalar.

    Example:
        >>> path = path_identity(lambda x: x.square().sum(), torch.tensor([3.0]), torch.tensor([2.0]))
        >>> round(path.change.item(), 4)
        -8.0
    """
    if nodes < 1:
        raise ValueError(f"`nodes` is {nodes}, expected 1 or more. Pass the number of quadrature nodes.")
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    wide = update.double()
    skipped = (update != 0).any(-1, keepdim=True)
    change, steepest = wide.new_zeros(()), wide.new_zeros(())
    for position, weight in zip((positions + 1) / 2, weights / 2, strict=True):
        point = (x_next - float(position) * update).detach().requires_grad_()
        with torch.enable_grad():
            loss = rest(point)
        if loss.ndim:
            raise ValueError(
                f"`rest` returned a tensor of shape {list(loss.shape)}, expected a scalar loss. Sum or average it."
            )
        (slope,) = torch.autograd.grad(loss, point)
        change -= float(weight) * (slope.double() * wide).sum()
        # Only the gradient at the skipped tokens meets the update.
        steepest = steepest.maximum((slope.double() * skipped).norm())
    return PathIntegral(change, wide.norm() * steepest)


# --- 8. Local damage


def fisher_damage(grad: Float[Tensor, "*batch dim"], update: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """Statement 8 for one sampled answer: 1/2 <g, F>^2 of each token; the mean over y ~ p is D = KL(p || q) + O(|F|^3).

    Args:
        grad: g = gradient of log p(y) in the state after the layer, y drawn from the model's own p.
        update: F, what the skip would leave out.

    Returns:
        Damage of skipping each token alone, >= 0, in nats, float32 or wider.

    Example:
        >>> fisher_damage(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])).item()
        8.0
    """
    return _slopes(grad, update).square() / 2


def fisher_damage_joint(
    grad: Float[Tensor, "batch seq dim"], update: Float[Tensor, "batch seq dim"], tokens: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """Statement 8 for tokens skipped together: 1/2 (sum over the set of <g, F>)^2, summed before it is squared.

    Effects of single tokens may cancel or add up; at most they give `combine_damages` of the single ones (statement
    10).

    Args:
        grad: Gradient of log p(y) in the states after the layer.
        update: F of every token.
        tokens: True at the tokens that skip.

    Returns:
        Damage of the set in each row, >= 0, in nats, float32 or wider.
    """
    slopes = _slopes(grad, update)
    return torch.where(tokens, slopes, torch.zeros_like(slopes)).sum(-1).square() / 2


# --- 9. Eviction of keys and values


def eviction_output_change(mass: Values, value_norm: Values) -> Float[Tensor, "..."]:
    """Statement 9: |o - o'| <= 2 a max|v| for one head and query when keys that hold the mass a < 1 are evicted.

    The exact change a (v_E - v_K) is `skipit.theory.measures.eviction_term`. Tight when the two means are opposite and
    of full norm. Multiply by |W_O|_2 of the head for the change of the layer's attention output.

    Args:
        mass: a, attention on the evicted keys, in [0, 1].
        value_norm: The largest norm of a value the query attends to.

    Returns:
        A bound on the change of the head's output.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> eviction_output_change(0.25, 2.0).item()
        1.0
    """
    return 2 * _within("mass", mass, _SHARE) * _within("value_norm", value_norm, _NONNEGATIVE)


# --- 10. Sums of damages


def combine_damages(damages: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """Statement 10: D(set) <= (sum of sqrt D)^2 to second order, since sqrt D is a seminorm of the states' change.

    Exact for the quadratic form D at one point, and for its mean over samples; for the true KL divergence up to terms
    of third order. Tight when all changes push the output the same way.

    Args:
        damages: D of every member of the set, such as the layers of a plan or the two parts of an eviction, >= 0.
        dim: Axis of the members.

    Returns:
        A bound on the damage of the set, float64.

    Raises:
        ValueError: If a damage is negative.

    Example:
        >>> combine_damages(torch.tensor([1.0, 4.0])).item()
        9.0
    """
    return _within("damages", damages, _NONNEGATIVE).sqrt().sum(dim).square()


# --- 11. Continuity of the output


def total_variation_from_kl(kl: Values) -> Float[Tensor, "..."]:
    """Statement 11: TV(p, q) <= min(sqrt(KL / 2), sqrt(1 - exp(-KL))), by Pinsker and by Bretagnolle and Huber.

    Args:
        kl: KL(p || q) in nats, >= 0; either direction will do, since TV is symmetric.

    Returns:
        A bound on the total variation, in [0, 1].

    Raises:
        ValueError: If a divergence is negative.

    Example:
        >>> total_variation_from_kl(0.02).item()
        0.1
    """
    kl = _within("kl", kl, _NONNEGATIVE)
    return torch.minimum((kl / 2).sqrt(), (-torch.expm1(-kl)).sqrt())


def entropy_change_bound(tv: Values, classes: int) -> Float[Tensor, "..."]:
    """Statement 11: |H(p) - H(q)| <= TV log(K - 1) + h2(TV) (Zhang, 2007; tight for every TV <= 1 - 1/K).

    Beyond 1 - 1/K the right side falls again, so the function keeps its maximum log K: an upper bound of TV is a safe
    argument.

    Args:
        tv: Total variation or an upper bound of it, in [0, 1].
        classes: K, the number of possible outputs.

    Returns:
        A bound on the change of entropy in nats, in [0, log K].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(entropy_change_bound(0.1, classes=2).item(), 4)
        0.3251
    """
    if classes < 1:
        raise ValueError(f"`classes` is {classes}, expected 1 or more. Pass the size of the vocabulary or answer set.")
    tv = _within("tv", tv, _SHARE).clamp(max=1 - 1 / classes)
    return tv * math.log(max(classes - 1, 1)) + _binary_entropy(tv)


def answer_kl_radius(first: Values, second: Values) -> Float[Tensor, "..."]:
    """Statement 11, sharp: the smallest KL(p || q) at which the answer can change.

    It is p_1 log(2 p_1/s) + p_2 log(2 p_2/s) with s = p_1 + p_2. Any q closer to p has the same answer, and a q at this
    divergence has a tie: q_1 = q_2 = s/2. It is never below margin^2 / 2, the radius that Pinsker's inequality gives
    (ours).

    Args:
        first: p_1, the highest probability of p.
        second: p_2, the next one, at most `first`.

    Returns:
        The radius in nats, in [0, log 2].

    Raises:
        ValueError: If an argument is out of range or the two are in the wrong order.

    Example:
        >>> round(answer_kl_radius(0.6, 0.2).item(), 4)
        0.1046
    """
    first, second = _within("first", first, _SHARE), _within("second", second, _SHARE)
    if (second > first).any():
        raise ValueError(
            "`second` is above `first` somewhere, expected the two highest probabilities, highest first. "
            "Sort them: topk(2)."
        )
    half = (first + second) / 2
    return (torch.xlogy(first, first / half) + torch.xlogy(second, second / half)).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    shown: str
    advice: str
    open_low: bool = False


_DISTANCE = _Range(0, 2, "[0, 2]", "Cosine distances are 1 - cos, never rescaled.")
_THRESHOLD = _Range(0, 2, "(0, 2]", "Thresholds are cosine distances, 1 - cos, and not zero.", open_low=True)
_SHARE = _Range(0, 1, "[0, 1]", "Pass a share, not a percentage or a logit.")
_ANGLE = _Range(0, math.pi, "[0, pi]", "Angles are in radians.")
_POSITIVE = _Range(0, math.inf, "(0, inf)", "Nothing is nearer than zero.", open_low=True)
_NONNEGATIVE = _Range(0, math.inf, "[0, inf)", "Norms, damages and divergences are never negative.")
# Measured values may leave their range by rounding: a float32 pi is above pi, a KL of equal outputs is often -1e-8.
_ROUNDING = 1e-6


def _within(name: str, value: Values, allowed: _Range) -> Tensor:
    """The value as float64, cut to its range where only rounding left it; NaN passes."""
    wide = torch.as_tensor(value, dtype=torch.float64)
    outside = (wide < allowed.low - _ROUNDING) | (wide > allowed.high + _ROUNDING)
    outside |= (wide <= allowed.low) & allowed.open_low
    if outside.any():
        found = wide[outside][0].item()
        raise ValueError(f"`{name}` is {found:g}, expected a value in {allowed.shown}. {allowed.advice}")
    return wide.clamp(allowed.low, allowed.high)


def _binary_entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)


def _slopes(grad: Tensor, update: Tensor) -> Tensor:
    """The inner product over the last axis, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(grad.dtype, update.dtype), torch.float32)
    return (grad.to(wide) * update.to(wide)).sum(-1)
