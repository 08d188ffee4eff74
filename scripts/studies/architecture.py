"""The reference VLM's architecture and processor, of which `studies.pretrain` makes the weights that are shipped."""

from typing import TYPE_CHECKING

from skipit.train.reference.digits import GRID, IMAGE_SIZE
from skipit.train.reference.questions import COLUMNS, KINDS, ROWS, ask

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PATCH = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word of the questions and answers, special tokens first; numbers 0 to 27 are one token each."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = {word for kind in KINDS for _ in range(50) for word in ask(kind, tuple(range(9)), rng).text.split()}
    words |= {*ROWS, *COLUMNS, "yes", "no"}
    numbers = [str(n) for n in range(9 * GRID + 1)]
    return [*SPECIAL_TOKENS, *numbers, *sorted(words - set(numbers))]


def build_processor() -> "LlavaProcessor":
    """A real `LlavaProcessor`: CLIP image processor, word-level tokenizer and chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words with spaces
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        padding_side="left",
        model_max_length=512,
    )
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> "LlavaForConditionalGeneration":
    """The architecture with random weights: 4-layer CLIP tower, 12-layer Llama with grouped-query attention."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    # At width 128 Llama's usual initializer_range of 0.02 leaves the residual branches too small to train.
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.06,
        pad_token_id=words.index("<pad>"),
        bos_token_id=words.index("<s>"),
        eos_token_id=words.index("</s>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = text.pad_token_id
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.max_new_tokens = 12
    return model.eval()
