"""What the profile does with too few, incomplete, degenerate and broken rows."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router.errors import InputError
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile, profile
from skipit.train.data.collate import Collator, batches

LENGTH = 10


def _rows(rows: list[list[int | str]], seed: int = 0) -> dict[str, Tensor]:
    """A batch whose last two tokens per row are the answer."""
    batch = tiny_models.inputs("llava", rows, "left", seed)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return {**batch, "labels": labels}


def _same(a: Profile, b: Profile, tolerance: float) -> None:
    for name in ("geometric", "update", "var_text"):
        one, other = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-8, equal_nan=True, msg=name)


def test_an_empty_split_is_refused() -> None:
    model = tiny_models.build("llava")
    with pytest.raises(InputError, match="the data set is empty"):
        profile(model, batches([], Collator(None), 4))
    with pytest.raises(InputError, match="the profile got no batch"):
        profile(model, [])


def test_one_sample_is_measured_and_the_counts_say_so() -> None:
    found = profile(tiny_models.build("llava"), [_rows([[5, "image", 6, 7, 8, 9]])])
    assert found.about["rows"] == 1
    assert found.count.tolist() == [[5, 4]] * tiny_models.LAYERS
    assert found.damage["retain"].unit.isfinite().all()
    plan = make_plan(found, 0.5)
    assert plan.weight.isfinite().all()
    assert plan.bias.isfinite().all()


def test_rows_without_image_have_no_vision_and_no_cross_attention() -> None:
    found = profile(tiny_models.build("llava"), [_rows([[5, 6, 7, 8, 9], [10, 11, 12, 13]])])
    for table in (found.geometric, found.update, found.damage["retain"].unit, found.damage["evict"].unit):
        assert table[:, 0].isfinite().all()
        assert table[:, 1].isnan().all()
    assert found.var_text.isnan().all()
    assert found.var_last.isnan().all()
    plan = make_plan(found, 0.5)
    assert plan.bias.isfinite().all()


def test_rows_without_image_beside_others_do_not_dilute_cross_attention() -> None:
    model = tiny_models.build("llava")
    image = profile(model, [_rows([[5, "image", 6, 7, 8, 9]])])
    both = profile(model, [_rows([[5, "image", 6, 7, 8, 9], [10, 11, 12, 13]])])
    torch.testing.assert_close(both.var_text, image.var_text, rtol=1e-5, atol=1e-7)
    assert both.count[0].tolist() == [9, 4]


def test_a_layer_that_writes_nothing_is_redundant_in_every_way() -> None:
    model = tiny_models.build("llava")
    layer = model.model.language_model.layers[1]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    found = profile(model, [_rows([[5, "image", 6, 7, 8, 9]])])
    for table in (found.geometric, found.update, found.damage["retain"].unit):
        assert table[1].tolist() == [0.0, 0.0]
    assert make_plan(found, 0.5).bias.isfinite().all()


def test_constant_zero_states_have_distances_but_no_relative_update() -> None:
    model = tiny_models.build("llava")
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    found = profile(model, [_rows([[5, 6, 7, 8]])])
    # Zero states count as one more direction: nothing moves while they stay zero.
    assert found.geometric[:, 0].tolist() == [0.0] * tiny_models.LAYERS
    assert found.damage["retain"].unit[:, 0].tolist() == [0.0] * tiny_models.LAYERS


def test_half_precision_is_accumulated_in_full() -> None:
    data = [_rows([[5, "image", 6, 7, 8, 9], [10, "image", 11, 12, 13]])]
    half = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in data]
    exact, rounded = profile(tiny_models.build("llava"), data), profile(tiny_models.build("llava").bfloat16(), half)
    _same(rounded, exact, tolerance=0.05)
    assert rounded.geometric.dtype == torch.float64
    assert rounded.damage["retain"].unit.isfinite().all()


def test_a_row_with_nan_is_left_out_and_counted() -> None:
    model = tiny_models.build("llava")
    good = _rows([[5, "image", 6, 7, 8, 9], [10, "image", 11, 12, 13, 14]])
    bad = {key: value.clone() for key, value in good.items()}
    bad["pixel_values"][1] = torch.nan
    first = {key: value[:1] for key, value in good.items()}
    found, alone = profile(model, [bad]), profile(model, [first])
    assert (found.about["rows"], found.about["skipped_rows"]) == (1, 1)
    assert found.count.tolist() == alone.count.tolist()
    _same(found, alone, tolerance=1e-5)
    assert all(damage.unit.isfinite().all() for damage in found.damage.values())
    assert found.keys.isfinite().all()


def test_nothing_but_nan_is_refused_with_the_count() -> None:
    bad = _rows([[5, "image", 6, 7, 8, 9]])
    bad["pixel_values"][:] = torch.nan
    with pytest.raises(InputError, match="1 rows, none of which gave finite states"):
        profile(tiny_models.build("llava"), [bad])


@pytest.mark.parametrize("labels", [None, torch.full((1, LENGTH - 1), -100)])
def test_rows_without_answer_are_refused(labels: Any) -> None:
    batch = _rows([[5, "image", 6, 7, 8, 9]])
    batch = {k: v for k, v in batch.items() if k != "labels"} | ({} if labels is None else {"labels": labels})
    with pytest.raises(InputError, match="batch 0: every row needs `labels`"):
        profile(tiny_models.build("llava"), [batch])
