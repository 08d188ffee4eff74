"""What a family is: a real configuration and a real processor, both tiny; everything else is the same for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIDTH, LAYERS = 32, 4
PAD, BOS, EOS = 0, 1, 2
IMAGE = 40  # the id of the image token, in every family
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", ".")
TEXT = tuple(f"t{number}" for number in range(len(SPECIAL), IMAGE))  # the text of each token says its id
WORDS = (
    *("USER", "ASSISTANT", ":", "what", "is", "it", "a", "cat", "dog"),
    *("Frame1", "Frame2", "Frame3", "Frame4", "<", ">", "seconds", "0", "1", "2", "3"),
)
# Sizes of images, width x height: a family with dynamic resolution gives them different numbers of tokens.
SIZES = ((16, 16), (24, 16), (16, 32))


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family.

    Attributes:
        processor: makes the real processor.
        config: makes the real configuration, for a processor's vocabulary.
        image: text that stands for an image in a prompt.
        video: the same for a video; None if the family has none.
        prefix_lm: a prompt's tokens see each other; its processor wants an image, and the answer as `suffix`.
        mixes_rows: its tokens before the first image depend on how many images other rows of the batch have: the model
            lets them see all image states alike, those of padding too.
        longer: frames by which videos of one batch may differ; 0 where its processor stacks them.
        linear_maps: of a decoder layer; experts are none, they are one tensor each.
    """

    processor: Callable[[], Any]
    config: Callable[[Any], Any]
    image: str
    video: str | None = None
    prefix_lm: bool = False
    mixes_rows: bool = False
    linear_maps: int = 7
    longer: int = 2


def tokenizer(image: str, special: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose token for one image feature is `image`.

    Special tokens in `named` become attributes, such as `image_token`.
    """
    special = [image, *(token for token in (*special, *named.values()) if token != image)]
    words = [*SPECIAL, *TEXT, image, *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        extra_special_tokens=named,
    )


def chat_template(image: str, video: str = "") -> str:
    """A chat template in the usual style; text that is a plain string or a list of parts."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ 'USER : ' if message['role'] == 'user' else 'ASSISTANT : ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ ' ' if message['role'] == 'user' else eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
    )


def text_config(processor: Any, **changes: Any) -> dict[str, Any]:
    """The decoder that all families share: 4 layers, 4 heads of 8, 2 of them for keys and values."""
    return {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    } | changes


def vision_config(**changes: Any) -> dict[str, Any]:
    """The vision tower that most families share: 8 x 8 pixels, patches of 4 x 4."""
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    } | changes


def token(processor: Any, text: str) -> int:
    """The id of one token."""
    found: int = processor.tokenizer.convert_tokens_to_ids(text)
    return found


def picture(number: int, seed: int) -> Image.Image:
    """A random image: its size depends on `number`, its pixels on both."""
    width, height = SIZES[number % len(SIZES)]
    return Image.fromarray(np.random.default_rng([number, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(number: int, seed: int, longer: int = 0) -> np.ndarray[Any, Any]:
    """A random video of four frames, or of up to `longer` more, which depends on `number`."""
    frames = 4 + number % 2 * longer
    return np.random.default_rng([number, seed]).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
