"""The measures agree with float64 references on ordinary and hostile tensors, and with attention without some keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipit.theory.bounds import update_norm_from_cosine
from skipit.theory.measures import (
    angular_distance,
    block_angles,
    cosine_distance,
    eviction_term,
    per_unit_sums,
    relative_update,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("random", "near", "equal", "opposite", "zero_x", "zero_y", "zeros", "huge", "tiny", "outlier", "grown")
# No deadline: the first example pays for imports, and a busy machine is no error.
examples = settings(max_examples=60, deadline=None)


def state_pair(seed: int, dim: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors [3, dim] of states that try to break one thing."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    limits = torch.finfo(dtype)
    if kind == "near":
        y = x + y * 10.0 ** -float(torch.randint(1, 9, (), generator=generator))
    elif kind in ("equal", "opposite"):
        y = x if kind == "equal" else -x
    elif kind == "outlier":
        x[:, 0], y[:, 0] = 1e4, 1e4
    elif kind == "grown":
        y = 100 * x + y
    if kind == "huge":
        x, y = (v.clamp(-1, 1) * limits.max * 0.49 for v in (x, y))
    elif kind == "tiny":
        x, y = (v * limits.tiny * 8 for v in (x, y))
    if kind in ("zero_x", "zeros"):
        x = torch.zeros_like(x)
    if kind in ("zero_y", "zeros"):
        y = torch.zeros_like(y)
    return x.to(dtype), y.to(dtype)


pairs = st.builds(
    state_pair, st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(KINDS), st.sampled_from(DTYPES)
)


def unit64(x: Tensor) -> Tensor:
    wide = x.double()
    wide = wide / wide.abs().amax(-1, keepdim=True).clamp(min=5e-324)
    return torch.nan_to_num(wide / wide.norm(dim=-1, keepdim=True))


def tolerance(x: Tensor) -> float:
    """Rounding of a chord between unit vectors, in the dtype the measures work in."""
    return 1e-14 if x.dtype == torch.float64 else 2e-6


@examples
@given(pairs)
def test_cosine_distance_equals_the_reference_in_its_chord(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    found = cosine_distance(x, y)
    chord = (unit64(x) - unit64(y)).norm(dim=-1)
    zeros = (x == 0).all(-1).int() + (y == 0).all(-1).int()
    expected = torch.where(zeros == 1, torch.ones_like(chord), chord.square() / 2)
    # Compared as chords: this asks for a relative accuracy of small distances that 1 - cos cannot give.
    assert torch.allclose(found.double().sqrt(), expected.sqrt(), rtol=1e-5, atol=tolerance(x))
    assert found.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert ((found >= 0) & (found <= 2)).all()
    assert torch.equal(found, cosine_distance(y, x))


@examples
@given(pairs)
def test_distance_is_one_minus_the_cosine_of_the_angle(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    angle = angular_distance(x, y)
    assert ((angle >= 0) & (angle <= math.pi + 1e-6)).all()
    assert torch.allclose(1 - angle.double().cos(), cosine_distance(x, y).double(), rtol=1e-5, atol=1e-6)


def test_small_distances_survive_where_one_minus_cos_loses_them() -> None:
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([1.0, 1e-5])
    assert 1 - torch.cosine_similarity(x, y, dim=-1) == 0
    assert cosine_distance(x, y).item() == pytest.approx(5e-11, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_are_a_direction_of_their_own(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype=dtype)
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=dtype)
    assert cosine_distance(x, y).tolist() == [0.0, 1.0, 1.0]
    assert angular_distance(x, y).tolist() == pytest.approx([0.0, math.pi / 2, math.pi / 2])


@examples
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 2))
def test_angle_and_chord_obey_the_triangle_inequality_zeros_included(seed: int, dim: int, zero: int) -> None:
    states = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed % 2:
        states[zero] = 0
    x, y, z = states
    for measure in (angular_distance, lambda a, b: cosine_distance(a, b).sqrt()):
        assert measure(x, z) <= measure(x, y) + measure(y, z) + 1e-12


@examples
@given(pairs)
def test_relative_update_follows_the_law_of_cosines(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    found = relative_update(x, y)
    wide_x, wide_y = x.double(), y.double()
    scale = torch.maximum(wide_x.abs().amax(), wide_y.abs().amax()).clamp(min=5e-324)
    before, after, moved = ((v / scale).norm(dim=-1) for v in (wide_x, wide_y, wide_y - wide_x))
    expected = torch.where(moved == 0, torch.zeros_like(moved), moved / before)
    # float32 cannot hold the difference of two nearly equal float32 states better than the states themselves.
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    known = before > 0
    identity = update_norm_from_cosine(after[known] / before[known], cosine_distance(wide_x, wide_y)[known])
    assert torch.allclose(identity, expected[known], rtol=1e-6, atol=1e-7)


def test_relative_update_of_a_zero_state_is_infinite_unless_it_stays() -> None:
    x = torch.zeros(2, 3)
    assert relative_update(x, torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", [cosine_distance, angular_distance, relative_update])
def test_non_finite_states_touch_only_their_own_token(measure, bad: float) -> None:
    x, y = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    clean = measure(x, y)
    x[1, 2] = bad
    y[1] = 0
    found = measure(x, y)
    assert not found[1].isfinite()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_block_angles_compare_states_a_block_apart() -> None:
    turns = torch.arange(5) * 0.3
    states = torch.stack([turns.cos(), turns.sin()], dim=-1)[:, None, :]
    assert block_angles(states, length=3).flatten().tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("length", [0, 5])
def test_block_angles_name_the_lengths_that_fit(length: int) -> None:
    message = rf"`length` is {length}, but 5 states hold blocks of 1 to 4 layers. Pass a length in this range."
    with pytest.raises(ValueError, match=message):
        block_angles(torch.randn(5, 2, 3), length)


@examples
@given(st.integers(0, 10**6), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans())
def test_eviction_term_is_what_attention_without_the_keys_changes(
    seed: int, heads: tuple[int, int], causal: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, heads[0], 6, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(2, heads[1], 6, 5, generator=generator, dtype=torch.float64)
    evicted = torch.rand(2, 6, generator=generator) < 0.5
    evicted[:, 0] = False
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    full = scores.softmax(-1)
    without = scores.masked_fill(evicted[:, None, None, :], -math.inf).softmax(-1)
    each = values.repeat_interleave(heads[0] // heads[1], dim=1)
    found = eviction_term(full, values, evicted)
    assert torch.allclose(found, full @ each - without @ each, atol=1e-12)
    untouched = (full * evicted[:, None, None, :]).sum(-1) == 0
    assert (found[untouched] == 0).all()


def test_eviction_of_all_that_a_query_sees_is_undefined_for_that_query_only() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    found = eviction_term(weights, torch.tensor([[[[1.0], [3.0]]]]), torch.tensor([[True, False]]))
    assert math.isnan(found[0, 0, 0, 0])
    assert found[0, 0, 1, 0] == -1.0


def test_evicting_a_sink_with_tiny_values_does_no_harm_at_any_mass() -> None:
    weights = torch.tensor([[[[0.99, 0.005, 0.005]]]])
    values = torch.tensor([[[[1e-3], [1e-3], [-1e-3]]]])
    assert eviction_term(weights, values, torch.tensor([[True, False, False]])).abs().item() < 1e-3


def test_eviction_term_names_heads_that_do_not_group() -> None:
    with pytest.raises(ValueError, match=r"`weights` has 4 heads and `values` 3: the first must be a multiple"):
        eviction_term(torch.rand(1, 4, 2, 2), torch.rand(1, 3, 2, 5), torch.zeros(1, 2, dtype=torch.bool))


@examples
@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_per_unit_sums_equal_a_loop_over_tokens(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 8, generator=generator).to(dtype)
    values[torch.rand(3, 8, generator=generator) < 0.2] = math.nan
    values[torch.rand(3, 8, generator=generator) < 0.1] = math.inf
    modality = torch.randint(-1, 2, (3, 8), generator=generator)
    found = per_unit_sums(values, modality)
    pairs = list(zip(values.flatten().tolist(), modality.flatten().tolist(), strict=True))
    for m in (0, 1):
        mine = [v for v, kind in pairs if kind == m]
        good = [v for v in mine if math.isfinite(v)]
        assert found.total[m].item() == pytest.approx(math.fsum(good), abs=1e-12)
        assert (found.count[m].item(), found.dropped[m].item()) == (len(good), len(mine) - len(good))


def test_per_unit_sums_do_not_lose_small_values_in_half_precision() -> None:
    values = torch.full((1, 100_000), 0.1, dtype=torch.bfloat16)
    total = per_unit_sums(values, torch.zeros(1, 100_000, dtype=torch.long)).total[0].item()
    assert total == pytest.approx(100_000 * values[0, 0].item(), rel=1e-12)


def test_per_unit_sums_name_an_unknown_modality() -> None:
    message = r"`modality` holds the id 2, expected 0 text, 1 vision or -1 for tokens that do not count. Map other ids"
    with pytest.raises(ValueError, match=message):
        per_unit_sums(torch.zeros(1, 2), torch.tensor([[0, 2]]))
