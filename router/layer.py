"""A decoder layer with a gate: a dynamic subclass of the layer's own class, made after loading.

What a token skips is the whole layer (`block`), or the attention or the MLP inside it; how, is in `execute.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .cache import SkipCache
from .call import KWARG, Call, Mode, image_states
from .config import Unit
from .errors import InputError, UnsupportedModelError
from .execute import Execution, dense, execute, execute_tokenwise, route, states_of, whole
from .gates import TokenGate
from .subclass import Mixin, mix_in, own_class, take_out

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


# A layer's decision on its way to the module inside that it is about.
_outer: ContextVar[Execution | None] = ContextVar("skipit_execution", default=None)


class GatedLayer(Mixin, _Module):
    """Mixin put before a decoder layer's own class."""

    layer_gate: TokenGate
    skipit_index: int
    skipit_attends_to_images: bool
    skipit_packs_mlp: bool

    def __call__(self, hidden_states: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
        """Decide, at a decision point, and run the layer; outside what gradient checkpointing runs a second time."""
        call = kwargs.get(KWARG)
        if isinstance(call, Call):
            hidden_states = call.decide(self.skipit_index, hidden_states, _replayed(self))
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
        """Run the layer for the tokens that the call's policy chooses; the whole layer in a dense run."""
        kwargs = _named(own_class(type(self)), 1, args, kwargs)
        call: Call | Mode | None = kwargs.pop(KWARG, None)
        if call is None:
            raise InputError(
                f"`{type(self).__name__}` has a gate and was reached without its router, which would run every token. "
                "Call the whole model, or the model inside it that takes `input_ids`."
            )
        if isinstance(call, str):
            return super().forward(hidden_states, **kwargs)
        held: SkipCache | None = kwargs.get("past_key_values")
        store = held.layers[self.skipit_index] if held is not None else None
        stretch = call.stretch(self.skipit_index)
        if call.step is not None and self.skipit_attends_to_images:
            call.step.images = image_states(kwargs, len(hidden_states), store)
        if call.mode == "gathered" and not call.learning and stretch.everyone(self.skipit_index):
            return dense(super().forward, hidden_states, store, call.past, kwargs)
        stretch = stretch.to(hidden_states.device)
        execution = Execution(self.skipit_index, stretch, call, store, self.skipit_attends_to_images)
        if call.unit == "block":
            if route(self.skipit_packs_mlp, execution) == "whole":
                with _inside(execution):
                    output = whole(super().forward, hidden_states, execution, kwargs)
            else:
                output = execute(super().forward, hidden_states, hidden_states, execution, kwargs)
        else:
            _check_parts(self, call.unit)
            if store is not None:
                store.settle()  # by the layer as it is when nothing inside it is left out
            with _inside(execution):
                output = super().forward(hidden_states, **kwargs)
        if call.learning and call.mode == "gathered" and execution.decision.straight_through() is not None:
            states_of(output).requires_grad_().register_hook(_refuse_gradient)
        return output


def _replayed(layer: Any) -> bool:
    """Whether transformers will run a layer a second time by reentrant checkpointing, for its gradients."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
        return False
    how = getattr(layer._gradient_checkpointing_func, "keywords", {})
    return bool(how.get("use_reentrant", True))


def _refuse_gradient(gradient: Float[Tensor, "batch seq dim"]) -> None:
    raise InputError(
        "gates get no gradient where only the tokens that run are computed. Train with `model.train()`, or within "
        "`running(mode='masked')`."
    )


class GatedAttention(Mixin, _Module):
    """Mixin put before the class of a layer's attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention for the tokens that its layer chose, when that is what they skip; others get zeros."""
        execution = _outer.get()
        if execution is None:
            return super().forward(*args, **kwargs)
        if execution.call.unit == "block":  # in which attention is for all tokens, and the MLP is not
            return super().forward(*args, **kwargs)
        kwargs = _named(own_class(type(self)), 0, args, kwargs)
        hidden = kwargs.pop("hidden_states")
        if execution.call.unit == "attention":
            output = execute(super().forward, hidden, torch.zeros_like(hidden), execution, kwargs)
            return output if isinstance(output, tuple) else (output, None)  # nothing ran, so there are no weights
        return dense(super().forward, hidden, execution.store, execution.call.past, kwargs)


class GatedMLP(Mixin, _Module):
    """Mixin put before the class of a layer's MLP."""

    def forward(self, hidden: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
        """Run the MLP for the tokens that its layer chose, when that is what they skip; others get zeros."""
        execution = _outer.get()
        if execution is None or execution.call.unit == "attention" or args or kwargs:
            return super().forward(hidden, *args, **kwargs)
        return execute_tokenwise(super().forward, hidden, torch.zeros_like(hidden), execution)


def mix_in_parts(layer: nn.Module) -> bool:
    """Let a layer's attention and MLP be skipped by themselves, where it is clear which is which; whether it is."""
    attention = [child for child in layer.children() if hasattr(child, "head_dim") and hasattr(child, "config")]
    others = [
        child
        for child in layer.children()
        if child not in attention and not isinstance(child, TokenGate) and any(p.dim() > 1 for p in child.parameters())
    ]
    if len(attention) == 1 and len(others) == 1:
        mix_in(attention[0], GatedAttention)
        mix_in(others[0], GatedMLP)
        return True
    return False


def take_out_parts(layer: nn.Module) -> None:
    """Undo `mix_in_parts`, also where PEFT has wrapped a part."""
    for module in layer.modules():
        if isinstance(module, GatedAttention | GatedMLP):
            take_out(module)


def _check_parts(layer: nn.Module, unit: Unit) -> None:
    if not any(isinstance(child, GatedMLP) for child in layer.modules()):
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
        raise UnsupportedModelError(
            f"`unit`: got {unit!r}, but `{type(layer).__name__}` is not one attention and one MLP; it has {children}. "
            "Use unit='block'."
        )


@contextmanager
def _inside(execution: Execution) -> Iterator[None]:
    token = _outer.set(execution)
    try:
        yield
    finally:
        _outer.reset(token)


def _named(own: type, first: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call to `own`'s forward, with its positional ones, from the `first`, by name."""
    return kwargs | dict(zip(_parameters(own)[first:], args, strict=False)) if args else kwargs


@cache
def _parameters(own: type) -> tuple[str, ...]:
    """Names of the arguments of a module class's own forward."""
    return tuple(signature(own.forward).parameters)[1:]  # type: ignore[attr-defined]
