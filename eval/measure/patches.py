"""Where in a picture each of its tokens looks, read from what the model's own processor makes of it.

Nothing here knows a family: the picture is sent through the processor again, once as a ramp from left to right and once
from top to bottom, so that the values of every tile say which part of the picture it was cut from, however the
processor crops, pads, stretches or splits. Beside that stands what only its output says: the grid of a family that
writes one down, and how the model packs the tiles of one that leaves padding out.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from skipit.router import VISION, InputError, token_modality
from skipit.train.data.collate import Collator

BRIGHTEST = 255


class Area(NamedTuple):
    """A rectangle of a picture, in its pixels; beyond the picture where a processor pads."""

    left: float
    top: float
    right: float
    bottom: float


class View(NamedTuple):
    """Tokens that lie on a grid over an area of the picture, the whole or a part, as [rows, columns] of numbers.

    A token's number is its place among the vision tokens of the prompt.
    """

    area: Area
    tokens: Int[Tensor, "rows columns"]


def picture_views(model: Any, processor: Any, row: Mapping[str, Any]) -> list[View]:
    """Every grid of tokens that shows the first picture of a prompt.

    Args:
        model: gated or not; its own packing of tiles is asked where it has one.
        processor: its processor.
        row: `images`, all open, and `prompt`.

    Raises:
        InputError: the processor's output does not say where the tokens lie.
    """
    first, *others = row["images"]
    collate = Collator(processor, with_completion=False)

    def processed(image: Image.Image) -> dict[str, Tensor]:
        return collate([{**row, "images": [image, *others]}])

    batch = processed(first)
    count = int((token_modality(model.config, batch["input_ids"], batch.get("mm_token_type_ids")) == VISION).sum())
    whole = Area(0, 0, first.width, first.height)
    if (grid := batch.get("image_grid_thw")) is not None:
        merge = getattr(processor.image_processor, "merge_size", 1)
        _, rows, columns = (int(size) for size in grid[0])
        return [View(whole, _numbers(rows // merge, columns // merge))]
    if "cross_attention_mask" in batch:
        raise _unknown(processor, "its text looks at pictures that are no tokens")
    if batch.get("pixel_values") is None or batch["pixel_values"].dim() < 4:
        raise _unknown(processor, f"it returns {', '.join(batch)}, and no pixel values of tiles")
    probes = [_tiles(processed(probe)) for probe in _probes(first)]
    dark, bright = probes[:2]
    seen = ((bright - dark).abs().amax((1, 2, 3)) > 0).nonzero().flatten()  # the tiles of other pictures do not change
    sizes = _sizes(batch, dark)

    def area(tile: Tensor) -> Area:
        high, wide = (int(size) for size in sizes[tile])
        return _area(processor, [probe[tile, :, :high, :wide] for probe in probes], first)

    if hasattr(getattr(model, "model", None), "pack_image_features"):
        return _packed(model, processor, batch, area(seen[0]), whole, count)
    tokens = count * float(sizes[seen].prod(1).sum() / sizes.prod(1).sum()) / len(seen)
    views = []
    for number, tile in enumerate(seen):
        rows, columns = _grid(processor, tokens, *(int(size) for size in sizes[tile]))
        views.append(View(area(tile), _numbers(rows, columns) + number * rows * columns))
    return views


def on_the_picture(views: list[View], depth: Float[Tensor, " tokens"]) -> tuple[Area, Float[Tensor, "rows columns"]]:
    """Lay the values of tokens on the picture, cell by cell of the finest view.

    A cell that several tokens show, such as one of a tile and one of the whole, has their mean; one that none shows is
    NaN.

    Args:
        views: of one picture; without any there are no cells.
        depth: of the vision tokens of the prompt, in order.

    Returns:
        The area of the picture that the model sees, and the values on it.
    """
    if not views:
        return Area(0, 0, 0, 0), torch.zeros(0, 0)
    edges = torch.tensor([view.area for view in views])
    area = Area(*(float(edge) for edge in (*edges[:, :2].amin(0), *edges[:, 2:].amax(0))))
    size = torch.tensor([view.tokens.shape for view in views]).flip(1)
    extent = edges[:, 2:].amax(0) - edges[:, :2].amin(0)
    columns, rows = (int(cells) for cells in (extent * size / (edges[:, 2:] - edges[:, :2])).amax(0).round())
    across = area.left + (torch.arange(columns) + 0.5) * (area.right - area.left) / columns
    down = area.top + (torch.arange(rows) + 0.5) * (area.bottom - area.top) / rows
    layers = []
    for view in views:
        column = _cell(across, view.area.left, view.area.right, view.tokens.shape[1])
        line = _cell(down, view.area.top, view.area.bottom, view.tokens.shape[0])
        values = depth[view.tokens[line.clamp(min=0)][:, column.clamp(min=0)]].float()
        layers.append(values.masked_fill((line < 0)[:, None] | (column < 0), torch.nan))
    return area, torch.stack(layers).nanmean(0)


def _cell(places: Float[Tensor, " n"], low: float, high: float, cells: int) -> Int[Tensor, " n"]:
    """Which of some equal cells between two edges each place is in; -1 outside."""
    cell = ((places - low) / (high - low) * cells).floor().long()
    return cell.masked_fill((cell < 0) | (cell >= cells), -1)


def _numbers(rows: int, columns: int) -> Int[Tensor, "rows columns"]:
    return torch.arange(rows * columns).view(rows, columns)


def _probes(picture: Image.Image) -> list[Image.Image]:
    """Pictures of the same size: black, white, brighter from left to right, and from top to bottom."""
    across = np.broadcast_to(np.linspace(0, BRIGHTEST, picture.width), (picture.height, picture.width))
    down = np.broadcast_to(np.linspace(0, BRIGHTEST, picture.height)[:, None], (picture.height, picture.width))
    values = (np.zeros_like(across), np.full_like(across, BRIGHTEST), across, down)
    return [Image.fromarray(value.round().astype(np.uint8)).convert("RGB") for value in values]


def _tiles(batch: dict[str, Tensor]) -> Float[Tensor, "tiles channels high wide"]:
    return batch["pixel_values"].double().flatten(0, -4)


def _sizes(batch: dict[str, Tensor], tiles: Float[Tensor, "tiles channels high wide"]) -> Float[Tensor, "tiles 2"]:
    """Height and width of what is no padding at the right and below: where pictures of several sizes are stacked."""
    given = batch.get("image_sizes")
    if given is not None and len(given) == len(tiles):
        return given.double()
    return torch.tensor(tiles.shape[-2:], dtype=torch.float64).expand(len(tiles), 2)


def _area(processor: Any, probes: list[Float[Tensor, "channels high wide"]], picture: Image.Image) -> Area:
    """The part of the picture that a tile shows: what a tile holds is linear in the picture's place."""
    dark, bright, across, down = (probe.mean(0) for probe in probes)
    span = bright - dark
    shows = span > 0.99 * span.max()
    left, right = _edges(processor, (across - dark) / span, shows, picture.width)
    top, bottom = _edges(processor, ((down - dark) / span).T, shows.T, picture.height)
    return Area(left, top, right, bottom)


def _edges(
    processor: Any, place: Float[Tensor, "high wide"], shows: Bool[Tensor, "high wide"], length: int
) -> tuple[float, float]:
    """Where a tile begins and ends along one axis of the picture, from the places of the pixels that show it."""
    used = shows.any(0)
    if int(used.sum()) < 2 or length < 2:
        raise _unknown(processor, "the picture is too small")
    mean = torch.where(shows, place, 0).sum(0)[used] / shows.sum(0)[used]
    column = used.nonzero().flatten().double()
    centred = column - column.mean()
    slope = float((centred * mean).sum() / centred.square().sum()) * (length - 1)
    start = float(mean.mean()) * (length - 1) + 0.5 - slope * float(column.mean())
    if slope <= 0:
        raise _unknown(processor, "its tiles are turned or empty")
    return start - 0.5 * slope, start + (len(used) - 0.5) * slope


def _grid(processor: Any, tokens: float, high: int, wide: int) -> tuple[int, int]:
    """Rows and columns of the tokens of a tile, whose patches are square."""
    rows = round((tokens * high / wide) ** 0.5)
    columns = round(tokens / rows) if rows else 0
    if not tokens or rows * columns != tokens or rows * wide != columns * high:
        raise _unknown(processor, f"{tokens:g} tokens do not lie evenly on a tile of {high} x {wide} pixels")
    return rows, columns


def _packed(
    model: Any, processor: Any, batch: dict[str, Tensor], overview: Area, whole: Area, count: int
) -> list[View]:
    """The views of a model that shows the whole first, and then its tiles line by line without their padding.

    Its own packing is run on features that hold nothing but NaN for the ends of lines.
    """
    pack, config = model.model.pack_image_features, model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    size = batch["image_sizes"][:1]
    tiles = image_size_to_num_patches(size[0], config.image_grid_pinpoints, config.vision_config.image_size)
    if batch.get("batch_num_images", torch.ones(1))[0] > 1:
        tiles = 1  # of several pictures only the whole of each is shown
    settings = {name: getattr(config, name) for name in signature(pack).parameters if hasattr(config, name)}
    newline = torch.full((1,), torch.nan)
    packed, _ = pack([torch.zeros(tiles, side * side, 1)], size, image_newline=newline, **settings)
    if len(packed[0]) > count or (len(batch["image_sizes"]) == 1 and len(packed[0]) != count):
        raise _unknown(processor, f"its model packs {len(packed[0])} tokens, the prompt has {count}")
    views = [View(overview, _numbers(side, side))]
    lines = packed[0][side * side :].isnan().flatten()
    if columns := int(lines.int().argmax()):
        tokens = _numbers(len(lines) // (columns + 1), columns + 1)[:, :columns]
        views.append(View(whole, tokens + side * side))
    return views


def _unknown(processor: Any, why: str) -> InputError:
    return InputError(f"where the image tokens of {type(processor).__name__} lie in the picture is not known: {why}.")
