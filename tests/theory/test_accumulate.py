"""Accumulated redundancy equals a loop over tokens, however the tokens are split over batches and ranks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipit.theory.accumulate import RedundancyMetric
from skipit.theory.measures import angular_distance, cosine_distance, relative_update
from skipit.theory.redundancy import (
    BINS_PER_DECADE,
    DISTANCE_EDGES,
    distance_histogram,
    prox,
    prox_bounds,
)

LAYERS = 2
# No deadline: the first example pays for imports, and a busy machine is no error.
examples = settings(max_examples=40, deadline=None)

Batch = tuple[list[Tensor], Tensor]


def make_batch(seed: int, dtype: torch.dtype = torch.float32, rows: int = 2) -> Batch:
    """States that enter each layer and leave the last, and modality ids; updates range over many decades."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(rows, 7, 6, generator=generator)]
    for _ in range(LAYERS):
        size = 10 ** (-5 * torch.rand(rows, 7, 1, generator=generator))
        states.append(states[-1] + size * torch.randn(rows, 7, 6, generator=generator))
    return [x.to(dtype) for x in states], torch.randint(-1, 2, (rows, 7), generator=generator)


def add(metric: RedundancyMetric, batch: Batch) -> RedundancyMetric:
    states, modality = batch
    for layer, (x, x_next) in enumerate(pairwise(states)):
        metric.update(layer, x, x_next, modality)
    return metric


def accumulated(*batches: Batch) -> RedundancyMetric:
    metric = RedundancyMetric(LAYERS)
    for batch in batches:
        add(metric, batch)
    return metric


def sample_histogram(distances: list[float]) -> Tensor:
    distance = torch.tensor([distances], dtype=torch.float64)
    return distance_histogram(distance, torch.zeros_like(distance, dtype=torch.long))[0]


@examples
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_means_and_counts_equal_those_of_the_tokens(seed: int, dtype: torch.dtype) -> None:
    batches = [make_batch(seed, dtype), make_batch(seed + 1, dtype)]
    found = accumulated(*batches).compute()
    for layer in range(LAYERS):
        for m in (0, 1):
            x = torch.cat([states[layer][modality == m] for states, modality in batches])
            y = torch.cat([states[layer + 1][modality == m] for states, modality in batches])
            assert found.count[layer, m] == found.update_count[layer, m] == len(x)
            for mean, measure in (
                (found.geometric, cosine_distance),
                (found.angle, angular_distance),
                (found.update, relative_update),
            ):
                assert torch.allclose(mean[layer, m], measure(x, y).double().mean(), rtol=1e-12, equal_nan=True)
    assert (found.dropped == 0).all()
    assert torch.equal(found.histogram.sum(-1), found.count)


@examples
@given(st.integers(0, 10**6))
def test_two_halves_merged_are_exactly_the_whole(seed: int) -> None:
    first, second = make_batch(seed), make_batch(seed + 1)
    whole, half = accumulated(first, second), accumulated(first)
    half.merge_state(accumulated(second))
    for name, state in whole.metric_state.items():
        assert torch.equal(half.metric_state[name], state), name


@examples
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_order_and_split_do_not_matter(seed: int, random) -> None:
    batches = [make_batch(seed + i) for i in range(5)]
    shuffled = random.sample(batches, len(batches))
    cut = random.randint(0, 5)
    merged = accumulated(*shuffled[:cut])
    merged.merge_state(accumulated(*shuffled[cut:]))
    for name, state in accumulated(*batches).metric_state.items():
        if state.is_floating_point():
            assert torch.allclose(merged.metric_state[name], state, rtol=1e-13), name
        else:
            assert torch.equal(merged.metric_state[name], state), name


def test_ranks_reduce_by_summing_their_states() -> None:
    batch = make_batch(3)
    alone = accumulated(batch).compute()
    twice = RedundancyMetric(
        LAYERS, dist_sync_fn=lambda state, group: [state, state], distributed_available_fn=lambda: True
    )
    both = add(twice, batch).compute()
    assert torch.equal(both.count, 2 * alone.count)
    assert torch.equal(both.histogram, 2 * alone.histogram)
    assert torch.equal(both.geometric, alone.geometric)


def test_a_token_that_is_not_finite_is_counted_and_left_out() -> None:
    states, modality = make_batch(0)
    modality[:] = 1
    clean = accumulated((states, modality)).compute()
    row, column = 1, 4
    states[1][row, column, 2] = math.nan
    found = accumulated((states, modality)).compute()
    assert found.dropped.tolist() == [[0, 1], [0, 1]]
    assert torch.equal(found.count, clean.count - found.dropped)
    modality[row, column] = -1
    left_out = accumulated((states, modality)).compute()
    for name in ("geometric", "angle", "update", "count", "histogram"):
        assert torch.equal(getattr(found, name)[:, 1], getattr(left_out, name)[:, 1]), name


def test_a_zero_state_has_a_distance_but_no_relative_update() -> None:
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    metric = RedundancyMetric(1)
    metric.update(0, x, torch.ones(1, 2, 2), torch.tensor([[0, 0]]))
    found = metric.compute()
    assert (found.count[0, 0], found.update_count[0, 0], found.dropped[0, 0]) == (2, 1, 0)
    assert found.update[0, 0] == 1.0


def test_units_without_tokens_have_nan_means_and_zero_counts() -> None:
    metric = RedundancyMetric(1)
    metric.update(0, torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.tensor([[0, -1]]))
    found = metric.compute()
    assert found.geometric[0].tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    assert found.count[0].tolist() == [1, 0]
    for answer in (prox(found.histogram, 0.3), *prox_bounds(found.histogram, 0.3)):
        assert answer[0, 0].isfinite()
        assert answer[0, 1].isnan()


def test_reset_forgets_everything() -> None:
    metric = accumulated(make_batch(0))
    metric.reset()
    assert all((state == 0).all() for state in metric.metric_state.values())


distances = st.lists(
    st.one_of(
        st.floats(0, 2),
        st.floats(-12, 0.3).map(lambda e: min(2.0, 10.0**e)),
        st.sampled_from([0.0, 1e-10, 0.1, 1.0, 2.0]),
    ),
    min_size=1,
    max_size=40,
)


@examples
@given(distances, st.one_of(st.floats(0, 2), st.floats(-12, 0.3).map(lambda e: 10.0**e)))
def test_prox_lies_within_its_bounds_around_the_truth(sample: list[float], t: float) -> None:
    histogram = sample_histogram(sample)
    truth = sum(d >= t for d in sample) / len(sample)
    lower, upper = (end.item() for end in prox_bounds(histogram, t))
    assert lower <= truth <= upper
    assert lower <= prox(histogram, t).item() <= upper
    j = int((t >= DISTANCE_EDGES).sum()) - 1
    assert upper - lower <= histogram[j].item() / len(sample) + 1e-12


@examples
@given(distances)
def test_prox_is_exact_at_every_edge_and_falls_with_t(sample: list[float]) -> None:
    histogram = sample_histogram(sample)
    edges = [*DISTANCE_EDGES.tolist()[:: BINS_PER_DECADE // 4], 2.0]
    found = [prox(histogram, t).item() for t in edges]
    assert found == [sum(d >= t for d in sample) / len(sample) for t in edges]
    between = [prox(histogram, t).item() for t in torch.linspace(0, 2, 57).tolist()]
    assert all(a >= b - 1e-12 for a, b in pairwise(between))


def test_the_usual_thresholds_are_edges() -> None:
    edges = DISTANCE_EDGES.tolist()
    assert all(t in edges for t in (0.0, 1e-10, 1e-5, 0.001, 0.01, 0.1, 1.0, 2.0))
    assert all(a < b for a, b in pairwise(edges))
    assert max(b / a for a, b in pairwise(edges[1:])) <= 10 ** (1 / BINS_PER_DECADE) * (1 + 1e-12)


@examples
@given(distances, st.floats(0, 1))
def test_a_quantile_is_known_to_one_bin(sample: list[float], q: float) -> None:
    rank = max(math.ceil(q * len(sample) - 1e-9), 1)
    found = DISTANCE_EDGES[torch.searchsorted(sample_histogram(sample).cumsum(-1), rank)].item()
    truth = sorted(sample)[rank - 1]
    assert abs(found - truth) <= max(1e-10, (10 ** (1 / BINS_PER_DECADE) - 1) * max(found, truth)) + 1e-15


def test_histogram_keeps_shape_over_layers_and_modalities() -> None:
    found = accumulated(make_batch(0)).compute()
    assert prox(found.histogram, 0.01).shape == (LAYERS, 2)


def test_errors_say_what_was_got_and_expected() -> None:
    with pytest.raises(ValueError, match=r"`num_layers` is 0, expected 1 or more. Pass the number of decoder layers."):
        RedundancyMetric(0)
    values, metric = (torch.ones(1, 2, 3), torch.ones(1, 2, 3)), RedundancyMetric(2)
    with pytest.raises(ValueError, match=r"`layer` is 2, expected 0 to 1. Make the metric with the model's number"):
        metric.update(2, *values, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"`modality` holds the id 3, expected 0 text, 1 vision or -1"):
        metric.update(0, *values, torch.tensor([[0, 3]]))


def test_questions_out_of_range_are_refused() -> None:
    histogram = sample_histogram([0.5])
    with pytest.raises(
        ValueError, match=r"`t` is 2.5, expected a cosine distance in \[0, 2\]. Pass the threshold unscaled."
    ):
        prox(histogram, 2.5)
    with pytest.raises(ValueError, match=r"`t` is nan, expected a cosine distance in \[0, 2\]"):
        prox_bounds(histogram, math.nan)
    with pytest.raises(ValueError, match=r"`histogram` has 3 bins, expected \d+, one per edge of `DISTANCE_EDGES`"):
        prox(torch.ones(3, dtype=torch.long), 0.5)
