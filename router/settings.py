"""What generation and processing may be set to, where transformers finds out only while it answers, or never.

Only what is wrong in any family is refused: a type, a zero that is divided by, a size beyond every picture. Null is
what a setting is without a value.
"""

from pathlib import Path
from typing import Any

from .errors import CheckpointError, short

_LARGEST = 2**28  # pixels of a picture that a processor makes; a side is no longer


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float)


_COUNT = (lambda value: _whole(value) and 0 < value <= _LARGEST, "a positive whole number")
_ID = (_whole, "a whole number")
_SCALE = (lambda value: _number(value) and value > 0, "a positive number")
_NUMBER = (_number, "a number")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_NAMES = {
    _COUNT: "num_beams num_return_sequences max_new_tokens patch_size temporal_patch_size merge_size height width "
    "shortest_edge longest_edge min_pixels max_pixels",
    _ID: "bos_token_id eos_token_id pad_token_id bad_words_ids suppress_tokens begin_suppress_tokens min_new_tokens "
    "min_length max_length top_k no_repeat_ngram_size num_additional_image_tokens resample",
    _SCALE: "image_std rescale_factor repetition_penalty encoder_repetition_penalty",
    _NUMBER: "image_mean temperature top_p min_p typical_p epsilon_cutoff eta_cutoff length_penalty guidance_scale",
    _FLAG: "do_sample use_cache do_resize do_rescale do_normalize do_center_crop do_pad do_convert_rgb "
    "return_dict_in_generate",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def check_setting(path: Path, key: str, value: Any) -> None:
    """Refuse a value that a setting cannot have in any family.

    Args:
        path: the file, for the message.
        key: its dotted path there; the last name says what it is.
        value: a leaf: no container.

    Raises:
        CheckpointError: names the file and the key.
    """
    kind = _KINDS.get(key.rpartition(".")[-1])
    if kind and value is not None and not kind[0](value):
        raise CheckpointError(f"{path}: `{key}`: got {short(value)}, expected {kind[1]}.")
