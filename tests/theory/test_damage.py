"""The damage of a choice, the weight of the path of a skip, and how much text attends to vision."""

import math

import pytest
import torch
from torch import Tensor

from skipit.theory.damage import CrossAttention, choice_damage, draw_choice, path_weight, weighted_change


def attended(weights: Tensor, modality: Tensor) -> CrossAttention:
    """What is measured of one layer whose attention weights [batch, heads, seq, seq] are these; pads are -1."""
    last = torch.full(modality.shape[:1], modality.shape[1] - 1)
    measured = CrossAttention(modality, last)
    keys = torch.eye(modality.shape[1]).expand_as(weights)
    measured(None, weights.clamp(min=1e-30).log(), keys, keys, torch.zeros(1, 1, *weights.shape[2:]), 1.0)
    return measured


def test_damage_of_a_choice_is_the_divergence_when_there_are_two_answers() -> None:
    logits = torch.randn(50, 2, dtype=torch.float64)
    changed = logits + torch.randn(50, 2, dtype=torch.float64)
    p, q = logits.log_softmax(-1), changed.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    margin = p[:, 0] - p[:, 1]
    found = choice_damage(margin, torch.ones(50), margin - (q[:, 0] - q[:, 1]))
    torch.testing.assert_close(found, expected)


def test_damage_of_a_choice_never_exceeds_the_divergence_of_all_answers() -> None:
    p = torch.randn(200, 6, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(200, 6, dtype=torch.float64).log_softmax(-1)
    mass = p[:, :2].exp().sum(-1)
    drop = (p[:, 0] - p[:, 1]) - (q[:, 0] - q[:, 1])
    assert (choice_damage(p[:, 0] - p[:, 1], mass, drop) <= (p.exp() * (p - q)).sum(-1) + 1e-12).all()


@pytest.mark.parametrize("drop", [1e-12, 9.9e-5, 1.01e-4, -1e-3])
@pytest.mark.parametrize("margin", [0.0, 3.0, 30.0])
def test_small_damage_is_quadratic_and_positive(margin: float, drop: float) -> None:
    m = torch.tensor(margin, dtype=torch.float64)
    found = choice_damage(m, torch.tensor(0.9), torch.tensor(drop, dtype=torch.float64))
    expected = 0.9 * torch.sigmoid(m) * torch.sigmoid(-m) * drop**2 / 2
    assert found.item() > 0
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)


def test_path_weight_is_the_mean_of_the_ratio_of_norms_along_the_path() -> None:
    before, after = torch.randn(4, 5, 8), 3 * torch.randn(4, 5, 8)
    times = (torch.arange(4000) + 0.5) / 4000
    path = before + times.view(-1, 1, 1, 1) * (after - before)
    expected = (before.norm(dim=-1) / path.norm(dim=-1)).mean(0)
    torch.testing.assert_close(path_weight(before, after)[..., 0], expected, rtol=1e-4, atol=0)


def test_path_weight_at_the_edges() -> None:
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(path_weight(x, x), torch.ones(1, 3, 1))
    assert path_weight(x, -x).isfinite().all()
    assert path_weight(x, torch.zeros_like(x)).isfinite().all()
    assert path_weight(torch.zeros_like(x), torch.zeros_like(x)).isfinite().all()
    assert weighted_change(x.bfloat16(), x.bfloat16()).eq(0).all()


def test_a_choice_is_the_first_answer_against_another_of_the_same_row() -> None:
    logits = torch.randn(3, 4, 7)
    answer = torch.tensor([[False, True, False, False], [False] * 4, [True, False, False, False]])
    margin, mass = draw_choice(logits, answer, 1.0, torch.rand(len(logits), 2))
    assert margin[1] == mass[1] == 0
    for row, position in ((0, 1), (2, 0)):
        log_p = logits[row, position].log_softmax(-1)
        margins = log_p.max() - log_p
        other = (margins - margin[row]).abs().argmin()
        assert margin[row].item() == pytest.approx(margins[other].item(), abs=1e-6)
        assert margin[row] > 0
        assert mass[row].item() == pytest.approx((log_p.max().exp() + log_p[other].exp()).item(), rel=1e-5)


def test_a_choice_never_draws_from_a_row_without_answer_even_if_it_is_not_finite() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    broken = torch.cat([logits[:1], torch.full_like(logits[1:], torch.nan)])
    answer = torch.tensor([[True, True, False], [False] * 3])
    choice = draw_choice(broken, answer, 1.0, torch.rand(len(broken), 2))
    (grad,) = torch.autograd.grad(choice.margin.sum(), logits)
    assert grad.isfinite().all()
    assert choice.margin.isfinite().all()


def test_masses_on_a_partition_of_the_keys_add_up_to_one() -> None:
    weights = torch.randn(20, 3, 7, 7).softmax(-1)
    vision = torch.rand(20, 7) < 0.5
    vision[:, :2] = torch.tensor([True, False])
    mass, rest = (attended(weights, keys.long()).last[0] for keys in (vision, ~vision))
    torch.testing.assert_close(mass + rest, torch.ones(20))
    assert ((mass >= 0) & (mass <= 1 + 1e-6)).all()


def test_attention_mass_is_summed_in_float32_for_half_states() -> None:
    measured = CrossAttention(torch.ones(1, 1024).long(), torch.tensor([1023]))
    same = torch.zeros(1, 1, 1024, 4, dtype=torch.bfloat16)
    measured(None, same, same, same, None, None)
    assert measured.last[0].item() == 1.0


def test_text_that_can_see_an_image_is_averaged_and_other_tokens_are_ignored() -> None:
    rows = [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0], [math.nan] * 4]
    modality = torch.tensor([[1, 0, 0, -1], [0, 0, 0, -1]])
    first, second = attended(torch.tensor(rows).expand(2, 1, 4, 4), modality).text[0].tolist()
    assert first == pytest.approx(0.35)
    assert math.isnan(second)
