"""How a call reaches the layers of a gated model, and how a caller changes what it says for a stretch of code.

A pre-hook on the top model builds one `Call` per forward and adds it to the keyword arguments, which
transformers hands down to every decoder layer. What a caller wants for a stretch of code (another threshold, masked
execution, a trace) is a context variable that the pre-hook reads: `with running(mode="masked"): ...`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, update_wrapper, wraps
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from .attention import use_packed
from .cache import SkipCache, check_complete, take_over
from .call import KWARG, Call, Compiling, Dense, Mode, Policy, Route, Step, Trace
from .config import (
    BudgetPer,
    Granularity,
    KVPolicy,
    RouterConfig,
    Unit,
    check_capacity,
    check_choice,
    check_per_input,
    decision_points,
)
from .costs import LayerCost, layer_costs
from .drafts import Drafts
from .errors import InputError, RouterConfigError, UnsupportedModelError
from .gates import Stacked
from .modality import token_modality
from .policies import Gated, GatedPerInput


@dataclass(frozen=True)
class _Running:
    policy: Policy | None = None
    budget: float | str | None = None
    budget_per: BudgetPer | None = None
    mode: Mode | None = None
    kv: KVPolicy | None = None
    unit: Unit | None = None
    granularity: Granularity | None = None
    route: Route | None = None
    capacity: float | tuple[float, ...] | None = None
    prompt: Bool[Tensor, "batch seq"] | None = None
    prompt_length: int | None = None  # which `generate` knows: tokens per row, padding counted
    guided: bool = False  # `generate` also runs another prompt, without conditions
    held: dict[nn.Module, Stacked] | None = None  # in `generate`, see `Call.held`
    trace: Trace | None = None
    drafts: Drafts | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("mode", Mode),
            ("kv", KVPolicy),
            ("unit", Unit),
            ("granularity", Granularity),
            ("route", Route),
            ("budget_per", BudgetPer),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), kind)
        if self.budget_per == "input" and self.policy is not None:
            raise RouterConfigError(
                f"`budget_per`: 'input' finds thresholds from the logits of the gates, got policy "
                f"`{type(self.policy).__name__}` in their place. Leave out `policy`, or use budget_per='data'."
            )


_NOTHING_SET = _Running()
_running: ContextVar[_Running] = ContextVar("skipit_running", default=_NOTHING_SET)
# Of every open `running` block, the threads that were there when it began; and those that were not, when it ended.
_open: dict[object, frozenset[threading.Thread]] = {}
_strays: WeakSet[threading.Thread] = WeakSet()


@contextmanager
def running(**options: Any) -> Iterator[None]:
    """Run gated models differently within a `with` block; options not named keep their outer value.

    Args:
        **options: `policy` (instead of the gates), `budget` (a calibrated operating point), `budget_per` ("data",
            "input": each row's prompt spends the budget, any number in (0, 1], exactly), `mode` ("masked", "gathered",
            or "dense": as if nothing were attached), `kv` ("retain", "evict"), `unit` ("block", "attention", "mlp"),
            `granularity` ("token", "sequence"), `route` ("packed", "whole": by which of two ways,
            with the same result, gathered execution runs a layer under `retain`), `capacity` (the share of a prompt's
            tokens that may run a layer, or one for each layer, rounded up to 64 tokens: of more, those of the highest
            logits run), `prompt` (bool [batch, seq]: where
            answers are part of the input, as in training, the tokens that may decide for their row), `trace` (a
            `Trace` that receives every step), `drafts` (a `Drafts` that counts what lossless decoding does).

    A thread does not see the options of the one that started it, unless `model.generate` was taken inside the block, as
    in `Thread(target=model.generate)`; a thread that was started inside a block, and would run the default by mistake,
    gets an error. One that was there before, such as a pool's, opens a block of its own.

    Example:
        >>> with running(mode="dense"):
        ...     pass  # model.generate(...) runs every layer for every token
    """
    block, before = object(), frozenset(threading.enumerate())
    _open[block] = before
    try:
        with within(replace(_running.get(), **options)):
            yield
    finally:
        _strays.update(set(threading.enumerate()) - before)
        del _open[block]


@contextmanager
def within(options: _Running) -> Iterator[None]:
    """Have these options for a call of our own, which concerns no other thread."""
    token = _running.set(options)
    try:
        yield
    finally:
        _running.reset(token)


def current() -> _Running:
    """The options that hold here.

    Raises:
        InputError: this thread was started inside a `running` block, whose options do not reach it.
    """
    options = _running.get()
    if options is _NOTHING_SET and (_open or _strays):
        here = threading.current_thread()
        if here in _strays or any(here not in before for before in tuple(_open.values())):
            raise InputError(
                "`running`: this thread was started inside a block of another thread, whose options do not reach it. "
                "Open the block inside the thread (`running()` for the defaults), or give the thread the model's own "
                "method: Thread(target=model.generate, ...)."
            )
    return options


class OptionsOfAccess:
    """A method that, called by another thread, has the options of where it was taken from its object."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        """The bound method."""
        if instance is None:
            return self.function
        options, thread = _running.get(), threading.current_thread()

        @wraps(self.function)
        def call(instance: Any, *args: Any, **kwargs: Any) -> Any:
            elsewhere = threading.current_thread() is not thread and _running.get() is _NOTHING_SET
            # A copy: the defaults are then what was set, too.
            with within(replace(options)) if elsewhere else nullcontext():
                return self.function(instance, *args, **kwargs)

        return MethodType(call, instance)


class Router:
    """The pre-hook of a gated model: turns the arguments of a forward call into a `Call` for its layers."""

    def __init__(
        self,
        config: RouterConfig,
        layers: nn.ModuleList,
        image_layers: frozenset[int],
        attention_configs: Sequence[Any],
    ) -> None:
        self.config = config
        self.attention_configs = attention_configs
        self.decoder_config = attention_configs[0]  # which finding by `get_text_config()` takes 6 microseconds a time
        self.layers = layers
        self.num_layers = len(layers)
        self.image_layers = image_layers
        self.compiling: Compiling | None = None
        self.capacity: float | tuple[float, ...] | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Add the call to `kwargs`; see `torch.nn.Module.register_forward_pre_hook`."""
        if KWARG in kwargs:  # the model around this one has had its router already
            return args, kwargs
        options = current()
        mode = options.mode or ("masked" if model.training else "gathered")
        for config in self.attention_configs:
            use_packed(config)  # `set_attn_implementation` may have been called
        if mode == "dense":
            check_complete(kwargs.get("past_key_values"))
            return args, {**kwargs, KWARG: Dense()}
        if mode == "gathered" and self._wants_attention_weights(kwargs):
            mode = "masked"  # the weights of every token, which gathered execution does not compute
        if args:
            kwargs = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
        kv, unit = options.kv or self.config.kv, options.unit or self.config.unit
        granularity = options.granularity or self.config.granularity
        policy = options.policy or self._gated(options, granularity)
        capacity = self.capacity if options.capacity is None else options.capacity
        cache, compiling = kwargs.get("past_key_values"), None
        if mode == "gathered" and not torch.is_grad_enabled():
            compiling = self.compiling
        dense = capacity is None and getattr(policy, "skips_nothing", False)
        if isinstance(cache, SkipCache) and dense:
            dense = not cache.partial  # else a mask must say which keys were evicted
        if compiling is not None or not dense:
            cache = self._cache(kwargs)
            if cache is not None:
                kwargs = {**kwargs, "past_key_values": cache}
        if dense and options.trace is None:  # not even which tokens there are is asked
            return (), {**kwargs, KWARG: Dense(compiling)}
        past = cache.get_seq_length() if cache is not None else 0
        modality, real, seen = self._tokens(model, kwargs, past)
        step = None
        if options.trace is not None:
            step = Step(modality, real, past, kv, unit, layers=self.num_layers, decided=not dense)
            options.trace.steps.append(step)
        if dense:
            return (), {**kwargs, KWARG: Dense(compiling, step)}
        adapted = hasattr(model, "peft_config")
        if mode == "gathered" and adapted:
            _check_adapters(self.layers)
        by_prompt = ("granularity", "sequence", "token") if granularity == "sequence" else None
        if isinstance(policy, GatedPerInput):
            by_prompt = ("budget_per", "input", "data")
        if capacity is not None:
            by_prompt = ("capacity", "a limit", "no limit")
            capacity = check_capacity(capacity, self.num_layers)
        call = Call(
            policy=policy,
            points=decision_points(getattr(policy, "decide_at", self.config.decide_at), self.num_layers),
            gates=[layer._modules["layer_gate"] for layer in self.layers],  # type: ignore[misc]
            kv=kv,
            unit=unit,
            granularity=granularity,
            mode=mode,
            route=options.route,
            compiling=compiling,
            capacity=capacity,
            adapted=adapted,
            modality=modality,
            real=real,
            prompt=_deciding(real, past, options, kwargs, *by_prompt) if by_prompt else real,
            seen=seen,
            past=past,
            cache=cache,
            step=step,
            learning=torch.is_grad_enabled(),
            held=options.held,
        )
        return (), {**kwargs, KWARG: call}

    def _gated(self, options: _Running, granularity: Granularity) -> Gated | GatedPerInput:
        if (options.budget_per or self.config.budget_per) == "data":
            return Gated(self.config.threshold_at(options.budget))
        check_per_input(self.config.decide_at, granularity)
        if self.image_layers:
            raise UnsupportedModelError(
                f"`budget_per`: 'input' has no price for layers {sorted(self.image_layers)}, which attend to images "
                "that are not among the tokens. Use budget_per='data'."
            )
        return GatedPerInput(self.config.share_at(options.budget), self._costs)

    @cached_property
    def _costs(self) -> tuple[LayerCost, ...]:
        return layer_costs(self.layers, self.decoder_config.hidden_size, self.image_layers)

    def _cache(self, kwargs: dict[str, Any]) -> SkipCache | None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = self.decoder_config.use_cache
            return SkipCache(self.num_layers, self.image_layers) if use_cache else None
        return take_over(cache, self.num_layers, self.image_layers)

    def _wants_attention_weights(self, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("output_attentions")
        return bool(self.decoder_config.output_attentions if wanted is None else wanted)

    @staticmethod
    def _tokens(
        model: nn.Module, kwargs: dict[str, Any], past: int
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"], Bool[Tensor, "batch all"] | None]:
        """The modality of the call's tokens, which of them are real, and which of all so far, if that was said."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        like = ids if ids is not None else embeds
        if like is None:
            raise InputError("a gated model needs `input_ids` or `inputs_embeds`; got neither.")
        batch, length = like.shape[:2]
        modality = token_modality(model.config, ids, kwargs.get("mm_token_type_ids"), length)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            seen = mask.bool().to(modality.device)
            return modality, seen[:, -length:], seen
        return modality, torch.ones(batch, length, dtype=torch.bool, device=modality.device), None


def _check_adapters(layers: Iterable[nn.Module]) -> None:
    """Refuse adapters that look at a token's row or its place in it, which packed tokens do not have.

    Raises:
        UnsupportedModelError: PEFT has told an adapter of rows or offsets, for this call.
    """
    # PEFT tells all alike, so the first one says it, and is usually in the first layer: this is asked at every step.
    adapted = next((m for layer in layers for m in layer.modules() if hasattr(m, "adapter_layer_names")), None)
    for hook in () if adapted is None else adapted._forward_pre_hooks.values():
        for what in {"adapter_names", "alora_offsets"} & set(getattr(hook, "keywords", ())):
            raise UnsupportedModelError(
                f"`{what}`: an adapter that depends on a token's row or place cannot run on packed tokens. "
                "Merge one adapter for all rows, or compute every token: `with running(mode='masked')`."
            )


def _deciding(
    real: Bool[Tensor, "batch seq"],
    past: int,
    options: _Running,
    kwargs: dict[str, Any],
    setting: str,
    value: str,
    other: str,
) -> Bool[Tensor, "batch seq"]:
    """The tokens that decide for their row: those of its prompt, which have to come together.

    Outside `generate` the first call has the prompt, and a single token after it is a generated one.

    Args:
        real: False at padding.
        past: tokens per row already in the cache.
        options: that hold.
        kwargs: of the model.
        setting: by which prompts decide, for the message.
        value: that it has.
        other: that it would have to have.

    Raises:
        InputError: this call has a piece of a prompt alone, or answers in it that nothing tells from the prompt.
    """
    length, prompt, end = real.shape[1], options.prompt, options.prompt_length
    if prompt is not None:
        deciding = real & prompt.to(real.device)
        piece = past > 0 and bool(deciding.any())
    elif end is not None:
        deciding = real & (torch.arange(past, past + length, device=real.device) < end)
        piece = options.guided or (past < end and (past > 0 or length < end))
    else:
        deciding = real if past == 0 else torch.zeros_like(real)
        piece = past > 0 and length > 1
        if kwargs.get("labels") is not None:
            raise InputError(
                f"`{setting}`: {value!r} decides by the prompt, and there are `labels`, so answers are in the input. "
                f"Say what the prompt is: `with running(prompt=labels == -100)`, or use {setting}={other!r}."
            )
    if piece:
        raise InputError(
            f"`{setting}`: {value!r} decides by the whole prompt, got {length} tokens of one after {past} cached. "
            "Give it in one call, without `prefill_chunk_size`, cached prefix or guidance, or use "
            f"{setting}={other!r}."
        )
    return deciding
