"""Where the plugin meets vLLM: three of its functions are wrapped, one model and one check of settings registered."""

import inspect
import os
from collections.abc import Callable
from functools import cache, partial, wraps
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from skipit.router.errors import SkipItError
from skipit.router.spending import least_share

from .decisions import Chunk, Decisions
from .metrics import publish
from .requests import Spending, names, spending
from .served import Served, is_gated, served

TESTED = "0.32.0"
ARCHITECTURE = "SkipItForConditionalGeneration"
OFF = "SKIPIT_VLLM"  # in the environment: "0" turns the plugin off
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
OPERATION = "skipit::packed_mlp"


def install() -> None:
    """Register and wrap, once per process.

    Raises:
        ImportError: this version of vLLM lacks a hook.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.engine.input_processor import InputProcessor

    ModelRegistry.register_model(ARCHITECTURE, "skipit.vllm.model:Gated")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Settings
    _wrap(EngineArgs, "create_model_config", ["self"], _name_architecture)
    _wrap(InputProcessor, "process_inputs", ["self", "request_id", "prompt", "params"], _admit)


def wrap_runner() -> None:
    """Wrap what prepares a step, in the process that runs the model.

    Raises:
        ImportError: this version of vLLM lacks it.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(GPUModelRunner, "_preprocess", ["self", "scheduler_output", "num_input_tokens"], _decide)


def _wrap(owner: type, name: str, wanted: list[str], around: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    if getattr(original, "skipit", False):
        return
    got = [] if original is None else list(inspect.signature(original).parameters)
    if original is None or got[: len(wanted)] != wanted:
        raise ImportError(
            f"skipit: this vLLM is {_version()} and has no `{owner.__name__}.{name}({', '.join(wanted)}, ...)`, which "
            f"gated checkpoints need. Tested is vLLM {TESTED}. VLLM_PLUGINS='' leaves skipit out: all runs dense."
        )

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.skipit = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _name_architecture(original: Callable[..., Any], arguments: Any) -> Any:
    """Let a gated checkpoint be run by our model, unless the user names another."""
    if os.environ.get(OFF) == "0" or not is_gated(arguments.model, arguments.revision):
        return original(arguments)
    overrides = arguments.hf_overrides
    if callable(overrides) or "architectures" in overrides:
        _log().warning("skipit: %s has gates, which --hf-overrides leaves out: it runs dense.", arguments.model)
        return original(arguments)
    if os.environ.get(RUNNER) == "1":
        raise ValueError(f"skipit: gates are decided in vLLM's first model runner, got {RUNNER}=1. Leave it out.")
    router = _served(arguments.model, arguments.revision)
    publish(names(router.config))
    os.environ[RUNNER] = "0"
    arguments.hf_overrides, arguments.model_impl = {"architectures": [ARCHITECTURE], **overrides}, "auto"
    config = original(arguments)
    if _version() != TESTED:
        _log().warning("skipit: this vLLM is %s; tested is %s.", _version(), TESTED)
    _log().info(
        "skipit: %s runs gated (unit %s), threshold %g by default, budgets %s. %s=0 runs it dense.",
        arguments.model,
        router.config.unit,
        router.config.threshold,
        ", ".join(router.config.operating_points) or "none",
        OFF,
    )
    return config


class Settings:
    """What vLLM asks about our architecture while it settles its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to settle before the rest is known."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Refuse what gates cannot follow, and split graphs where MLPs are packed.

        Raises:
            ValueError: names the setting.
        """
        refused = {
            "--pipeline-parallel-size": config.parallel_config.pipeline_parallel_size > 1,
            "--speculative-config": config.speculative_config is not None,
            "--enable-lora": config.lora_config is not None,
            "--enable-prompt-embeds": config.model_config.enable_prompt_embeds,
            "--enable-dbo": config.parallel_config.use_ubatching,
        }
        if given := [name for name, there in refused.items() if there]:
            raise ValueError(
                f"skipit: a gated checkpoint is served without {', '.join(given)}. Leave that out, or set {OFF}=0."
            )
        from vllm.config.compilation import CUDAGraphMode

        compilation = config.compilation_config
        if compilation.splitting_ops is None:
            updates = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
            compilation.splitting_ops = [*compilation._attention_ops, *updates]
        if OPERATION not in compilation.splitting_ops:
            compilation.splitting_ops.append(OPERATION)
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:  # how many tokens run is not what was captured
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _admit(
    original: Callable[..., Any], processor: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **named: Any
) -> Any:
    """Refuse unknown budgets, and keep the cached prefixes of different budgets apart."""
    if ARCHITECTURE not in processor.model_config.architectures or not hasattr(params, "extra_args"):
        return original(processor, request_id, prompt, params, *rest, **named)
    from vllm.exceptions import VLLMValidationError

    router = _served(processor.model_config.model, processor.model_config.revision)
    try:
        asked = spending(router.config, params.extra_args)
    except SkipItError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs", value=params.extra_args) from error
    request = original(processor, request_id, prompt, params, *rest, **named)
    if asked.threshold is None:
        _check_whole(router, asked, len(request.prompt_token_ids), processor.scheduler_config)
    # Keys and values follow from which layers a token has run, so from the threshold, or from the whole prompt.
    own = f"skipit {request_id}" if asked.threshold is None else f"skipit {asked.threshold!r}"
    request.cache_salt = f"{own} {request.cache_salt}" if request.cache_salt else own
    return request


def _check_whole(router: Served, asked: Spending, tokens: int, scheduler: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    if scheduler.enable_chunked_prefill:
        raise VLLMValidationError(
            "`skipit_budget_per`: 'input' finds a prompt's threshold from all of its tokens at once, and this server "
            "runs prompts in chunks. Start it with --no-enable-chunked-prefill, or use 'data'."
        )
    least = least_share(router.costs, tokens, "retain", router.config.unit)
    if asked.share is not None and asked.share <= least:
        raise VLLMValidationError(
            f"`skipit_budget`: got {asked.share:g}, expected more than {least:.3f}: so much of its FLOPs does a prompt "
            f"of {tokens} tokens spend when it skips every layer."
        )


def _decide(original: Callable[..., Any], runner: Any, scheduled: Any, padded: int, *rest: Any, **named: Any) -> Any:
    """Decide for a step as soon as its embeddings are there."""
    prepared = original(runner, scheduled, padded, *rest, **named)
    model = runner.get_model()
    decisions = getattr(model, "decisions", None)
    if isinstance(decisions, Decisions):
        chunks = []
        for place, name in enumerate(runner.input_batch.req_ids):
            request = runner.requests[name]
            asked = partial(spending, model.router, request.sampling_params.extra_args)
            past = int(runner.input_batch.num_computed_tokens_cpu[place])
            row = decisions.row(name, asked, request.num_prompt_tokens)
            chunks.append(Chunk(row, past, scheduled.num_scheduled_tokens[name]))
        decisions.forget(runner.requests)
        tokens = scheduled.total_num_scheduled_tokens
        decisions.decide(prepared[1][:tokens], runner.input_ids.gpu[:tokens], chunks, padded)
    return prepared


@cache
def _served(model: str, revision: str | None) -> Served:
    """The router of a checkpoint, in a process that may have run a model."""
    from vllm.config import VllmConfig, set_current_vllm_config

    # From then on vLLM's decoders, which are transformers', can be made under some configuration of its own only.
    settings = VllmConfig()
    settings.model_config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    )
    with set_current_vllm_config(settings):
        return served(model, revision)


def _version() -> str:
    import vllm

    return vllm.__version__


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.skipit")  # vLLM shows what is below its own name
