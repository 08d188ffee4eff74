"""The model's parts put together: a LLaVA of our own tower and projector around a pretrained decoder."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

ROWS, COLUMNS = 16, 28  # image tokens of a page: one is about a character and a third wide and a line high
IMAGE_TOKENS = ROWS * COLUMNS
TOKEN = 16  # pixels of an image token, wide and high
HEIGHT, WIDTH = ROWS * TOKEN, COLUMNS * TOKEN  # of a page as the tower sees it
IMAGE_TOKEN = "<image>"
_SPARE = "<empty_output>"  # a token of the decoder that only notebooks use stands for an image: no new row of weights
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_processor(tokenizer: Any) -> "LlavaProcessor":
    """A real `LlavaProcessor` that makes `HEIGHT` x `WIDTH` pixels of any page.

    Args:
        tokenizer: the decoder's, with a token `<empty_output>` to spare, or one that has `<image>` already.
    """
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    renamed = json.loads(tokenizer.backend_tokenizer.to_str().replace(json.dumps(_SPARE), json.dumps(IMAGE_TOKEN)))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(renamed)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=2048,
    )
    image_processor = CLIPImageProcessor(
        size={"height": HEIGHT, "width": WIDTH},
        crop_size={"height": HEIGHT, "width": WIDTH},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=TOKEN,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def tower_config(width: int = 64, depths: tuple[int, int, int] = (1, 2, 4)) -> Any:
    """A small FocalNet: overlapping convolutions that see letters, and context of some characters around them.

    Unlike a ViT's, its features do not depend on where on the page a letter stands, so a few thousand pages teach it.
    """
    from transformers import FocalNetConfig

    return FocalNetConfig(
        image_size=[HEIGHT, WIDTH],
        patch_size=4,  # halved twice: 16 pixels
        use_conv_embed=True,
        embed_dim=width,
        depths=list(depths),
        focal_levels=[2, 2, 2],
        focal_windows=[3, 3, 3],
        drop_path_rate=0.0,
    )


def build_model(decoder: "PreTrainedModel", processor: Any, vision: Any = None) -> "LlavaForConditionalGeneration":
    """A LLaVA in eval mode with the decoder's weights and a random tower and projector.

    Args:
        decoder: a `LlamaForCausalLM`.
        processor: as `build_processor` makes it from the decoder's tokenizer.
        vision: the tower's configuration; None is `tower_config()`.
    """
    import torch
    from torch import nn
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = vision or tower_config()
    vision.hidden_size = vision.embed_dim * 2 ** (len(vision.depths) - 1)  # LLaVA's projector reads this name
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.device("cpu"):
        model = LlavaForConditionalGeneration(config)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    # transformers' 0.02 lets a convolution over a channel's nine places say next to nothing, and the
                    # tower multiplies what two of them say: it learns to read several times later.
                    module.reset_parameters()
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.generation_config.max_new_tokens = 48
    return model.eval()
