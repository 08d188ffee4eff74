"""DeepSeek-VL, with one vision tower and with two."""

from typing import Any

from transformers import (
    DeepseekVLConfig,
    DeepseekVLHybridConfig,
    DeepseekVLHybridImageProcessor,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
)

from .family import IMAGE, Family, chat_template, text_config, tokenizer, vision_config

PLACEHOLDER = "<image_placeholder>"
SMALL = {"height": 8, "width": 8}


def _processor() -> Any:
    return DeepseekVLProcessor(
        image_processor=DeepseekVLImageProcessor(size=SMALL, min_size=4),
        tokenizer=tokenizer(PLACEHOLDER, image_token=PLACEHOLDER),
        num_image_tokens=4,
        chat_template=chat_template(PLACEHOLDER),
    )


def _config(processor: Any) -> DeepseekVLConfig:
    return DeepseekVLConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text_config(processor, model_type="llama"),
        image_token_id=IMAGE,
    )


def _hybrid_processor() -> Any:
    return DeepseekVLHybridProcessor(
        image_processor=DeepseekVLHybridImageProcessor(
            size={"height": 16, "width": 16}, min_size=4, high_res_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer(PLACEHOLDER, image_token=PLACEHOLDER),
        num_image_tokens=16,
        chat_template=chat_template(PLACEHOLDER),
    )


def _hybrid_config(processor: Any) -> DeepseekVLHybridConfig:
    return DeepseekVLHybridConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False, image_size=16),
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
        },
        text_config=text_config(processor, model_type="llama"),
        image_token_id=IMAGE,
    )


FAMILIES = {
    "deepseek-vl": Family(_processor, _config, PLACEHOLDER),
    "deepseek-vl-hybrid": Family(_hybrid_processor, _hybrid_config, PLACEHOLDER),
}
