"""What the study of predictions compares: sets of units, measures of a profile, ShortV's layer contribution."""

import math

import pytest
import tiny_models
import torch

from skipit.eval.claims.prediction import set_damages
from skipit.router import FixedUnits, attach, running
from skipit.theory.profile import profile
from studies.contribution import layer_contribution
from studies.prediction import growing_sets, predictors, random_sets

DAMAGE = torch.tensor([[3.0, 0.5], [1.0, math.nan], [2.0, 4.0]])
ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8], [9, "image", 10, 11, 12]]


def _batch() -> dict[str, torch.Tensor]:
    batch = tiny_models.inputs("llava", ROWS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return {**batch, "labels": labels}


def test_growing_sets_skip_the_least_damage_first() -> None:
    sets = growing_sets(DAMAGE)
    assert [int((~plan).sum()) for plan in sets] == [1, 2, 3, 4, 5]
    assert not sets[0][0, 1]
    assert not sets[1][1, 0]
    assert all(plan[1, 1] for plan in sets)


def test_sets_add_up_or_align() -> None:
    plans = random_sets(DAMAGE, 2, 5)
    found = set_damages(DAMAGE, plans)
    for plan, total, aligned in zip(plans, found["sum"], found["aligned"], strict=True):
        a, b = DAMAGE[~plan].tolist()
        assert total.item() == pytest.approx(a + b)
        assert aligned.item() == pytest.approx((a**0.5 + b**0.5) ** 2)


def test_every_measure_has_one_value_per_unit() -> None:
    found = predictors(profile(tiny_models.build("llava"), [_batch()]), "evict")
    assert {name: tuple(table.shape) for name, table in found.items()} == dict.fromkeys(found, (tiny_models.LAYERS, 2))
    assert found["VAR"][:, 0].isnan().all()
    assert (found["block influence"][:, 0] == found["block influence"][:, 1]).all()


def test_layer_contribution_is_the_divergence_of_a_real_skip_at_the_last_prompt_token() -> None:
    model, batch = tiny_models.build("llava"), _batch()
    attach(model)
    found = layer_contribution(model, [batch])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    plan = torch.ones(tiny_models.LAYERS, 2, dtype=torch.bool)
    plan[1, 1] = False
    with torch.no_grad():
        full = model(**inputs, use_cache=False).logits[:, -3].log_softmax(-1)
        with running(policy=FixedUnits(plan), kv="retain"):
            frozen = model(**inputs, use_cache=False).logits[:, -3].log_softmax(-1)
    expected = (frozen.exp() * (frozen - full)).sum(-1).mean()
    assert found[1, 1].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found[:, 0].isnan().all()
