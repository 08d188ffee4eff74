"""What a model folder may hold before transformers reads it: JSON and safetensors, all inside the folder.

transformers trusts a folder more than one should trust a download: it falls back to pickles, follows file names out of
the folder, and builds whatever sizes a configuration names. These checks read headers only.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folders import load_json, tensor_names

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
_MOST_LAYERS = 4096  # no decoder or tower comes near; a larger number would build modules until memory is full


def check_files(folder: Path) -> None:
    """Refuse a model folder that is damaged, or would make transformers read or run something else.

    Raises:
        CheckpointError: names the file and the key.
    """
    _check_config(folder / CONFIG)
    if (folder / WEIGHTS).exists():  # transformers prefers it, too
        tensor_names(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        _check_shards(folder)
    else:
        raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}. {_instead(folder)}")


def count_values(folder: Path) -> int:
    """How many numbers the weights in a checked folder hold, from the files' headers."""
    from safetensors import safe_open

    files = {folder / WEIGHTS}
    if not (folder / WEIGHTS).exists():
        files = {folder / name for name in load_json(folder / INDEX)["weight_map"].values()}
    count = 0
    for path in files:
        with safe_open(path, "pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return count


def _instead(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return "Give a folder that `save_pretrained` wrote."
    return (
        f"It has {pickles[0]}, which skipit does not read: a pickle can run code. "
        "If you trust it, load it with transformers and save it with `save_pretrained`."
    )


def _check_config(path: Path) -> None:
    for key, value in _leaves(load_json(path)):
        name = key.rpartition(".")[-1]
        if name == "transformers_weights":
            raise CheckpointError(f"{path}: `{key}`: got {value!r}; weights are in {WEIGHTS} or {INDEX}, nowhere else.")
        if name.startswith(("attn_impl", "_attn_impl", "experts_impl", "_experts_impl")) and "/" in str(value):
            raise CheckpointError(f"{path}: `{key}`: got {value!r}, code from elsewhere, which skipit does not load.")
        number = isinstance(value, int) and ("layers" in name or "depth" in name)
        if number and abs(value) > _MOST_LAYERS:
            raise CheckpointError(f"{path}: `{key}`: got {value}, expected at most {_MOST_LAYERS}.")


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


def _check_shards(folder: Path) -> None:
    path = folder / INDEX
    places = load_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: `weight_map`: got {_short(places)}, expected tensor names with their files.")
    for key, name in places.items():
        inside = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not (inside and name.endswith(".safetensors")):
            raise CheckpointError(f"{path}: `{key}`: got {_short(name)}, expected a .safetensors file of this folder.")
    for name in sorted(set(places.values())):
        listed = {key for key, place in places.items() if place == name}
        if wrong := sorted(listed ^ tensor_names(folder / name)):
            what = "has no" if wrong[0] in listed else "has, without a line in the index,"
            raise CheckpointError(f"{folder / name} {what} `{wrong[0]}`; {INDEX} lists what each file holds.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
