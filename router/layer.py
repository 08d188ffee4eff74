"""A decoder layer with a gate: a dynamic subclass of the layer's own class, made after loading.

What a token skips is the whole layer (`block`), or the attention or the MLP inside it; how, is in `execute.py`.
"""

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .cache import SkipCache
from .call import KWARG, Call, Dense, image_states
from .compiled import handles, run_all, run_some
from .errors import InputError, UnsupportedModelError
from .execute import Execution, complete, dense, execute, execute_tokenwise, route, states_of, whole
from .gates import TokenGate
from .subclass import Mixin, own_class
from .views import Part, run, with_parts

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class GatedLayer(Mixin, _Module):
    """Mixin put before a decoder layer's own class.

    Attributes:
        skipit_index: of the layer in the decoder.
        skipit_attends_to_images: whether its keys and values come from images.
        skipit_parts: the names of its attention and its MLP; None where it is not clear which is which.
    """

    layer_gate: TokenGate
    skipit_index: int
    skipit_attends_to_images: bool
    skipit_parts: tuple[str, str] | None

    def __call__(self, hidden_states: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
        """Decide, at a decision point, and run the layer; outside what gradient checkpointing runs a second time."""
        call: Call | Dense | None = kwargs.get(KWARG)
        if isinstance(call, Call) and self.skipit_index not in call.stretches:
            hidden_states = call.decide(self.skipit_index, hidden_states, _replayed(self))
        if call is not None and call.step is not None:
            call.record(self.skipit_index)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
        """Run the layer for the tokens that the call's policy chooses; the whole layer in a dense run.

        Raises:
            InputError: there was no router.
            UnsupportedModelError: it is not clear what the layer's attention is and what its MLP.
        """
        if args:
            kwargs = _named(own_class(type(self)), 1, args, kwargs)
        call: Call | Dense | None = kwargs.pop(KWARG, None)
        if call is None:
            raise InputError(
                f"`{type(self).__name__}` has a gate and was reached without its router, which would run every token. "
                "Call the whole model, or the model inside it that takes `input_ids`."
            )
        held = kwargs.get("past_key_values")
        store = held.layers[self.skipit_index] if isinstance(held, SkipCache) else None
        if call.step is not None and self.skipit_attends_to_images:
            seen = 0 if held is None else held.get_seq_length(self.skipit_index)
            call.step.images = image_states(kwargs, len(hidden_states), seen)
        compiling = None if self.skipit_attends_to_images else call.compiling
        if isinstance(call, Dense):
            if compiling is not None:
                return run_all(self, hidden_states, store, compiling, kwargs)
            return super().forward(hidden_states, **kwargs)
        stretch = call.stretches[self.skipit_index]
        if call.unit != "block" and self.skipit_parts is None:
            children = ", ".join(f"{name} ({type(child).__name__})" for name, child in self.named_children())
            raise UnsupportedModelError(
                f"`unit`: got {call.unit!r}, but `{type(self).__name__}` is not one attention and one MLP; it has "
                f"{children}. Use unit='block'."
            )
        gathered = call.mode == "gathered" and not call.learning
        if gathered and stretch.bounds is None and stretch.everyone(self.skipit_index):
            if compiling is not None:
                return run_all(self, hidden_states, store, compiling, complete(hidden_states, store, kwargs, call.past))
            return dense(self, hidden_states, store, call.past, kwargs)
        stretch = stretch.to(hidden_states.device)
        execution = Execution(self.skipit_index, stretch, call, store, self.skipit_attends_to_images)
        if compiling is not None and handles(self, hidden_states, execution, kwargs):
            return run_some(self, hidden_states, execution, compiling, kwargs)
        if call.unit != "block":
            output = run(self._with_parts(execution), hidden_states, kwargs)
        elif route(self.skipit_parts is not None, hidden_states, execution) == "whole":
            output = whole(self._with_parts(execution), hidden_states, execution, kwargs)
        else:
            output = execute(self, hidden_states, hidden_states, execution, kwargs)
        if call.learning and call.mode == "gathered" and execution.decision.straight_through() is not None:
            states_of(output).requires_grad_().register_hook(_refuse_gradient)
        return output

    def _with_parts(self, execution: Execution) -> nn.Module:
        """The layer with an attention or an MLP that runs for some tokens alone, and gives zeros for the others."""
        assert self.skipit_parts is not None
        attention, mlp = (self._modules[name] for name in self.skipit_parts)
        assert attention is not None
        assert mlp is not None

        def some_attention(*args: Any, **kwargs: Any) -> Any:
            kwargs = _named(type(attention), 0, args, kwargs)
            hidden = kwargs.pop("hidden_states")
            if execution.call.unit == "mlp":
                return dense(attention, hidden, execution.store, execution.call.past, kwargs)
            output = execute(attention, hidden, torch.zeros_like(hidden), execution, kwargs)
            return output if isinstance(output, tuple) else (output, None)  # nothing ran, so there are no weights

        def some_mlp(hidden: Float[Tensor, "batch seq dim"], *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                return mlp(hidden, *args, **kwargs)
            return execute_tokenwise(mlp, hidden, torch.zeros_like(hidden), execution)

        parts = {}
        if execution.call.unit != "block":
            parts[self.skipit_parts[0]] = Part(attention, some_attention)
        if execution.call.unit != "attention":
            parts[self.skipit_parts[1]] = Part(mlp, some_mlp)
        return with_parts(self, **parts)


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


def _named(own: type, first: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call to `own`'s forward, with its positional ones, from the `first`, by name."""
    return kwargs | dict(zip(_parameters(own)[first:], args, strict=False))


@cache
def _parameters(own: type) -> tuple[str, ...]:
    """Names of the arguments of a module class's own forward."""
    return tuple(signature(own.forward).parameters)[1:]  # type: ignore[attr-defined]
