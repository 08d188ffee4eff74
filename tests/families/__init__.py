"""Tiny random models of every family, with their real processors: no download, milliseconds per call."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from . import deepseek, gemma, llava, others, qwen
from .family import IMAGE, LAYERS, PAD, WIDTH, WORDS, Family, film, picture

FAMILIES: dict[str, Family] = llava.FAMILIES | deepseek.FAMILIES | qwen.FAMILIES | gemma.FAMILIES | others.FAMILIES
Item = int | str
Row = list[Item]
FIRST_SPECIAL = IMAGE + 1 + len(WORDS)

__all__ = [
    "FAMILIES",
    "IMAGE",
    "LAYERS",
    "PAD",
    "ROWS",
    "WIDTH",
    "Family",
    "attention_of",
    "build",
    "config",
    "independent",
    "inputs",
    "processor",
    "text",
]


@cache
def processor(family: str) -> Any:
    """The family's processor, shared: nothing may change it."""
    return FAMILIES[family].processor()


@cache
def config(family: str) -> Any:
    """The family's configuration, shared: nothing may change it."""
    return FAMILIES[family].config(processor(family))


@cache
def _model(family: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config(family))).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # zeros, until real weights are loaded
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    # No pixels come with what is generated.
    model.generation_config.suppress_tokens = [IMAGE, *range(FIRST_SPECIAL, len(processor(family).tokenizer))]
    return model


def build(family: str, seed: int = 0, attention: str = "sdpa") -> Any:
    """A tiny random model in eval mode."""
    model = copy.deepcopy(_model(family, seed))
    model.set_attn_implementation(attention)
    return model


# Text only, one image, two images; every row ends with at least four text tokens, which can be decoded one by one.
ROWS: list[Row] = [
    [5, "image", 6, 7, 8, 9],
    [10, 11, 12, 13, 14],
    [15, "image", 16, "image", 17, 18, 19, 20, 21, 22],
]


def attention_of(layer: Any) -> Any:
    """The attention inside a decoder layer."""
    return layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn


def independent(family: str) -> list[Row]:
    """`ROWS`, or rows like these in which the family itself lets no row depend on others: they begin with an image."""
    return [["image", *row] for row in ROWS] if FAMILIES[family].mixes_rows else ROWS


def text(family: str, row: Row) -> str:
    """The text of a row: integers are words, "image" and "video" what stands for them."""
    special = {"image": FAMILIES[family].image, "video": FAMILIES[family].video}
    return " ".join(str(special[item]) if isinstance(item, str) else f"t{item}" for item in row)


def inputs(family: str, rows: list[Row], padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A padded batch from the family's own processor; a row's images depend on the row, their pixels also on `seed`.

    A prefix LM gets an image in every row, and the last four tokens of a row as its suffix.
    """
    if FAMILIES[family].prefix_lm:
        rows = [row if "image" in row else ["image", *row] for row in rows]
    images, videos = [], []
    for row in rows:
        first = sum(item for item in row if isinstance(item, int))
        images.append([picture(first + place, seed) for place, item in enumerate(row) if item == "image"])
        videos.append(
            [film(first + place, seed, FAMILIES[family].longer) for place, item in enumerate(row) if item == "video"]
        )
    given: dict[str, Any] = {"text": [text(family, row) for row in rows]}
    if FAMILIES[family].prefix_lm:
        given = {"text": [text(family, row[:-4]) for row in rows], "suffix": [text(family, row[-4:]) for row in rows]}
    if any(images):
        given["images"] = images
    if any(videos):
        given["videos"] = [video for row in videos for video in row]
    words = {"return_tensors": "pt", "padding": True, "padding_side": padding, "add_special_tokens": False}
    batch = processor(family)(**given, **words)
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
