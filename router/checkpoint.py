"""A gated checkpoint: a normal Hugging Face folder with the gates, their settings and their code beside the weights."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from .attach import GATE, attach, detach, find_router, gate_state, set_gates
from .config import RouterConfig
from .errors import CheckpointError, SkipItError, short
from .files import CONFIG, INDEX, SETTINGS, check_files, count_values, read_headers, whole_numbers
from .folders import load_json, load_tensors, new_directory, read_header, save_json, save_tensors, writing
from .paths import check_there, is_path, missing
from .standalone import add_code

ROUTER_FILE = "router_config.json"
# Below the top, where vLLM and SGLang take every *.safetensors for weights of the model.
GATES_FILE = "router/gates.safetensors"
OLD_GATES_FILE = "gates.safetensors"  # of format versions 1 and 2
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_GATES = 2**26  # numbers; the gates of the largest decoders are a twentieth of it
_MOST_BUFFERS = 2**26  # numbers that a model computes and does not store, such as tables of positions
_PACKED = 16  # weights that one stored number may stand for: 2 bits each in an int32
# What of a repository is read: settings, vocabularies and templates, and weights in safetensors.
_WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
_LOADING = Lock()
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_router(folder: Path, config: RouterConfig, gates: dict[str, Tensor]) -> None:
    """Write the router's settings and gates into a folder."""
    path = folder / GATES_FILE
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    save_tensors(path, gates)
    save_json(folder / ROUTER_FILE, config.to_dict())


def gates_file(folder: Path) -> Path:
    """Where the gates of a folder are, or belong."""
    new, old = folder / GATES_FILE, folder / OLD_GATES_FILE
    return old if old.is_file() and not new.is_file() else new


def load_router(folder: Path) -> tuple[RouterConfig, dict[str, Tensor]]:
    """Read the router's settings and gates.

    Raises:
        CheckpointError: a file is missing, damaged, or has other tensors than `weight` and `bias`, or NaN in them.
        RouterConfigError: the settings are malformed.
    """
    check_there(folder)
    if not (folder / ROUTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {ROUTER_FILE}: it is not a gated checkpoint. Make one with `skipit export RUN --out DIR`."
        )
    config = RouterConfig.from_file(folder / ROUTER_FILE)
    path = gates_file(folder)
    header = read_header(path)
    if set(header) != {"weight", "bias"}:
        raise CheckpointError(f"{path}: got tensors {sorted(header)}, expected bias and weight.")
    if (count := count_values(header)) > _MOST_GATES:
        raise CheckpointError(f"{path} promises {count:,} numbers, more than the gates of any model.")
    gates = load_tensors(path)
    check_gates(path, gates)
    return config, gates


def check_gates(path: Path, gates: dict[str, Tensor]) -> None:
    """Refuse gates that are no finite numbers in fp32, in which they score.

    Args:
        path: where they were read, for the message.
        gates: tensors of any names.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, tensor in gates.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: `{name}` has dtype {tensor.dtype}, expected a floating one.")
        # A score sums products with a state whose root mean square is 1: it must not overflow either.
        if not bool(torch.isfinite(tensor.float().abs().sum() * tensor.numel())):
            raise CheckpointError(f"{path}: `{name}` has values that are not finite. Gates score in fp32.")


def local_folder(source: str | Path, **options: Any) -> Path:
    """Where the router's files of a checkpoint are on this machine; those of a Hub id are downloaded.

    Args:
        source: a folder, or a Hub id.
        **options: of `from_pretrained`; those that say where on the Hub are used.

    Raises:
        CheckpointError: neither a folder nor a repository with these files.
    """
    gone = missing(source)
    if not gone or is_path(str(source)):  # what is there and no checkpoint is refused as it is read
        return Path(source) / options.get("subfolder", "")
    from transformers.utils.hub import cached_file

    where = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    try:
        settings = cached_file(str(source), ROUTER_FILE, **where)
        try:
            cached_file(str(source), GATES_FILE, **where)
        except OSError:
            cached_file(str(source), OLD_GATES_FILE, **where)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: {gone} {ROUTER_FILE} cannot be had from the Hub, either: {error}") from error
    return Path(str(settings)).parent


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
        raise CheckpointError(f"{gates_file(Path(folder))}: {error}") from error
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
        # The gates stay where they are: an optimizer may hold them.
        weights = {name: tensor for name, tensor in model.state_dict().items() if GATE not in name.split(".")}
        model.save_pretrained(folder, state_dict=weights, **options)
        if (folder / INDEX).is_file():  # whose count of parameters transformers takes from the model, with its gates
            index = load_json(folder / INDEX)
            index["metadata"]["total_parameters"] -= sum(tensor.numel() for tensor in gates.values())
            save_json(folder / INDEX, index)
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

    What is on the Hub is downloaded first, and then is a folder like any other.

    Args:
        source: a folder with config.json and safetensors weights, or a Hub id.
        exact: refuse weights that the model has no place for, too.
        **options: passed to transformers' `from_pretrained`.

    Raises:
        CheckpointError: transformers cannot load it, would leave a weight random, or a weight is not finite; the
            message says why.
    """
    from transformers import AutoModelForImageTextToText

    # What does not fit is refused below, by name; transformers names it in a table on the log only.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"trust_remote_code": False, "use_safetensors": True}
    try:
        folder, options = _on_disk(source, options)
        where = folder / options["subfolder"]
        check_files(where)
        _check_size(where)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **options)
        model, info = loaded
        processor = _load_processor(folder, options)
        _check_named(where, model, processor)
    except SkipItError:
        raise
    except Exception as error:  # what transformers raises for a damaged folder is almost anything
        gone = missing(source)
        raise CheckpointError(
            f"model {str(source)!r} cannot be loaded: {gone}{gone and ' '}{type(error).__name__}: {error}\n"
            "Give a folder with config.json and safetensors weights, a Hub id, or `reference` for the embedded model."
        ) from error
    _check_weights(str(source), info, exact)
    check_finite(str(source), model)
    return model.eval(), processor


def load_processor(source: str | Path) -> Any:
    """The processor of a model, without its weights; what `load_dense` refuses to read is not read here either.

    Raises:
        CheckpointError: it cannot be loaded; the message says why.
    """
    try:
        folder, options = _on_disk(source, {"trust_remote_code": False})
        check_files(folder)
        return _load_processor(folder, options)
    except SkipItError:
        raise
    except Exception as error:  # as in `load_dense`
        raise CheckpointError(f"the processor of {source} cannot be loaded: {error}") from error


def _on_disk(source: str | Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, downloaded if it is on the Hub, and the options with which it is read there."""
    where = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    below = where.pop("subfolder", "")
    rest = {name: value for name, value in options.items() if name not in _HUB_OPTIONS}
    rest |= {"local_files_only": True, "subfolder": below}
    if Path(source).is_dir():
        return Path(source), rest
    if is_path(str(source)):
        check_there(Path(source))
    from transformers.utils.hub import hf_api

    wanted = [f"{below}/{name}" if below else name for name in _WANTED]
    return Path(hf_api().snapshot_download(str(source), allow_patterns=wanted, **where)), rest


def _load_processor(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor, dynamic_module_utils

    where = {name: options[name] for name in ("subfolder", "trust_remote_code", "local_files_only")}
    with _LOADING:
        # What a processor loads in its turn is not told what is trusted: transformers would ask on the terminal.
        seconds, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
        try:
            return AutoProcessor.from_pretrained(folder, **where)
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _check_named(folder: Path, model: Any, processor: Any) -> None:
    """Refuse what transformers passes over: a processor that it does not know, an end that no token is.

    Raises:
        CheckpointError: names the file.
    """
    for path in (folder / name for name in SETTINGS if (folder / name).exists()):
        named = load_json(path).get("processor_class")
        if named is not None and named != type(processor).__name__:
            raise CheckpointError(
                f"{path}: `processor_class`: got {short(named)}, transformers loads {type(processor).__name__}."
            )
    ends, tokens = model.generation_config.eos_token_id, getattr(model.config.get_text_config(), "vocab_size", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and tokens is not None and end >= tokens:
            raise CheckpointError(f"{folder}: `eos_token_id`: got {end}, but the model has {tokens} tokens.")


def _check_size(folder: Path) -> None:
    """Refuse a configuration of a model that its weights cannot be of, before memory is taken for it.

    A part that is missing from a configuration has the defaults of its family: billions of random weights.

    Raises:
        CheckpointError: names both sizes, or a weight that is stored as whole numbers.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    headers = read_headers(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    packed = "quantization_config" in (folder / CONFIG).read_text(encoding="utf-8")
    if is_deepspeed_zero3_enabled():
        return  # whatever is made now is spread over processes at once, a model without weights too
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    wanted, held = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())), count_values(headers)
    if wanted > (_PACKED if packed else 2) * held + _MOST_BUFFERS:
        raise CheckpointError(f"{folder / CONFIG} is of a model with {wanted:,} weights, but its files hold {held:,}.")
    # Files may have other names for modules; what a module's own tensors are called stays.
    floating = {name.rpartition(".")[-1] for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if not packed and (wrong := sorted(n for n in whole_numbers(headers) if n.rpartition(".")[-1] in floating)):
        raise CheckpointError(
            f"{folder}: `{wrong[0]}` is stored as {headers[wrong[0]].dtype}, expected floating-point numbers."
        )


def _check_weights(source: str, info: dict[str, Any], exact: bool) -> None:
    """Refuse a model some of whose weights did not come from its files.

    Raises:
        CheckpointError: names the first weight.
    """
    if gates := [name for name in info["unexpected_keys"] if "layer_gate" in name.split(".")]:
        raise CheckpointError(
            f"model {source!r} has the gates of another model among its weights, `{min(gates)}`, which would be lost: "
            "save a gated model with `skipit.save_gated`, not with its own `save_pretrained`."
        )
    if shapes := sorted((name, tuple(got), tuple(wanted)) for name, got, wanted in info["mismatched_keys"]):
        name, got, wanted = shapes[0]
        raise CheckpointError(f"model {source!r}: `{name}` has shape {got}, but config.json makes it {wanted}.")
    for what, names in (("lacks", info["missing_keys"]), ("has, without a place for it,", info["unexpected_keys"])):
        if names and (exact or what == "lacks"):
            raise CheckpointError(f"model {source!r} {what} `{min(names)}` ({len(names)} such weights).")


@torch.no_grad()
def check_finite(source: str, model: Any) -> None:
    """Refuse weights that are damaged: one NaN makes all answers empty. A fifth of a second per GB on one CPU core.

    Raises:
        CheckpointError: names the first weight.
    """
    weights = {name for name, _ in model.named_parameters()}
    for name, tensor in chain(model.state_dict().items(), _offloaded(model)):
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        values = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits, torch knows no minimum
        least, most = values.aminmax()
        # A mask that is stored may hold infinities.
        if bool(least.isnan()) or (name in weights and bool(least.isinf() | most.isinf())):
            raise CheckpointError(f"model {source!r}: `{name}` has values that are not finite: the file is damaged.")


def _offloaded(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that accelerate keeps elsewhere, one at a time."""
    for prefix, module in model.named_modules():
        elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and elsewhere is not None:
                yield f"{prefix}.{name}", elsewhere[name]
