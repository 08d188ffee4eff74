"""What the layers of a model must know during one call, and how it reaches them.

A pre-hook on the top model builds one `Call` per forward and adds it to the keyword arguments, which
transformers hands down to every decoder layer. Nothing is kept on a module, so interleaved generations,
threads and gradient checkpointing (which replays a layer with the same arguments) cannot mix calls up.
What a caller wants for a stretch of code (another threshold, masked execution, a trace) is a context
variable that the pre-hook reads: `with running(mode="masked"): ...`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Layout
from .cache import SkipCache
from .config import Granularity, KVPolicy, RouterConfig, Unit, check_choice
from .errors import InputError
from .modality import MODALITIES, token_modality
from .policies import Gated, Policy
from .trace import Step, Trace

Mode = Literal["masked", "gathered", "dense"]
KWARG = "skipit_call"


@dataclass(frozen=True)
class Call:
    """One forward call of a gated model.

    Attributes:
        policy: decides which token runs which layer.
        kv: what becomes of the keys and values of skipped tokens.
        unit: what a token skips.
        granularity: who decides.
        mode: `masked` computes every token and discards; `gathered` computes only the tokens that run.
        modality: int64 [batch, seq], 0 text, 1 vision.
        real: bool [batch, seq], False at padding.
        prompt: bool [batch, seq], the tokens that decide for their row under `sequence`.
        position: int64 [batch, seq], how many real tokens of the row come before; the same however it is padded.
        past: tokens per row already in the cache, padding counted.
        tokens: how many are real, over all rows.
        cache: of keys and values, and of what a prompt has decided; or None.
        step: where decisions are recorded, or None.
    """

    policy: Policy
    kv: KVPolicy
    unit: Unit
    granularity: Granularity
    mode: Mode
    modality: Tensor
    real: Tensor
    prompt: Tensor
    position: Tensor
    past: int
    tokens: int
    cache: SkipCache | None
    step: Step | None

    def to(self, device: torch.device) -> "Call":
        """The call with its tensors on a device: the layers of a model may be spread over several."""
        if self.real.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("modality", "real", "prompt", "position")}
        return replace(self, **moved)

    @cached_property
    def padded(self) -> Layout | None:
        """Where the real tokens are, the same for every layer; None where there is no padding."""
        return Layout.of(self.real) if self.tokens < self.real.numel() else None

    def pooled(self, layer: int, logits: Tensor) -> Tensor:
        """Logits of every token [batch, seq] replaced by their mean over the prompt's tokens of row and modality.

        What a prompt has decided is kept in the cache and holds for the tokens after it. A token of a modality that no
        prompt has had decides for itself.
        """
        chosen = F.one_hot(self.modality, len(MODALITIES)) * self.prompt[..., None]
        count = chosen.sum(1)
        means, known = (logits[..., None] * chosen).sum(1) / count.clamp(min=1), count > 0
        if self.cache is not None:
            held = self.cache.layers[layer]
            if held.decided is not None:
                earlier = ~held.decided.isnan()
                means, known = torch.where(earlier, held.decided, means), known | earlier
            held.decided = means.detach().masked_fill(~known, torch.nan)
        return torch.where(known.gather(1, self.modality), means.gather(1, self.modality), logits)


@dataclass(frozen=True)
class _Running:
    policy: Policy | None = None
    budget: float | str | None = None
    mode: Mode | None = None
    kv: KVPolicy | None = None
    unit: Unit | None = None
    granularity: Granularity | None = None
    prompt: Tensor | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("kv", KVPolicy), ("unit", Unit), ("granularity", Granularity)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), kind)


_running: ContextVar[_Running] = ContextVar("skipit_running", default=_Running())  # noqa: B039 - frozen


@contextmanager
def running(**options: Any) -> Iterator[None]:
    """Run gated models differently within a `with` block; options not named keep their outer value.

    Args:
        **options: `policy` (instead of the gates), `budget` (a calibrated operating point), `mode` ("masked",
            "gathered", or "dense": as if nothing were attached), `kv` ("retain", "evict"), `unit` ("block",
            "attention", "mlp"), `granularity` ("token", "sequence"), `prompt` (bool [batch, seq]: where answers are
            part of the input, as in training, the tokens that may decide for their row), `trace` (a `Trace` that
            receives every step).

    Example:
        >>> with running(mode="dense"):
        ...     pass  # model.generate(...) runs every layer for every token
    """
    token = _running.set(replace(_running.get(), **options))
    try:
        yield
    finally:
        _running.reset(token)


class Router:
    """The pre-hook of a gated model: turns the arguments of a forward call into a `Call` for its layers."""

    def __init__(self, config: RouterConfig, num_layers: int, image_layers: frozenset[int] = frozenset()) -> None:
        self.config = config
        self.num_layers = num_layers
        self.image_layers = image_layers

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Add the call to `kwargs`; see `torch.nn.Module.register_forward_pre_hook`."""
        options = _running.get()
        mode = options.mode or ("masked" if model.training else "gathered")
        if mode == "dense":
            return args, kwargs
        if mode == "gathered" and _wants_attention_weights(model, kwargs):
            mode = "masked"  # the weights of every token, which gathered execution does not compute
        if args:
            kwargs = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
        cache = self._cache(model, kwargs)
        if cache is not None:
            kwargs = {**kwargs, "past_key_values": cache}
        past = cache.get_seq_length() if cache is not None else 0
        modality, real, position = self._tokens(model, kwargs, past)
        kv, unit = options.kv or self.config.kv, options.unit or self.config.unit
        step = None
        if options.trace is not None:
            step = Step(modality, real, past, kv, unit, layers=self.num_layers)
            options.trace.steps.append(step)
        call = Call(
            policy=options.policy or Gated(self.config.threshold_at(options.budget)),
            kv=kv,
            unit=unit,
            granularity=options.granularity or self.config.granularity,
            mode=mode,
            modality=modality,
            real=real,
            prompt=real if options.prompt is None else real & options.prompt.to(real.device),
            position=position,
            past=past,
            tokens=int(real.sum()),
            cache=cache,
            step=step,
        )
        return (), {**kwargs, KWARG: call}

    def _cache(self, model: nn.Module, kwargs: dict[str, Any]) -> SkipCache | None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = model.config.get_text_config().use_cache  # type: ignore[union-attr, operator]
            return SkipCache(self.num_layers, self.image_layers) if use_cache else None
        if isinstance(cache, SkipCache):
            return cache
        return SkipCache.from_dynamic(cache, self.num_layers, self.image_layers)

    @staticmethod
    def _tokens(model: nn.Module, kwargs: dict[str, Any], past: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        like = ids if ids is not None else embeds
        if like is None:
            raise InputError("a gated model needs `input_ids` or `inputs_embeds`; got neither.")
        batch, length = like.shape[:2]
        modality = token_modality(model.config, ids, kwargs.get("mm_token_type_ids"), length)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            seen = mask.bool().to(modality.device)
            position = seen.cumsum(-1)[:, -length:] - 1
            real = seen[:, -length:]
        else:
            real = torch.ones(batch, length, dtype=torch.bool, device=modality.device)
            position = torch.arange(past, past + length, device=modality.device).expand(batch, -1)
        return modality, real, position


def _wants_attention_weights(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(model.config.get_text_config(), "output_attentions", False)  # type: ignore[union-attr, operator]
    return bool(wanted)
