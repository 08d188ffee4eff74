"""InternVL, Idefics3, SmolVLM, Mistral 3 and Mllama."""

from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    Mistral3Config,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from .family import IMAGE, LAYERS, Family, chat_template, text_config, tokenizer, vision_config

# SmolVLM's processor does not start without `num2words`, with which it only spells the number of a video's frames.
processing_smolvlm.num2words = processing_smolvlm.num2words or str
SMALL = {"height": 8, "width": 8}
SPLITS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
SPLITS += [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


def _internvl_processor() -> Any:
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=SMALL, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer=tokenizer(
            "<IMG_CONTEXT>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        video_processor=InternVLVideoProcessor(size=SMALL, do_sample_frames=False),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>", "<video>"),
    )


def _internvl_config(processor: Any) -> InternVLConfig:
    return InternVLConfig(
        vision_config=vision_config(model_type="internvl_vision", image_size=[8, 8], patch_size=[2, 2]),
        text_config=text_config(processor, model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
    )


def _splitting() -> dict[str, Any]:
    return {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}


def _idefics3_processor() -> Any:
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**_splitting()),
        tokenizer=tokenizer("<image>", SPLITS),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )


def _idefics3_config(processor: Any) -> Idefics3Config:
    return Idefics3Config(
        vision_config=vision_config(patch_size=2),
        text_config=text_config(processor, model_type="llama"),
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


def _smolvlm_processor() -> Any:
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**_splitting()),
        tokenizer=tokenizer("<image>", SPLITS),
        video_processor=SmolVLMVideoProcessor(size={"longest_edge": 8}, max_image_size={"longest_edge": 8}),
        image_seq_len=4,
        chat_template=chat_template("<image>", "<video>"),
    )


def _smolvlm_config(processor: Any) -> SmolVLMConfig:
    return SmolVLMConfig(
        vision_config=vision_config(patch_size=2),
        text_config=text_config(processor, model_type="llama"),
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


def _mistral3_processor() -> Any:
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 16}, patch_size=4),
        tokenizer=tokenizer("[IMG]", ["[IMG_BREAK]", "[IMG_END]"]),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )


def _mistral3_config(processor: Any) -> Mistral3Config:
    return Mistral3Config(
        vision_config=vision_config(model_type="pixtral", image_size=16, head_dim=8),
        text_config=text_config(processor, model_type="mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _mllama_processor() -> Any:
    return MllamaProcessor(
        image_processor=MllamaImageProcessor(size=SMALL, max_image_tiles=2),
        tokenizer=tokenizer("<|image|>", ["<|python_tag|>"]),
        chat_template=chat_template("<|image|>"),
    )


def _mllama_config(processor: Any) -> MllamaConfig:
    return MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text_config(
            processor,
            cross_attention_layers=[1],
            num_hidden_layers=LAYERS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        image_token_index=IMAGE,
    )


FAMILIES = {
    "internvl": Family(_internvl_processor, _internvl_config, "<IMG_CONTEXT>", "<video>", longer=0),
    "idefics3": Family(_idefics3_processor, _idefics3_config, "<image>"),
    "smolvlm": Family(_smolvlm_processor, _smolvlm_config, "<image>", "<video>"),
    "mistral3": Family(_mistral3_processor, _mistral3_config, "[IMG]"),
    "mllama": Family(_mllama_processor, _mllama_config, "<|image|>", mixes_rows=True),
}
