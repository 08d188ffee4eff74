"""Qwen2.5-VL, Qwen3-VL and its mixture of experts: M-RoPE, dynamic resolution, video."""

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .family import IMAGE, WIDTH, Family, chat_template, text_config, token, tokenizer

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 512}


def _tokenizer() -> Any:
    return tokenizer(
        "<|image_pad|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def _ids(processor: Any) -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": token(processor, "<|video_pad|>"),
        "vision_start_token_id": token(processor, "<|vision_start|>"),
        "vision_end_token_id": token(processor, "<|vision_end|>"),
    }


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, **more}}


def _vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    } | changes


def _processor_2_5() -> Any:
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PATCHES),
        tokenizer=_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**PATCHES, do_sample_frames=False),
        chat_template=chat_template(PLACEHOLDER, VIDEO),
    )


def _config_2_5(processor: Any) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=text_config(processor, **_rope()),
        vision_config=_vision(window_size=16, fullatt_block_indexes=[1]),
        **_ids(processor),
    )


def _processor_3() -> Any:
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**PATCHES),
        tokenizer=_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(
            patch_size=4,
            temporal_patch_size=2,
            merge_size=2,
            do_sample_frames=False,
            size={"shortest_edge": 64, "longest_edge": 4096},
        ),
        chat_template=chat_template(PLACEHOLDER, VIDEO),
    )


def _config_3(processor: Any) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=text_config(processor, head_dim=8, **_rope(mrope_interleaved=True)),
        vision_config=_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        **_ids(processor),
    )


def _config_3_experts(processor: Any) -> Qwen3VLMoeConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Qwen3VLMoeConfig(
        text_config=text_config(processor, head_dim=8, **experts, **_rope(mrope_interleaved=True)),
        vision_config=_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        **_ids(processor),
    )


FAMILIES = {
    "qwen2.5-vl": Family(_processor_2_5, _config_2_5, PLACEHOLDER, VIDEO),
    "qwen3-vl": Family(_processor_3, _config_3, PLACEHOLDER, VIDEO),
    "qwen3-vl-moe": Family(_processor_3, _config_3_experts, PLACEHOLDER, VIDEO, linear_maps=4),
}
