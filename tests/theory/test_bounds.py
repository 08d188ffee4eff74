"""Every statement of docs/theory.md holds on random and hostile input, and is tight where the document says so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipit.theory.bounds import (
    answer_kl_radius,
    block_angle_bound,
    block_geometric_bound,
    combine_damages,
    entropy_change_bound,
    eviction_output_change,
    fano_entropy_bound,
    fisher_damage,
    fisher_damage_joint,
    geometric_from_proximal,
    neighbour_counts,
    path_identity,
    pinsker_risk_gap,
    probe_gap_bound,
    probe_gap_bound_from_proximal,
    proximal_from_geometric,
    total_variation_from_kl,
    update_norm_from_cosine,
)
from skipit.theory.measures import angular_distance, cosine_distance, eviction_term, relative_update

# No deadline: the first example pays for imports, and a busy machine is no error.
examples = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)
thresholds = st.floats(1e-6, 2)
SLACK = 1e-9


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def simplex(generator: torch.Generator, *shape: int, sharpness: float = 1.0) -> Tensor:
    """Distributions over the last axis; a high sharpness gives confident ones."""
    return (sharpness * normal(generator, *shape)).softmax(-1)


def layer_states(generator: torch.Generator, layers: int, tokens: int = 12, dim: int = 5) -> Tensor:
    """States [layers + 1, tokens, dim] whose updates range from invisible to overwhelming, some of them zero."""
    states = [normal(generator, tokens, dim)]
    for _ in range(layers):
        size = 10 ** (-6 + 8 * torch.rand(tokens, 1, generator=generator, dtype=torch.float64))
        states.append(states[-1] + size * normal(generator, tokens, dim))
    stacked = torch.stack(states)
    stacked[int(torch.randint(layers + 1, (), generator=generator)), 0] = 0
    stacked[-1, 1] = -stacked[0, 1]
    return stacked


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum()


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def conditional_entropy(joint: Tensor) -> Tensor:
    """H(second | first) of a joint table [first, second]."""
    return entropy(joint) - entropy(joint.sum(1))


def mutual_information(joint: Tensor) -> Tensor:
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


# --- Statement 1


@examples
@given(seeds, thresholds)
def test_1_geometric_and_proximal_bound_each_other(seed: int, t: float) -> None:
    x, y = layer_states(source(seed), 1)
    distance = cosine_distance(x, y)
    geo, prox = distance.mean().item(), (distance >= t).double().mean().item()
    assert prox <= proximal_from_geometric(geo, t) + SLACK
    assert geo <= geometric_from_proximal(prox, t) + SLACK


@examples
@given(thresholds, st.floats(0, 1))
def test_1_is_tight_on_two_point_distributions(t: float, share: float) -> None:
    assert proximal_from_geometric(share * t, t).item() == pytest.approx(share)
    assert geometric_from_proximal(share, t).item() == pytest.approx((1 - share) * t + share * 2)


# --- Statement 2


@examples
@given(seeds)
def test_2_cosine_and_norm_give_the_update(seed: int) -> None:
    x, y = layer_states(source(seed), 1)
    known = x.norm(dim=-1) > 0
    found = update_norm_from_cosine(y.norm(dim=-1)[known] / x.norm(dim=-1)[known], cosine_distance(x, y)[known])
    assert torch.allclose(found, relative_update(x, y)[known], rtol=1e-7, atol=1e-9)


# --- Statement 3


@examples
@given(seeds, st.integers(1, 6))
def test_3_angles_of_layers_bound_the_block(seed: int, layers: int) -> None:
    states = layer_states(source(seed), layers)
    angles, block = angular_distance(states[:-1], states[1:]), angular_distance(states[0], states[-1])
    bound = block_angle_bound(angles.T)
    assert (block <= bound + SLACK).all()
    assert (cosine_distance(states[0], states[-1]) <= 1 - bound.cos() + SLACK).all()
    assert block.mean() <= block_angle_bound(angles.mean(1)) + SLACK


@examples
@given(seeds, st.integers(1, 6))
def test_3_mean_distances_of_layers_bound_the_block(seed: int, layers: int) -> None:
    states = layer_states(source(seed), layers)
    geos = cosine_distance(states[:-1], states[1:]).mean(1)
    assert cosine_distance(states[0], states[-1]).mean() <= block_geometric_bound(geos) + SLACK


@examples
@given(st.lists(st.floats(0, 0.5), min_size=2, max_size=5))
def test_3_is_tight_for_turns_in_one_plane_where_cosine_distances_do_not_add_up(turns: list[float]) -> None:
    position = torch.tensor([0.0, *turns], dtype=torch.float64).cumsum(0)
    states = torch.stack([position.cos(), position.sin()], -1)
    angles = angular_distance(states[:-1], states[1:])
    block = angular_distance(states[0], states[-1])
    assert block.item() == pytest.approx(block_angle_bound(angles).item(), abs=1e-9)
    if min(turns) > 1e-3:
        assert cosine_distance(states[0], states[-1]) > cosine_distance(states[:-1], states[1:]).sum()


def test_3_mean_bound_is_sharp_for_small_turns_in_one_plane() -> None:
    position = torch.arange(6, dtype=torch.float64) * 1e-3
    states = torch.stack([position.cos(), position.sin()], -1)
    bound = block_geometric_bound(cosine_distance(states[:-1], states[1:]))
    assert cosine_distance(states[0], states[-1]).item() == pytest.approx(bound.item(), rel=1e-4)


# --- Statement 4


def probe_losses(directions: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(directions @ weight.T + bias, labels, reduction="none")


@examples
@given(seeds, thresholds, st.floats(0.1, 50))
def test_4_no_softmax_linear_probe_changes_by_more(seed: int, t: float, norm: float) -> None:
    generator = source(seed)
    x, y = layer_states(generator, 1)
    distance, labels = cosine_distance(x, y), torch.randint(0, 4, (len(x),), generator=generator)
    before, after = (torch.nn.functional.normalize(v, dim=-1) for v in (x, y))
    means = []
    for _ in range(8):
        weight = normal(generator, 4, x.shape[-1])
        weight *= norm / torch.linalg.matrix_norm(weight, 2)
        bias = 3 * normal(generator, 4)
        means.append([probe_losses(n, weight, bias, labels).mean() for n in (before, after)])
    losses = torch.tensor(means, dtype=torch.float64)
    gap = (losses[:, 0] - losses[:, 1]).abs().max()
    bound = probe_gap_bound(distance.mean(), norm)
    assert gap <= bound + SLACK
    # The V-information gap of a family: between the best probe on each side, which need not be the same.
    assert (losses[:, 0].min() - losses[:, 1].min()).abs() <= bound + SLACK
    prox = (distance >= t).double().mean()
    assert gap <= probe_gap_bound_from_proximal(prox, t, math.sqrt(2) * norm) + SLACK


def test_4_constant_is_sharp() -> None:
    norm, angle = 5.0, 1e-4
    weight = norm / math.sqrt(2) * torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([40.0, 0.0], dtype=torch.float64)  # the probe is sure of class 0, and the label is 1
    states = torch.tensor([[0.0, 1.0], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    before, after = probe_losses(states, weight, bias, torch.tensor([1, 1]))
    bound = probe_gap_bound(cosine_distance(states[0], states[1]), norm)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(norm)
    assert (after - before).item() == pytest.approx(bound.item(), rel=1e-6)


@examples
@given(thresholds, st.floats(0, 1), st.floats(0.1, 10))
def test_4_proximal_form_is_tight(t: float, share: float, lipschitz: float) -> None:
    """All tokens start in one direction, the loss is the chord from it; most move by almost t, the rest turn round."""
    near = torch.tensor([1 - t, math.sqrt(max(0.0, t * (2 - t)))], dtype=torch.float64)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss = lipschitz * torch.stack([(near - start).norm(), (-2 * start).norm()])
    gap = (1 - share) * loss[0] + share * loss[1]
    assert gap.item() == pytest.approx(probe_gap_bound_from_proximal(share, t, lipschitz).item())


# --- Statement 5


def random_alphabet(seed: int, symbols: int) -> tuple[Tensor, Tensor]:
    """Distances between random states and a joint law of (x, x_next), from almost a copy to almost independent."""
    generator = source(seed)
    states = normal(generator, symbols, 3)
    distances = cosine_distance(states[:, None].expand(-1, symbols, -1), states[None].expand(symbols, -1, -1))
    attraction = 10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
    channel = (normal(generator, symbols, symbols) - attraction * distances).softmax(-1)
    return distances, simplex(generator, symbols)[:, None] * channel


@examples
@given(seeds, st.integers(2, 9), st.floats(1e-3, 2))
def test_5_fano_holds_on_every_finite_alphabet(seed: int, symbols: int, t: float) -> None:
    distances, joint = random_alphabet(seed, symbols)
    prox = joint[distances >= t].sum().item()
    n_min, n_max = neighbour_counts(distances, t)
    assert (n_min, n_max) == (min(counts := [sum(d < t for d in row) for row in distances.tolist()]), max(counts))
    bound = fano_entropy_bound(min(prox, 1.0), symbols, n_min, n_max)
    assert conditional_entropy(joint) <= bound + SLACK
    # What the layer adds about any answer is no more than that.
    answer = simplex(source(seed + 1), symbols, symbols, 3, sharpness=3.0)
    full = joint[..., None] * answer
    assert mutual_information(full.sum(0)) - mutual_information(full.sum(1)) <= bound + SLACK


@examples
@given(st.integers(2, 9), st.floats(0, 1))
def test_5_is_tight_when_all_neighbourhoods_are_alike(half: int, share: float) -> None:
    """On a ring of 2n symbols, x_next is uniform over the three nearest or uniform over the rest."""
    symbols, near = 2 * half, 3
    far = symbols - near
    p = share * far / (far + near)
    position = torch.arange(symbols)
    ring = (position[:, None] - position).abs()
    distances = torch.minimum(ring, symbols - ring).double()
    counts = neighbour_counts(distances, 1.5)
    assert counts == (near, near)
    assert neighbour_counts(distances, 1.0) == (1, 1), "at distance t a symbol is far, as in prox"
    channel = torch.full_like(distances, p / far).masked_fill(distances < 1.5, (1 - p) / near)
    joint = channel / symbols
    assert conditional_entropy(joint).item() == pytest.approx(fano_entropy_bound(p, symbols, *counts).item())


def test_5_counts_the_neighbours_on_the_right_side() -> None:
    """A star: its centre is near every symbol, a leaf only near itself and the centre; far needs that one."""
    symbols, p = 50, 0.4
    distances = torch.full((symbols, symbols), 2.0)
    distances[0, :] = distances[:, 0] = 1.0
    distances.fill_diagonal_(0)
    counts = neighbour_counts(distances, 1.5)
    assert counts == (2, symbols)
    joint = torch.zeros(symbols, symbols, dtype=torch.float64)
    joint[0] = (1 - p) / symbols
    joint[1, 2:] = p / (symbols - 2)
    assert joint[distances >= 1.5].sum().item() == pytest.approx(p)
    entropy_of_next = conditional_entropy(joint).item()
    assert entropy_of_next == pytest.approx(p * math.log(48) + (1 - p) * math.log(50))
    assert entropy_of_next <= fano_entropy_bound(p, symbols, *counts).item() + SLACK


@examples
@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 50), st.data())
def test_5_accepts_an_upper_bound_of_prox(p: float, larger: float, symbols: int, data: st.DataObject) -> None:
    n_max = data.draw(st.integers(1, symbols))
    n_min = data.draw(st.integers(1, n_max))
    low, high = (fano_entropy_bound(v, symbols, n_min, n_max).item() for v in (p, max(p, larger)))
    assert low <= high + SLACK
    assert high <= math.log(symbols) + SLACK


def test_5_the_textbook_form_would_not_accept_one() -> None:
    """With prox = 2/3 the entropy is log 3, yet the right side at the valid upper bound 1 is log 2."""
    assert math.log(2) < math.log(3) <= fano_entropy_bound(1.0, 3, 1, 1).item() + SLACK


# --- Statement 6


def bayes_risk(joint: Tensor, losses: Tensor) -> Tensor:
    """Smallest mean loss of an action chosen after seeing the first variable of a table [seen, answer]."""
    return (joint @ losses.T).min(-1).values.sum()


@examples
@given(seeds, st.booleans(), st.floats(0.1, 10))
def test_6_information_bounds_the_risk_gap(seed: int, markov: bool, loss_range: float) -> None:
    generator = source(seed)
    pair = simplex(generator, 12, sharpness=2.0).view(3, 4)
    answer = simplex(generator, 4, 3, sharpness=3.0) if markov else simplex(generator, 3, 4, 3, sharpness=3.0)
    joint = pair[..., None] * answer  # [x, x_next, answer]
    losses = loss_range * torch.rand(5, 3, generator=generator, dtype=torch.float64)
    gap = bayes_risk(joint.sum(1), losses) - bayes_risk(joint.sum(0), losses)
    gained = mutual_information(joint.reshape(12, 3)) - mutual_information(joint.sum(1))
    assert gap <= pinsker_risk_gap(gained.clamp(min=0), loss_range) + SLACK
    if markov:
        difference = mutual_information(joint.sum(0)) - mutual_information(joint.sum(1))
        assert difference.item() == pytest.approx(gained.item(), abs=1e-12)
        assert gap >= -SLACK
    assert gap <= pinsker_risk_gap(conditional_entropy(pair), loss_range) + SLACK


def test_6_the_difference_of_informations_is_not_enough_without_the_chain() -> None:
    """A channel that erases and one that flips carry the same information about a bit, but not the same risk."""
    flip = 0.11
    erase = -(flip * math.log2(flip) + (1 - flip) * math.log2(1 - flip))
    erased = torch.tensor([[1 - erase, 0], [erase, erase], [0, 1 - erase]], dtype=torch.float64) / 2
    flipped = torch.tensor([[1 - flip, flip], [flip, 1 - flip]], dtype=torch.float64) / 2
    assert mutual_information(erased).item() == pytest.approx(mutual_information(flipped).item())
    losses = 1 - torch.eye(2, dtype=torch.float64)
    assert bayes_risk(erased, losses) - bayes_risk(flipped, losses) > 0.1
    joint = erased[:, None, :] * flipped[None] / 0.5
    gained = mutual_information(joint.reshape(6, 2)) - mutual_information(erased)
    assert bayes_risk(erased, losses) - bayes_risk(flipped, losses) <= pinsker_risk_gap(gained, 1.0)


def test_6_never_exceeds_the_range_of_the_loss() -> None:
    assert pinsker_risk_gap(1e9, 3.0).item() == 3.0


# --- Statement 7


def small_network(seed: int, activation: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), activation, torch.nn.Linear(16, 3)).double()


@examples
@given(seeds, st.floats(0.01, 2), st.booleans())
def test_7_the_path_integral_is_the_loss_change(seed: int, size: float, part: bool) -> None:
    network, generator = small_network(seed, torch.nn.Tanh()), source(seed)
    x_next, update = normal(generator, 2, 4, 5), size * normal(generator, 2, 4, 5)
    if part:
        update[:, 1:3] = 0

    def rest(x: Tensor) -> Tensor:
        return network(x).mean(1).log_softmax(-1)[:, 0].neg().mean()

    with torch.no_grad():
        difference = rest(x_next - update) - rest(x_next)
    found = path_identity(rest, x_next, update, nodes=32)
    assert found.change.item() == pytest.approx(difference.item(), abs=1e-7)
    assert found.change.abs() <= found.bound + SLACK


def test_7_converges_across_the_kinks_of_relu() -> None:
    network, generator = small_network(0, torch.nn.ReLU()), source(0)
    x_next, update = normal(generator, 4, 5), normal(generator, 4, 5)
    exact = (network(x_next - update).square().sum() - network(x_next).square().sum()).item()
    found = path_identity(lambda x: network(x).square().sum(), x_next, update, nodes=256)
    assert found.change.item() == pytest.approx(exact, rel=1e-3)


def test_7_bound_is_tight_when_the_gradient_is_the_update() -> None:
    update = torch.tensor([3.0, 4.0])
    found = path_identity(lambda x: x @ update, torch.zeros(2), update, nodes=1)
    assert found.change.item() == pytest.approx(-25.0)
    assert found.bound.item() == pytest.approx(25.0)


# --- Statement 8


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_8_damage_is_the_divergence_to_second_order(seed: int, joint: bool) -> None:
    network, generator = small_network(seed, torch.nn.Tanh()), source(seed)
    x_next, direction = normal(generator, 1, 4, 5), normal(generator, 1, 4, 5)
    tokens = torch.tensor([[True, joint, False, joint]])

    def log_p(x: Tensor) -> Tensor:
        return network(x).mean(1).log_softmax(-1)[0]

    point = x_next.clone().requires_grad_()
    grads = [torch.autograd.grad(log_p(point)[y], point)[0] for y in range(3)]
    p = log_p(x_next).detach()
    errors = []
    for size in (0.02, 0.01):
        update = size * direction
        damage = sum(p.exp()[y] * fisher_damage_joint(grads[y], update, tokens)[0] for y in range(3))
        if not joint:
            assert torch.allclose(damage, sum(p.exp()[y] * fisher_damage(grads[y], update)[0, 0] for y in range(3)))
        true = kl_divergence(p.exp(), log_p(x_next - update * tokens[..., None]).detach().exp())
        errors.append(abs(true - damage).item())
    # Half the update, about an eighth of the error: it is of third order.
    assert errors[1] <= errors[0] / 5 + 1e-9
    assert errors[1] <= 0.5 * damage + 1e-9


def test_8_half_precision_is_accumulated_in_float32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert fisher_damage(ones, ones).item() == 4096**2 / 2
    assert fisher_damage(ones.half() * 200, ones.half() * 200).isfinite()


# --- Statement 9


@examples
@given(seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_9_mass_and_value_norm_bound_the_change(seed: int, dtype: torch.dtype) -> None:
    generator = source(seed)
    weights = simplex(generator, 2, 3, 4, 6, sharpness=3.0).to(dtype)
    values = (10 * normal(generator, 2, 3, 6, 5)).to(dtype)
    evicted = torch.rand(2, 6, generator=generator) < 0.5
    evicted[:, 0] = False
    change = eviction_term(weights, values, evicted).norm(dim=-1)
    head_mass = (weights.to(change) * evicted[:, None, None]).sum(-1).clamp(max=1)
    largest = values.float().norm(dim=-1).amax(-1)[..., None]
    # Rows of rounded bfloat16 weights sum to one only to about one percent.
    slack = 1.02 if dtype == torch.bfloat16 else 1 + 1e-5
    assert (change <= slack * eviction_output_change(head_mass, largest) + 1e-6).all()


def test_9_is_tight_for_opposite_values() -> None:
    weights = torch.tensor([[[[0.3, 0.7]]]])
    change = eviction_term(weights, torch.tensor([[[[-2.0], [2.0]]]]), torch.tensor([[True, False]]))
    assert change.abs().item() == pytest.approx(eviction_output_change(0.3, 2.0).item())


# --- Statement 10


@examples
@given(seeds, st.integers(1, 6))
def test_10_damages_of_a_set_are_bounded_by_their_square_roots(seed: int, members: int) -> None:
    generator = source(seed)
    factor, changes = normal(generator, 3, 8), normal(generator, members, 8)
    damage = (changes @ factor.T).square().sum(-1) / 2
    together = (changes.sum(0) @ factor.T).square().sum() / 2
    assert together <= combine_damages(damage) + SLACK
    # Means over samples obey it too: a sample's own scale does not matter.
    scales = torch.rand(20, members, generator=generator, dtype=torch.float64)
    one_by_one = (scales.square() * damage).mean(0)
    jointly = ((scales @ changes) @ factor.T).square().sum(-1).mean() / 2
    assert jointly <= combine_damages(one_by_one) + SLACK


@examples
@given(seeds)
def test_10_tokens_skipped_together_are_bounded_by_the_single_ones(seed: int) -> None:
    generator = source(seed)
    grad, update = normal(generator, 2, 5, 3), normal(generator, 2, 5, 3)
    tokens = torch.rand(2, 5, generator=generator) < 0.6
    single = fisher_damage(grad, update) * tokens
    assert (fisher_damage_joint(grad, update, tokens) <= combine_damages(single) + SLACK).all()


def test_10_is_tight_for_parallel_changes() -> None:
    ones = torch.ones(1, 3, 1)
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert fisher_damage_joint(ones, ones, everything).item() == pytest.approx(
        combine_damages(fisher_damage(ones, ones)).item()
    )


# --- Statement 11


def two_outputs(seed: int, classes: int) -> tuple[Tensor, Tensor]:
    """Two output distributions, from nearly equal to nearly disjoint."""
    generator = source(seed)
    sharpness = 10 ** (2 * torch.rand((), generator=generator).item() - 1)
    p, other = simplex(generator, 2, classes, sharpness=sharpness)
    mix = 10 ** (-3 * torch.rand((), generator=generator).item())
    return p, (1 - mix) * p + mix * other


@examples
@given(seeds, st.integers(2, 12))
def test_11_divergence_bounds_variation_entropy_and_answer(seed: int, classes: int) -> None:
    p, q = two_outputs(seed, classes)
    variation = (p - q).abs().sum() / 2
    for kl in (kl_divergence(p, q), kl_divergence(q, p)):
        assert variation <= total_variation_from_kl(kl.clamp(min=0)) + SLACK
        change = (entropy(p) - entropy(q)).abs()
        assert change <= entropy_change_bound(variation, classes) + SLACK
        assert change <= entropy_change_bound(total_variation_from_kl(kl.clamp(min=0)), classes) + SLACK
    kl = kl_divergence(p, q).clamp(min=0)
    first, second = p.topk(2).values
    if first - second > 2 * variation + SLACK:
        assert p.argmax() == q.argmax()
    if first - second > 2 * total_variation_from_kl(kl):
        assert kl < answer_kl_radius(first, second) + SLACK
    if kl < answer_kl_radius(first, second):
        assert p.argmax() == q.argmax()


@examples
@given(st.integers(2, 12), st.floats(0, 1))
def test_11_entropy_bound_is_tight(classes: int, share: float) -> None:
    variation = share * (1 - 1 / classes)
    sure = torch.zeros(classes, dtype=torch.float64)
    sure[0] = 1
    spread = torch.full((classes,), variation / (classes - 1), dtype=torch.float64)
    spread[0] = 1 - variation
    bound = entropy_change_bound(variation, classes).item()
    assert (entropy(spread) - entropy(sure)).item() == pytest.approx(bound, abs=1e-9)


@examples
@given(seeds, st.integers(2, 12))
def test_11_the_answer_radius_is_exact(seed: int, classes: int) -> None:
    p = simplex(source(seed), classes).sort(descending=True).values
    tie = p.clone()
    tie[:2] = p[:2].mean()
    radius = answer_kl_radius(p[0], p[1]).item()
    assert kl_divergence(p, tie).item() == pytest.approx(radius, abs=1e-12)
    assert radius >= (p[0] - p[1]).square().item() / 2 - SLACK


def test_11_edge_cases() -> None:
    assert answer_kl_radius(1.0, 0.0).item() == pytest.approx(math.log(2))
    assert answer_kl_radius(0.0, 0.0).item() == 0.0
    assert entropy_change_bound(1.0, 1).item() == 0.0
    assert entropy_change_bound(1.0, 8).item() == pytest.approx(math.log(8))
    assert total_variation_from_kl(math.inf).item() == 1.0
    assert not 2 * total_variation_from_kl(math.inf) < 1.0


# --- Input


def test_units_without_samples_stay_nan() -> None:
    empty = torch.tensor([math.nan, 0.5])
    for bound in (
        proximal_from_geometric(empty, 0.1),
        geometric_from_proximal(empty, 0.1),
        probe_gap_bound(empty, 1.0),
        fano_entropy_bound(empty, 8, 1, 2),
        pinsker_risk_gap(empty, 1.0),
        total_variation_from_kl(empty),
        entropy_change_bound(empty, 8),
    ):
        assert bound.isnan().tolist() == [True, False]
        assert bound.dtype == torch.float64


def test_rounding_beyond_the_range_is_cut_not_refused() -> None:
    assert total_variation_from_kl(-1e-8).item() == 0.0
    assert block_angle_bound(torch.tensor([math.pi], dtype=torch.float32)).item() == math.pi
    assert combine_damages(torch.tensor([-1e-9, 4.0])).item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: proximal_from_geometric(2.5, 0.1),
            r"`geo` is 2.5, expected a value in \[0, 2\]. Cosine distances are 1",
        ),
        (lambda: proximal_from_geometric(0.5, 0.0), r"`t` is 0, expected a value in \(0, 2\]. Thresholds are cosine"),
        (lambda: geometric_from_proximal(50, 0.1), r"`prox` is 50, expected a value in \[0, 1\]. Pass a share, not a"),
        (
            lambda: update_norm_from_cosine(-1.0, 0.1),
            r"`norm_ratio` is -1, expected a value in \[0, inf\). Norms, damages",
        ),
        (
            lambda: block_angle_bound(torch.tensor([90.0])),
            r"`angles` is 90, expected a value in \[0, pi\]. Angles are in r",
        ),
        (lambda: block_geometric_bound(torch.tensor([0.1, 3.0])), r"`geos` is 3, expected a value in \[0, 2\]"),
        (lambda: probe_gap_bound(0.1, -2.0), r"`weight_norm` is -2, expected a value in \[0, inf\)"),
        (lambda: neighbour_counts(torch.zeros(2, 2), 0.0), r"`t` is 0, expected a value in \(0, inf\)"),
        (lambda: fano_entropy_bound(0.1, 4, 0, 2), r"`n_min`, `n_max`, `alphabet` are 0, 2, 4, expected 1 <= n_min <="),
        (lambda: pinsker_risk_gap(-1.0, 1.0), r"`information` is -1, expected a value in \[0, inf\)"),
        (lambda: eviction_output_change(1.5, 1.0), r"`mass` is 1.5, expected a value in \[0, 1\]"),
        (lambda: combine_damages(torch.tensor([-1.0])), r"`damages` is -1, expected a value in \[0, inf\)"),
        (lambda: entropy_change_bound(0.1, 0), r"`classes` is 0, expected 1 or more. Pass the size of the vocabulary"),
        (lambda: total_variation_from_kl(-1.0), r"`kl` is -1, expected a value in \[0, inf\)"),
        (
            lambda: answer_kl_radius(0.2, 0.6),
            r"`second` is above `first` somewhere, expected the two highest .* topk\(2\)",
        ),
        (lambda: path_identity(torch.sum, torch.ones(2), torch.ones(2), nodes=0), r"`nodes` is 0, expected 1 or more"),
        (
            lambda: path_identity(lambda x: 2 * x, torch.ones(2), torch.ones(2)),
            r"`rest` returned a tensor of shape \[2\], expected a scalar loss. Sum or average it.",
        ),
    ],
)
def test_errors_say_what_was_got_and_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
