"""A gated checkpoint: a normal Hugging Face folder with the gates, their settings and their code beside the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach, detach, find_router, gate_state, set_gates
from .config import RouterConfig
from .errors import CheckpointError, SkipItError
from .files import CONFIG, check_files, count_values
from .folders import load_tensors, new_directory, save_json, save_tensors
from .standalone import add_code

ROUTER_FILE = "router_config.json"
GATES_FILE = "gates.safetensors"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PACKED = 16  # weights that one stored number may stand for: 2 bits each in an int32
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_router(folder: Path, config: RouterConfig, gates: dict[str, Tensor]) -> None:
    """Write the router's settings and gates into a folder."""
    save_json(folder / ROUTER_FILE, config.to_dict())
    save_tensors(folder / GATES_FILE, gates)


def load_router(folder: Path) -> tuple[RouterConfig, dict[str, Tensor]]:
    """Read the router's settings and gates.

    Raises:
        CheckpointError: a file is missing, damaged, or has other tensors than `weight` and `bias`, or NaN in them.
        RouterConfigError: the settings are malformed.
    """
    if not (folder / ROUTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {ROUTER_FILE}: it is not a gated checkpoint. Make one with `skipit export RUN --out DIR`."
        )
    config = RouterConfig.from_file(folder / ROUTER_FILE)
    gates = load_tensors(folder / GATES_FILE)
    if set(gates) != {"weight", "bias"}:
        raise CheckpointError(f"{folder / GATES_FILE}: got tensors {sorted(gates)}, expected bias and weight.")
    for name, tensor in gates.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{folder / GATES_FILE}: `{name}` has dtype {tensor.dtype}, expected a floating one.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / GATES_FILE}: `{name}` has values that are not finite.")
    return config, gates


def local_folder(source: str | Path, **options: Any) -> Path:
    """Where the router's files of a checkpoint are on this machine; those of a Hub id are downloaded.

    Args:
        source: a folder, or a Hub id.
        **options: of `from_pretrained`; those that say where on the Hub are used.

    Raises:
        CheckpointError: neither a folder nor a repository with these files.
    """
    if Path(source).is_dir():
        return Path(source) / options.get("subfolder", "")
    from transformers.utils.hub import cached_file

    where = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    try:
        files = [cached_file(str(source), name, **where) for name in (GATES_FILE, ROUTER_FILE)]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a folder, and {ROUTER_FILE} cannot be had from the Hub: {error}"
        ) from error
    return Path(str(files[0])).parent


def attach_from(model: nn.Module, folder: str | Path, budget: float | str | None = None) -> nn.Module:
    """Attach the gates stored in a folder to a loaded model.

    Args:
        model: of which they are.
        folder: where they are.
        budget: a calibrated operating point, which becomes the model's default one.

    Raises:
        CheckpointError: the files are damaged or the gates are another model's.
        RouterConfigError: not a calibrated budget.
    """
    config, gates = load_router(Path(folder))
    attach(model, config.at(budget))
    try:
        set_gates(model, **gates)
    except SkipItError as error:
        detach(model)  # nothing half-loaded
        raise CheckpointError(f"{Path(folder) / GATES_FILE}: {error}") from error
    return model


def save_gated(
    model: Any,
    processor: Any,
    out: str | Path,
    *,
    card: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
    **options: Any,
) -> None:
    """Write a gated model as a folder that transformers loads as the dense model and `load` as the gated one.

    The weights are saved by the model itself, without its gates, so the folder holds what any tool expects. With
    `trust_remote_code=True` transformers loads the gated model too, where skipit is not installed.

    Args:
        model: a gated transformers model, LoRA merged.
        processor: its processor, or None.
        out: folder to make.
        card: text of the README.md inside.
        overwrite: replace an existing folder.
        finish: called with the folder before it gets its name, to add to it.
        **options: passed to the model's `save_pretrained`, such as `max_shard_size`.
    """
    config, gates = find_router(model)[1].config, gate_state(model)
    with new_directory(out, overwrite) as folder:
        detach(model)
        try:
            model.save_pretrained(folder, **options)
        finally:
            attach(model, config)
            set_gates(model, **gates)
        if processor is not None:
            processor.save_pretrained(folder)
        save_router(folder, config, gates)
        add_code(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        finish(folder)


def load(folder: str | Path, *, budget: float | str | None = None, **options: Any) -> tuple[Any, Any]:
    """Load a gated checkpoint: the model with its gates, in eval mode, and its processor.

    Args:
        folder: made by `save_gated` or `skipit export`, or the Hub id of one.
        budget: a calibrated operating point, which becomes the model's default one.
        **options: passed to transformers' `from_pretrained`, such as `dtype` and `device_map`. Code inside the
            checkpoint is never run.

    Raises:
        CheckpointError: not a gated checkpoint, or damaged.
        RouterConfigError: not a calibrated budget.
    """
    router = local_folder(folder, **options)
    load_router(router)[0].threshold_at(budget)  # before the weights: what is wrong is found in milliseconds
    model, processor = load_dense(folder, exact=True, **options)
    return attach_from(model, router, budget), processor


def load_dense(source: str | Path, *, exact: bool = False, **options: Any) -> tuple[Any, Any]:
    """Load any vision-language model and its processor, from a folder or a Hub id; no pickle, no code of its own.

    Args:
        source: a folder with config.json and safetensors weights, or a Hub id.
        exact: refuse weights that the model has no place for, too.
        **options: passed to transformers' `from_pretrained`.

    Raises:
        CheckpointError: transformers cannot load it, or would leave a weight random; the message says why.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(source).is_dir():
        check_files(local_folder(source, **options))
    # What does not fit is refused below, by name; transformers names it in a table on the log only.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"trust_remote_code": False, "use_safetensors": True}
    where = {name: value for name, value in options.items() if name in (*_HUB_OPTIONS, "trust_remote_code")}
    try:
        if Path(source).is_dir():
            _check_size(local_folder(source, **options))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, **options)
        model, info = loaded
        processor = AutoProcessor.from_pretrained(source, **where)
    except SkipItError:
        raise
    except Exception as error:  # what transformers raises for a damaged folder is almost anything
        raise CheckpointError(
            f"model {str(source)!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "Give a folder with config.json and safetensors weights, a Hub id, or `reference` for the embedded model."
        ) from error
    _check_weights(str(source), info, exact)
    return model.eval(), processor


def _check_size(folder: Path) -> None:
    """Refuse a configuration of a model far larger than its weights, before memory is taken for it.

    A part that is missing from a configuration has the defaults of its family: billions of random weights.

    Raises:
        CheckpointError: names both sizes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return  # whatever is made now is spread over processes at once, a model without weights too
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    wanted, held = sum(parameter.numel() for parameter in model.parameters()), count_values(folder)
    if wanted > _PACKED * held:
        raise CheckpointError(f"{folder / CONFIG} is of a model with {wanted:,} weights, but its files hold {held:,}.")


def _check_weights(source: str, info: dict[str, Any], exact: bool) -> None:
    """Refuse a model some of whose weights did not come from its files.

    Raises:
        CheckpointError: names the first weight.
    """
    if shapes := sorted((name, tuple(got), tuple(wanted)) for name, got, wanted in info["mismatched_keys"]):
        name, got, wanted = shapes[0]
        raise CheckpointError(f"model {source!r}: `{name}` has shape {got}, but config.json makes it {wanted}.")
    for what, names in (("lacks", info["missing_keys"]), ("has, without a place for it,", info["unexpected_keys"])):
        if names and (exact or what == "lacks"):
            raise CheckpointError(f"model {source!r} {what} `{min(names)}` ({len(names)} such weights).")
