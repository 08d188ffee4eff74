"""What a model folder may hold before transformers reads it: JSON and safetensors, all inside the folder.

transformers trusts a folder more than one should trust a download: it falls back to pickles, follows names out of the
folder, fetches what they name and asks to run it, and builds whatever sizes a configuration names. These checks read
settings and headers only.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from .errors import CheckpointError, short
from .folders import Stored, load_json, read_header
from .settings import check_setting
from .strict_json import regular_size

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SETTINGS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
_TABLES = ("added_tokens.json", "tokenizer.json", "vocab.json")  # JSON, too, but their keys are tokens
# What transformers would read besides, or instead: an adapter, applied unasked; a model from elsewhere; other weights.
_DETOURS = ("adapter_config.json", "audio_tokenizer_config.json", "shard-*-model-*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
# Keys whose value names another file or repository, or a way to generate that transformers fetches.
_ELSEWHERE = {
    "audio_tokenizer",
    "audio_tokenizer_name_or_path",
    "checkpoint_path",
    "class_info_file",
    "configuration_files",
    "constraints",
    "custom_generate",
    "dola_layers",
    "fast_tokenizer_files",
    "force_words_ids",
    "gguf_file",
    "penalty_alpha",
    "pretrained_cfg",
    "repo_path",
    "transformers_weights",
}
# Beginnings of transformers' own classes that fetch other models when they are made.
_FETCHING = ("Bark", "Mgpstr", "OneFormer", "Rag")
_KINDS = (
    "processor_class",
    "tokenizer_class",
    "image_processor_type",
    "feature_extractor_type",
    "video_processor_type",
)
# Attention by name. For a flash attention that is not installed, transformers fetches a kernel.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
# Those that need an installed library; the others fetch compiled code from the Hub.
_QUANTIZED = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao", "hqq", "quanto")
FLOATING = ("F64", "F32", "BF16", "F16")
_MOST_LAYERS = 4096  # no decoder or tower comes near; a larger number would build modules until memory is full
_FEW_LAYERS = 128  # are built in half a second, whatever the files hold
_MOST = 2**16  # of what is counted by `num_...`: heads, experts, channels, codes; labels are built one by one


def check_files(folder: Path) -> None:
    """Refuse a model folder that is damaged, or would make transformers read, fetch or run something else.

    Raises:
        CheckpointError: names the file and the key.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            regular_size(path)
        if any(path.match(name) for name in _DETOURS):
            raise CheckpointError(f"{path}: transformers would read it instead of {WEIGHTS}, or beside it. Remove it.")
    regular_size(folder / CONFIG)
    check_config(folder / CONFIG, len(read_headers(folder)))
    for path in (folder / name for name in (*SETTINGS, *_TABLES)):
        if path.exists():
            values = load_json(path)
            if path.name in SETTINGS:
                _check_doors(path, values)


def check_config(path: Path, tensors: int = _MOST_LAYERS) -> None:
    """Refuse a configuration that would make transformers fetch something, or count until memory is full.

    Args:
        path: a config.json.
        tensors: how many the model's files hold, if that is known.

    Raises:
        CheckpointError: names the file and the key.
    """
    config = load_json(path)
    _check_doors(path, config)
    layers = min(_MOST_LAYERS, max(_FEW_LAYERS, tensors))  # no layer is without a tensor
    for key, value in _leaves(config):
        name = key.rpartition(".")[-1]
        most = layers if "layer" in name or "depth" in name else _MOST
        counted = most == layers or (name.startswith(("num_", "n_")) and "position" not in name)
        if counted and isinstance(value, int | float) and abs(value) > most:
            raise CheckpointError(f"{path}: `{key}`: got {short(value)}, expected at most {most}.")


def read_headers(folder: Path) -> dict[str, Stored]:
    """What the weights of a model folder are, by name, from the files' headers.

    Raises:
        CheckpointError: there are none, or they are damaged, or not where the index says.
    """
    if (folder / WEIGHTS).exists():  # transformers prefers it, too
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return _read_shards(folder)
    raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}. {_instead(folder)}")


def count_values(headers: dict[str, Stored]) -> int:
    """How many numbers there are."""
    return sum(prod(stored.shape) for stored in headers.values())


def whole_numbers(headers: dict[str, Stored]) -> set[str]:
    """The names of what is stored in another type than those of weights: transformers would convert it in silence."""
    return {name for name, stored in headers.items() if stored.dtype not in FLOATING}


def _instead(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return "Give a folder that `save_pretrained` wrote."
    return (
        f"It has {pickles[0]}, which skipit does not read: a pickle can run code. "
        "If you trust it, load it with transformers and save it with `save_pretrained`."
    )


def _check_doors(path: Path, values: dict[str, Any]) -> None:
    """Refuse what makes transformers fetch something, run what is not its own, or fail while it answers.

    `auto_map` is none of it: without `trust_remote_code` it is not read where transformers has a class of its own.
    """
    attention = (*_ATTENTION, *(name for name, package in _FLASH.items() if find_spec(package)))
    for key, value in _leaves(values):
        names = key.split(".")
        check_setting(path, key, value)
        if value is not None and (door := _ELSEWHERE.intersection(names)):
            raise CheckpointError(
                f"{path}: `{key}`: got {short(value)}; skipit follows no `{min(door)}`: everything is in the folder."
            )
        for beginnings, known in (
            (("attn_impl", "_attn_impl"), attention),
            (("experts_impl", "_experts_impl"), _EXPERTS),
            (("quant_method",), _QUANTIZED),
        ):
            if any(name.startswith(beginnings) for name in names) and isinstance(value, str) and value not in known:
                raise CheckpointError(
                    f"{path}: `{key}`: got {short(value)}, code from elsewhere, which skipit does not load; "
                    f"known: {', '.join(known)}."
                )
        if names[-1] in _KINDS and str(value).startswith(_FETCHING):
            raise CheckpointError(f"{path}: `{key}`: got {short(value)}, which fetches other models.")
        if names[-1] in ("architecture", "backbone") and ":" in str(value):
            raise CheckpointError(f"{path}: `{key}`: got {short(value)}, a model from elsewhere.")


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its dotted path; not recursive, for JSON that is nested too deeply."""
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        else:
            yield key, value


def _read_shards(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX
    places = load_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: `weight_map`: got {short(places)}, expected tensor names with their files.")
    for key, name in places.items():
        inside = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not (inside and name.endswith(".safetensors")):
            raise CheckpointError(f"{path}: `{key}`: got {short(name)}, expected a .safetensors file of this folder.")
    headers: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        listed = {key for key, place in places.items() if place == name}
        held = read_header(folder / name)
        if wrong := sorted(listed ^ set(held)):
            what = "has no" if wrong[0] in listed else "has, without a line in the index,"
            raise CheckpointError(f"{folder / name} {what} `{wrong[0]}`; {INDEX} lists what each file holds.")
        headers |= held
    return headers
