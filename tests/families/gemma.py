"""PaliGemma (prefix LM) and Gemma 3 (sliding windows, image tokens that see each other)."""

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from .family import IMAGE, WIDTH, Family, chat_template, text_config, token, tokenizer, vision_config

SMALL = {"height": 8, "width": 8}


def _paligemma_processor() -> Any:
    images = SiglipImageProcessor(size=SMALL, image_seq_length=4)
    return PaliGemmaProcessor(
        image_processor=images,
        tokenizer=tokenizer("<image>", image_token="<image>"),
        chat_template=chat_template("<image>").replace("{{ bos_token }}", ""),  # the processor adds it
    )


def _paligemma_config(processor: Any) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
        text_config=text_config(processor, model_type="gemma", head_dim=8),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )


def _gemma3_processor() -> Any:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=SMALL, image_seq_length=4),
        tokenizer=tokenizer(
            "<image_soft_token>",
            image_token="<image_soft_token>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        ),
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )


def _gemma3_config(processor: Any) -> Gemma3Config:
    return Gemma3Config(
        text_config=text_config(
            processor, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=token(processor, "<start_of_image>"),
        eoi_token_index=token(processor, "<end_of_image>"),
    )


FAMILIES = {
    "paligemma": Family(_paligemma_processor, _paligemma_config, "<image>", prefix_lm=True),
    "gemma3": Family(_gemma3_processor, _gemma3_config, "<start_of_image>"),
}
