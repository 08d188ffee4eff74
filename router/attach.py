"""Adding gates to a loaded model, finding them again, and taking them off without a trace."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import PREFIX, packed_implementation
from .call import Compiling
from .config import RouterConfig, check_capacity, decision_points
from .decoder import find_decoder, image_layers, unsupported_reason
from .errors import RouterConfigError, SkipItError, UnsupportedModelError, short
from .gates import TokenGate
from .generation import add_budget_argument, remove_budget_argument
from .layer import GatedLayer
from .recorded import Recordings
from .running import Router
from .subclass import mix_in, take_out
from .views import attention_and_mlp

GATE = "layer_gate"  # a layer's gate among its submodules


def attach(model: nn.Module, config: RouterConfig | None = None) -> Router:
    """Give every decoder layer of a loaded model a gate; new gates let every token run.

    The model stays what it was: same class, same `state_dict` keys for its own weights (each layer gains
    `layer_gate`), same outputs bit for bit until the gates say otherwise, and `generate()` as before, which now takes a
    `budget`.

    Args:
        model: a loaded transformers model, before PEFT is applied.
        config: K/V policy, decoder path, thresholds.

    Returns:
        The router, which is the model's forward pre-hook.

    Raises:
        DecoderNotFoundError: no decoder layers; name them with `RouterConfig(layers=...)`.
        UnsupportedModelError: not a transformers decoder, or a kind of attention that gated execution cannot wrap.
        SkipItError: the model already has gates.
    """
    config = config or RouterConfig()
    if _find(model) is not None:
        raise SkipItError("the model already has gates; call `detach(model)` first.")
    _, decoder, layers = find_decoder(model, config.layers)
    decision_points(config.decide_at, len(layers))
    if not hasattr(decoder, "config"):
        raise UnsupportedModelError(f"`{type(decoder).__name__}` has no `config`: gates need a transformers decoder.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"`{type(model).__name__}` is an encoder-decoder: images are in its encoder, which gates in its decoder "
            "would not reach."
        )
    if reason := unsupported_reason(decoder.config):
        raise UnsupportedModelError(f"`{type(decoder).__name__}` has {reason}")
    implementation = packed_implementation(decoder.config._attn_implementation)  # type: ignore[union-attr, arg-type]
    hidden_size = decoder.config.hidden_size  # type: ignore[union-attr]
    of_images = image_layers(decoder.config)
    for index, layer in enumerate(layers):
        layer.skipit_parts = attention_and_mlp(layer)  # type: ignore[assignment]
        layer.layer_gate = TokenGate(hidden_size, index).to(_device(layer))  # type: ignore[arg-type]
        layer.skipit_index = index  # type: ignore[assignment]
        layer.skipit_attends_to_images = index in of_images  # type: ignore[assignment]
        mix_in(layer, GatedLayer)
    for attention_config in _attention_configs(decoder):
        attention_config._attn_implementation_internal = implementation
    router = Router(config, layers, of_images, _attention_configs(decoder))
    for module in _entries(model, decoder):
        module.register_forward_pre_hook(router, with_kwargs=True)
    add_budget_argument(model)
    return router


def detach(model: nn.Module) -> None:
    """Take the gates off again: classes, hooks, attributes and attention implementation are as before `attach`.

    Raises:
        SkipItError: the model has no gates.
    """
    top, router = find_router(model)
    _, decoder, layers = find_decoder(top, router.config.layers)
    for layer in layers:
        take_out(layer)
        del layer.layer_gate, layer.skipit_index, layer.skipit_attends_to_images, layer.skipit_parts
    for attention_config in _attention_configs(decoder):
        name = attention_config._attn_implementation_internal
        attention_config._attn_implementation_internal = name.removeprefix(PREFIX)
    for module in _entries(top, decoder):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is router:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    remove_budget_argument(top)


def compile(
    model: nn.Module,
    *,
    capacity: float | Sequence[float] | None = None,
    multiple: int | None = None,
    **options: Any,
) -> nn.Module:
    """Have `torch.compile` make graphs of a gated model's layers, each at the first call that needs it.

    With `backend="cudagraphs"` layers are recorded as CUDA graphs, which take the host a few launches to replay, and
    with `mode="reduce-overhead"` what `torch.compile` makes of them is (on other devices nothing is recorded, and the
    results are the same): those of a prompt for each of its lengths and widths that comes twice, and those of decoding,
    where layers that nobody runs are not replayed. One cache at a time has the memory that decoding is recorded with.

    Layers that run for every token, or for some of a prompt, become one graph each for all layers of a kind, whatever
    the number of tokens. Results are those of the model without, to rounding. While gates learn, nothing is compiled.

    Args:
        model: with gates.
        capacity: the share of a prompt's tokens that may run a layer, or one for each layer, rounded up to 64 tokens,
            so that a prompt is run without the host ever waiting for a count. Of more tokens, those of the highest
            logits run, in masked execution alike (`measure_capacity` finds shares that hardly any prompt exceeds). None
            asks once, how many run, and limits nothing.
        multiple: of which the width of packed rows is. None is 64, so that few shapes come about, and captured graphs
            can be replayed; on a CPU, where none are, it is 1.
        **options: of `torch.compile`, such as `mode` or `backend`; `fullgraph` is always true.

    Returns:
        The model, which now compiles.

    Raises:
        SkipItError: the model has no gates.
        RouterConfigError: `capacity` or `multiple` is no such number.
    """
    router = find_router(model)[1]
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise RouterConfigError(f"`multiple`: got {short(multiple)}, expected a number of tokens, at least 1.")
    router.capacity = None if capacity is None else check_capacity(capacity, router.num_layers)
    as_it_is, captured = options.get("backend") == "cudagraphs", options.get("mode") == "reduce-overhead"
    if captured:  # by us, a layer at a time
        del options["mode"]
    recordings = Recordings() if as_it_is or captured else None
    router.compiling = Compiling(None if as_it_is else options, multiple, recordings)
    return model


def find_router(model: nn.Module) -> tuple[nn.Module, Router]:
    """The gated model inside `model` (itself, or what PEFT or a trainer wrapped) and its router.

    Raises:
        SkipItError: the model has no gates.
    """
    gated = _find(model)
    if gated is None:
        raise SkipItError(f"`{type(model).__name__}` has no gates; call `attach(model)` first.")
    return gated


def gated_layers(model: nn.Module) -> list[GatedLayer]:
    """The gated decoder layers, in order."""
    top, router = find_router(model)
    _, _, layers = find_decoder(top, router.config.layers)
    return list(layers)  # type: ignore[arg-type]


def gate_state(model: nn.Module) -> dict[str, Tensor]:
    """The gates' parameters as two tensors: `weight` [layers, modalities, dim] and `bias` [layers, modalities]."""
    gates = [_active(layer.layer_gate) for layer in gated_layers(model)]
    return {name: torch.stack([getattr(gate, name).detach() for gate in gates]) for name in ("weight", "bias")}


@torch.no_grad()
def set_gates(model: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set all gates from `weight` [layers, modalities, dim] and `bias` [layers, modalities].

    Raises:
        SkipItError: the shapes are not this model's.
    """
    gates = [_active(layer.layer_gate) for layer in gated_layers(model)]
    expected = ((len(gates), *gates[0].weight.shape), (len(gates), *gates[0].bias.shape))
    if (got := (tuple(weight.shape), tuple(bias.shape))) != expected:
        raise SkipItError(f"gates: got shapes {got[0]} and {got[1]}, this model needs {expected[0]} and {expected[1]}.")
    for index, gate in enumerate(gates):
        gate.weight.copy_(weight[index])
        gate.bias.copy_(bias[index])


def _active(gate: Any) -> TokenGate:
    """The gate in use: PEFT's `modules_to_save` replaces a module by a wrapper around a trained copy."""
    copies = getattr(gate, "modules_to_save", None)
    if copies is None:
        return gate
    return copies[gate.active_adapters[0]]


def _find(model: nn.Module) -> tuple[nn.Module, Router] | None:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Router):
                return module, hook
    return None


def _entries(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules by which a caller may enter: the model, those inside it around the decoder, and the decoder."""
    return [module for module in model.modules() if any(inner is decoder for inner in module.modules())]


def _device(layer: nn.Module) -> torch.device:
    """Where a layer is executed: of one whose weights are offloaded, where they are brought to.

    A meta device is kept otherwise: gates of a model without weights have none either.
    """
    hooks = [getattr(module, "_hf_hook", None) for module in layer.modules()]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    return torch.device(next((device for device in devices if device is not None), next(layer.parameters()).device))


def _attention_configs(decoder: nn.Module) -> list[Any]:
    """Every configuration object that the decoder's attention or mask code reads, once."""
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    return list(configs.values())
