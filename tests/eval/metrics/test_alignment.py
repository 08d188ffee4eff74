"""Decisions against the theory's skip set: the formula by hand, and what chance gives."""

import inspect

import pytest
import torch

from skipit.eval.metrics import SkipAlignment
from skipit.eval.metrics.alignment import alignment_of_counts, skip_alignment

SET = torch.tensor([[False, True], [False, False], [True, True]])
TOTAL = torch.tensor([[10, 90], [10, 90], [10, 90]])


def values(skipped: torch.Tensor, **more: object) -> dict[str, float]:
    return {name: round(v.item(), 6) for name, v in alignment_of_counts(skipped, TOTAL, SET, **more).items()}  # type: ignore[arg-type]


def test_a_router_that_does_as_the_theory_says_agrees_fully() -> None:
    assert values(TOTAL * SET) == {"inside": 1.0, "outside": 0.0, "balanced": 1.0, "agreement": 1.0}
    assert values(TOTAL * ~SET) == {"inside": 0.0, "outside": 1.0, "balanced": 0.0, "agreement": 0.0}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_router_that_skips_alike_everywhere_is_balanced_at_a_half(rate: float) -> None:
    found = values((TOTAL * rate).long())
    assert found["balanced"] == 0.5
    # Agreement knows the rate: 190 of 300 decisions are about units of the set.
    assert found["agreement"] == pytest.approx((190 * rate + 110 * (1 - rate)) / 300, abs=1e-6)


def test_decisions_are_counted_token_by_token_with_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    run = torch.rand(3, 2, 6, generator=generator) > 0.4
    modality = torch.randint(0, 2, (2, 6), generator=generator)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    weight = torch.tensor([[1.0, 2.0], [0.5, 2.0], [1.0, 0.0]])
    right = everything = 0.0
    skipped = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for layer, row, place in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(6)).tolist():
        if real[row, place]:
            unit = layer, int(modality[row, place])
            inside, skips, w = bool(SET[unit]), not run[layer, row, place], float(weight[unit])
            right, everything = right + w * (inside == skips), everything + w
            skipped[inside][0] += w * skips
            skipped[inside][1] += w
    found = skip_alignment(run, modality, real, SET, weight)
    assert found["agreement"].item() == pytest.approx(right / everything)
    assert found["inside"].item() == pytest.approx(skipped[True][0] / skipped[True][1])
    assert found["outside"].item() == pytest.approx(skipped[False][0] / skipped[False][1])
    assert found["balanced"].item() == pytest.approx((found["inside"] + 1 - found["outside"]).item() / 2)


def test_an_empty_set_has_no_inside() -> None:
    found = alignment_of_counts(TOTAL // 2, TOTAL, torch.zeros_like(SET))
    assert found["inside"].isnan()
    assert found["balanced"].isnan()
    assert found["outside"].item() == found["agreement"].item() == 0.5


def test_bad_tables_are_named() -> None:
    plain = inspect.unwrap(alignment_of_counts)  # without the shape checks that only tests have
    with pytest.raises(
        ValueError, match=r"have shapes \[\(3, 2\), \(3, 2\), \(2, 2\), \(3, 2\)\], expected \[layers, 2\]"
    ):
        plain(TOTAL, TOTAL, SET[:2])
    with pytest.raises(ValueError, match=r"`weight` goes from -1.0 to 1.0, expected finite numbers of at least 0"):
        SkipAlignment(SET, torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]))
    metric, real = SkipAlignment(SET), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`run` has 2 layers, expected 3. Make a SkipAlignment for the 2 layers"):
        metric.update(torch.ones(2, 1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.int64), real)
