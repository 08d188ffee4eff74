"""LLaVA-shaped models with random weights, to be timed: speed does not depend on what the weights say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipit.theory.labels import IGNORE

IMAGE_TOKEN = 3
PATCH = 14


def bench_small(hidden: int = 1024, layers: int = 12, image_tokens: int = 576) -> Any:
    """The reference shape `bench-small`: fp32 for a CPU, with a tower too small to matter."""
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": int(hidden * 2.75),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
    }
    return _build(tower, text, image_tokens, torch.float32, "cpu")


def bench_7b(layers: int = 32, image_tokens: int = 576, device: str | None = None) -> Any:
    """The shape of LLaVA-1.5-7B, bf16, on a GPU when there is one."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
    }
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _build(tower, text, image_tokens, torch.bfloat16, device)


SHAPES: dict[str, Callable[..., Any]] = {"small": bench_small, "7b": bench_7b}


def prompt(image_tokens: int, text_tokens: int, batch: int) -> dict[str, Tensor]:
    """A batch of one image and a text each."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 1000, (batch, text_tokens), generator=generator)
    image = torch.full((batch, image_tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)
    side = _side(image_tokens)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def labelled(image_tokens: int, text_tokens: int, batch: int, answer: int) -> dict[str, Tensor]:
    """The same with labels: the last `answer` tokens of every row."""
    found = prompt(image_tokens, text_tokens, batch)
    labels = torch.full_like(found["input_ids"], IGNORE)
    labels[:, -answer:] = found["input_ids"][:, -answer:]
    return {**found, "labels": labels}


def to_model(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Inputs on a model's device, pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def _side(image_tokens: int) -> int:
    side = round(image_tokens**0.5)
    if side * side != image_tokens:
        raise ValueError(f"`image_tokens`: got {image_tokens}, expected a square number.")
    return PATCH * side


def _build(tower: dict[str, Any], text: dict[str, Any], image_tokens: int, dtype: torch.dtype, device: str) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=_side(image_tokens), patch_size=PATCH),
        text_config=LlamaConfig(**text, max_position_embeddings=4096),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
