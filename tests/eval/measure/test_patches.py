"""Where the tokens of a picture lie, on every family: the token that a marked corner changes lies at that corner."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build, processor
from PIL import Image
from torch import Tensor

from skipit.eval.measure.patches import Area, View, on_the_picture, picture_views
from skipit.router import VISION, InputError, token_modality
from skipit.router.decoder import find_decoder
from skipit.train.data.collate import Collator

PLACED = sorted(FAMILIES.keys() - {"mllama"})
CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # row and column


def picture(width: int, height: int, corner: tuple[int, int] | None = None) -> Image.Image:
    """Grey noise; one corner, an eighth of each side, is black and white."""
    pixels = np.random.default_rng([width, height]).integers(110, 140, (height, width, 3), dtype=np.uint8)
    if corner is not None:
        high, wide = height // 8, width // 8
        row, column = corner[0] * (height - high), corner[1] * (width - wide)
        pixels[row : row + high, column : column + wide] = 255
        pixels[row : row + high : 2, column : column + wide, 0] = 0
    return Image.fromarray(pixels)


def row(*pictures: Image.Image) -> dict[str, Any]:
    return {"images": list(pictures), "prompt": "what is it"}


def local(family: str) -> Any:
    """A tiny model whose vision towers look nowhere but at the patch itself."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if "vision" in name or "visual" in name:
            parameter.requires_grad_(False)
            if "attn" in name or "attention" in name:
                parameter.zero_()
    return model


def features(family: str, model: Any, given: dict[str, Any]) -> Tensor:
    """What the decoder gets for each vision token."""
    batch = Collator(processor(family), with_completion=False)([given])
    vision = token_modality(model.config, batch["input_ids"], batch.get("mm_token_type_ids"))[0] == VISION
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    hook = find_decoder(model)[2][0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return caught[0][0, vision]


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 64)], ids=["square", "wide", "high"])
@pytest.mark.parametrize("family", PLACED)
def test_a_marked_corner_lies_at_the_corner(family: str, size: tuple[int, int]) -> None:
    model = local(family)
    plain = features(family, model, row(picture(*size)))
    views = picture_views(model, processor(family), row(picture(*size)))
    for corner in CORNERS:
        marked = features(family, model, row(picture(*size, corner)))
        change = (marked - plain).norm(dim=-1)
        area, cells = on_the_picture(views, change)
        found = divmod(int(cells.nan_to_num().argmax()), cells.shape[1])
        middles = (1 / 16, 15 / 16)
        down = (middles[corner[0]] * size[1] - area.top) / (area.bottom - area.top)
        across = (middles[corner[1]] * size[0] - area.left) / (area.right - area.left)
        assert found == (int(down * cells.shape[0]), int(across * cells.shape[1])), (area, cells)


@pytest.mark.parametrize("family", PLACED)
def test_the_first_of_several_pictures(family: str) -> None:
    model = build(family)
    alone = picture_views(model, processor(family), row(picture(64, 64)))
    both = picture_views(model, processor(family), row(picture(64, 64), picture(32, 64)))
    if family == "llava-onevision":  # of several pictures it shows the whole of each only
        alone = alone[:1]
    for view, expected in zip(both, alone, strict=True):
        assert view.area == pytest.approx(expected.area, abs=0.5)
        assert torch.equal(view.tokens, expected.tokens)


def test_what_a_processor_crops_away_is_not_on_the_map() -> None:
    cropping = copy.deepcopy(processor("llava"))
    cropping.image_processor.size = {"shortest_edge": 8}
    (view,) = picture_views(build("llava"), cropping, row(picture(64, 32)))
    assert view.area == pytest.approx((16, 0, 48, 32), abs=1)
    assert view.tokens.tolist() == [[0, 1], [2, 3]]


def test_cells_that_several_views_show_have_their_mean() -> None:
    whole = View(Area(0, 0, 8, 4), torch.tensor([[0, 1]]))
    left = View(Area(0, 0, 4, 4), torch.tensor([[2, 3], [4, 5]]))
    area, cells = on_the_picture([whole, left], torch.tensor([1.0, 9, 3, 5, 7, 9]))
    assert area == Area(0, 0, 8, 4)
    assert cells.tolist() == [[2, 3, 9, 9], [4, 5, 9, 9]]


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="image tokens of MllamaProcessor lie in the picture is not known: its text"):
        picture_views(build("mllama"), processor("mllama"), row(picture(16, 16)))
    whole = copy.deepcopy(processor("llava"))
    whole.vision_feature_select_strategy = "full"  # with a token that is no patch
    with pytest.raises(InputError, match=re.escape("5 tokens do not lie evenly on a tile of 8 x 8 pixels")):
        picture_views(build("llava"), whole, row(picture(16, 16)))
