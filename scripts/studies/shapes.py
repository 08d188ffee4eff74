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
    return _build(tower, text, image_tokens, torch.bfloat16, device or _default_device())


def bench_qwen(
    hidden: int = 3584,
    layers: int = 28,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    tower: int = 32,
    vocabulary: int = 152064,
) -> Any:
    """The shape of Qwen2.5-VL-7B, with as many layers in its tower and its decoder as one likes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = hidden // 128
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 37 // 7,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 7),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    vision = {
        "depth": tower,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [*range(7, tower, 8)],
    }
    special: dict[str, Any] = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return _made(Qwen2_5_VLForConditionalGeneration, config, dtype, device or _default_device())


def prompt_qwen(image_tokens: int, text_tokens: int, batch: int) -> dict[str, Tensor]:
    """The same prompts for `bench_qwen`: one picture of twice as many patches in each direction as it has tokens."""
    found = prompt(image_tokens, text_tokens, batch)
    side = 2 * round(image_tokens**0.5)
    found["pixel_values"] = torch.randn(batch * side**2, 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(0))
    found["image_grid_thw"] = torch.tensor([[1, side, side]] * batch)
    return {**found, "mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).int()}


SHAPES: dict[str, Callable[..., Any]] = {"small": bench_small, "7b": bench_7b}


def prompt(image_tokens: int, text_tokens: int, batch: int, images: int = 1) -> dict[str, Tensor]:
    """A batch of one image, or several of `image_tokens` each, and a text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 1000, (batch, text_tokens), generator=generator)
    image = torch.full((batch, images * image_tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)
    side = _side(image_tokens)
    pixels = torch.randn(batch * images, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def labelled(image_tokens: int, text_tokens: int, batch: int, answer: int) -> dict[str, Tensor]:
    """The same with labels: the last `answer` tokens of every row."""
    found = prompt(image_tokens, text_tokens, batch)
    labels = torch.full_like(found["input_ids"], IGNORE)
    labels[:, -answer:] = found["input_ids"][:, -answer:]
    return {**found, "labels": labels}


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
    return _made(LlavaForConditionalGeneration, config, dtype, device)


def _made(kind: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, dtype=dtype).eval()


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
