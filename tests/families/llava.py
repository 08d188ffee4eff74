"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
)

from .family import IMAGE, Family, chat_template, text_config, token, tokenizer, vision_config

TILES = [[8, 16], [16, 8], [16, 16]]
SMALL = {"height": 8, "width": 8}


def _llava_processor() -> Any:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=SMALL, crop_size=SMALL),
        tokenizer=tokenizer("<image>", image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )


def _llava_config(processor: Any) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision_config(model_type="clip_vision_model"),
        text_config=text_config(processor, model_type="llama"),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _next_processor() -> Any:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(size={"shortest_edge": 8}, crop_size=SMALL, image_grid_pinpoints=TILES),
        tokenizer=tokenizer("<image>", image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )


def _next_config(processor: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=vision_config(model_type="clip_vision_model"),
        text_config=text_config(processor, model_type="mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=TILES,
        image_seq_length=4,
    )


def _onevision_processor() -> Any:
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=SMALL, image_grid_pinpoints=TILES),
        tokenizer=tokenizer("<image>", image_token="<image>", video_token="<video>"),
        video_processor=LlavaOnevisionVideoProcessor(size=SMALL),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>", "<video>"),
    )


def _onevision_config(processor: Any) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text_config(processor, model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=token(processor, "<video>"),
        image_grid_pinpoints=TILES,
    )


FAMILIES = {
    "llava": Family(_llava_processor, _llava_config, "<image>"),
    "llava-next": Family(_next_processor, _next_config, "<image>"),
    "llava-onevision": Family(_onevision_processor, _onevision_config, "<image>", "<video>", longer=0),
}
