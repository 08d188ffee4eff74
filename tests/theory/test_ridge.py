"""The regression of log damage is the plain one, and its sums stay small at any width."""

import pytest
import torch
from torch import Tensor

from skipit.theory.profile_sums import ProfileSums, groups
from skipit.theory.ridge import MOST_FEATURES, PENALTIES, RidgeSums, projection


def _samples(seed: int = 0, count: int = 400, dim: int = 6) -> tuple[Tensor, Tensor]:
    """States with a mean of their own, and two targets: one that they predict, and one that they do not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator) + torch.arange(dim) / 4
    noise = torch.randn(count, 2, generator=generator)
    return x, torch.stack([x @ torch.linspace(-1, 2, dim) - 5 + 0.1 * noise[:, 0], 3 + noise[:, 1]], dim=-1)


def _sums(x: Tensor, y: Tensor) -> RidgeSums:
    sums = RidgeSums.empty(x.shape[1], y.shape[1], torch.device("cpu"))
    for start in range(0, len(x), 100):  # in batches
        for half in (0, 1):
            sums.add(half, x[start : start + 100][half::2], y[start : start + 100][half::2])
    return sums


def _plain(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Weights and intercept from the normal equations of [x, 1], without a penalty on the intercept."""
    features = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    ridge = torch.full((features.shape[1],), penalty * len(x), dtype=torch.float64)
    ridge[-1] = 0
    return torch.linalg.solve(features.T @ features + ridge.diag(), features.T @ y.double())


def test_the_fit_is_that_of_the_normal_equations_with_the_better_penalty() -> None:
    x, y = _samples()
    found = _sums(x, y).solve()
    ones = torch.ones(len(x) // 2, 1)
    for target in (0, 1):
        errors = []
        for penalty in PENALTIES:
            halves = ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2)))
            errors.append(
                sum(
                    (
                        y[other, target]
                        - torch.cat([x[other], ones], 1).double() @ _plain(x[one], y[one, target], penalty)
                    )
                    .square()
                    .sum()
                    for one, other in halves
                )
            )
        best = min(range(len(PENALTIES)), key=lambda i: float(errors[i]))
        expected = _plain(x, y[:, target], PENALTIES[best])
        torch.testing.assert_close(found.weight[target].double(), expected[:-1], atol=1e-6, rtol=1e-6)
        assert found.bias[target].item() == pytest.approx(expected[-1].item(), abs=1e-5)
        predicted = x.double() @ expected[:-1] + expected[-1]
        assert found.mean[target].item() == pytest.approx(predicted.mean().item(), rel=1e-5)
        assert found.std[target].item() == pytest.approx(predicted.std(correction=0).item(), rel=1e-5)
        total = (y[:, target] - y[:, target].mean()).square().sum()
        assert found.r2[target].item() == pytest.approx(1 - float(errors[best] / total), abs=1e-5)
    assert found.r2[0] > 0.9 > 0.1 > found.r2[1]


def test_targets_do_not_touch_each_other() -> None:
    x, y = _samples()
    together = _sums(x, y).solve()
    for target in (0, 1):
        for both, alone in zip(together, _sums(x, y[:, target, None]).solve(), strict=True):
            torch.testing.assert_close(both[target], alone[0])


def test_no_sample_and_one_half_alone() -> None:
    nothing = RidgeSums.empty(3, 2, torch.device("cpu")).solve()
    assert not nothing.weight.any()
    assert all(part.isnan().all() for part in nothing[1:])
    sums = RidgeSums.empty(3, 1, torch.device("cpu"))
    sums.add(0, torch.randn(1, 3), torch.tensor([[2.0]]))
    fit = sums.solve()
    assert not fit.weight.any()
    assert fit.bias.item() == pytest.approx(2)


def test_a_projection_keeps_the_scale_and_maps_weights_back() -> None:
    assert projection(MOST_FEATURES) is None
    columns = projection(64, most=16)
    assert columns is not None
    assert torch.equal(columns, projection(64, most=16))  # type: ignore[arg-type]
    torch.testing.assert_close(columns.T @ columns, torch.eye(16), atol=1e-5, rtol=0)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    assert (x @ columns).square().mean().item() == pytest.approx(1, abs=0.05)
    w = torch.randn(16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((x @ columns) @ w, x @ (columns @ w), atol=1e-3, rtol=1e-4)


def test_wide_states_are_regressed_through_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.theory.profile_sums.projection", lambda dim: projection(dim, most=8))
    sums = ProfileSums(1, 24, torch.device("cpu"), groups((0,), 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(4, 300, 24, generator=generator), dim=-1) * 24**0.5
    assert sums.projection is not None
    direction = sums.projection[:, 0]  # within reach of the features
    signal = (x @ direction).exp()
    sums.add_rows(torch.ones(4, dtype=torch.bool))
    sums.add_samples(0, x, {"retain": signal[None], "evict": 2 * signal[None]}, torch.zeros(4, 300).long())
    fits = sums.ridge_fits()
    assert fits["retain"].weight.shape == (1, 2, 24)
    predicted = x @ fits["retain"].weight[0, 0] + fits["retain"].bias[0, 0]
    torch.testing.assert_close(predicted, signal.log(), atol=0.02, rtol=0.02)
    assert fits["evict"].r2[0, 0] > 0.99


def test_halves_are_rows_of_the_data_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x, signal = torch.randn(5, 7, 4, generator=generator), torch.rand(5, 7, generator=generator)

    def state(sizes: list[int]) -> dict[str, Tensor]:
        sums, first = ProfileSums(1, 4, torch.device("cpu"), groups((0,), 1)), 0
        for size in sizes:
            rows = slice(first, first + size)
            sums.add_rows(torch.ones(size, dtype=torch.bool))
            each = {"retain": signal[None, rows], "evict": signal[None, rows]}
            sums.add_samples(0, x[rows], each, torch.zeros(size, 7).long())
            first += size
        return {name: value for name, value in sums.state().items() if name.startswith("ridge")}

    whole = state([5])
    assert whole["ridge.0.0.gram"][:, -1, -1].tolist() == [21, 14]
    for sizes in ([1] * 5, [3, 2], [2, 3]):
        for name, value in state(sizes).items():
            torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize(("points", "grams", "most"), [(tuple(range(32)), 32, 1.1e9), ((0,), 2, 72e6)])
def test_memory_at_7b_size_is_bounded(points: tuple[int, ...], grams: int, most: float) -> None:
    sums = ProfileSums(32, 4096, torch.device("meta"), groups(points, 32))
    size = sum(value.nbytes for name, value in sums.state().items() if name.startswith("ridge"))
    assert size == 2 * 2 * 8 * (grams * 1025**2 + 64 * (1025 + 1))
    assert size < most


def test_layers_share_their_samples_up_to_the_next_point_but_for_the_last_and_those_over_images() -> None:
    assert [tuple(group) for group in groups((0, 2), 6, {1, 3})] == [
        (0, (0,)),
        (0, (1,)),
        (2, (2, 4)),
        (2, (3,)),
        (2, (5,)),
    ]
    assert [group.layers for group in groups(range(3), 3)] == [(0,), (1,), (2,)]
