"""Peers' learned gates and what they scale, as modules in the place of our gate: re-implemented from the formulas."""

import math
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipit.router import VISION, UnsupportedModelError, gated_layers
from skipit.router.call import KWARG, Call
from skipit.router.execute import states_of, with_states
from skipit.router.gates import TokenGate
from skipit.router.layout import Layout

from .policies import TopVision, unwatched


class DLLMGate(nn.Module):
    """D-LLM's gate: Linear(d, h) - RMSNorm - SiLU - Linear(h, 2), bias [0.1 skip, 2.0 run].

    The logit is run minus skip. While training it has Gumbel noise: the difference of two Gumbel draws is logistic.
    The authors' h is 512 at d = 4096; here it is d / 8, so that the gate costs the same share of a layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(8, width // 8)
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.RMSNorm(hidden), nn.SiLU(), nn.Linear(hidden, 2))
        with torch.no_grad():
            self.net[-1].bias.copy_(torch.tensor([0.1, 2.0]))  # type: ignore[operator]

    def forward(
        self, hidden: Float[Tensor, "batch seq dim"], modality: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Logits of running, the same net for every modality."""
        skip, run = self.net(hidden.float()).unbind(-1)
        logits: Tensor = run - skip
        if not self.training:
            return logits
        draw = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        return logits + draw.log() - (1 - draw).log()


def pmod_weight(logits: Tensor) -> Tensor:
    """p-MoD's weight of a vision token: 0.2 tanh(z) + 1, which is 1 for a new gate."""
    return 0.2 * torch.tanh(logits) + 1


def zero_gates(model: nn.Module) -> None:
    """Zero-initialize linear gates, as p-MoD does."""
    with torch.no_grad():
        for gate in (module for module in model.modules() if isinstance(module, TokenGate)):
            gate.weight.zero_()
            gate.bias.zero_()


def scale_vision(model: nn.Module) -> list[Any]:
    """p-MoD's residual, in every layer that drops some vision tokens: x + g F where one runs, g x where it skips.

    The model's policy must be a `TopVision`, which decides again here, from the same states; any other scales nothing.

    Returns:
        Handles whose `remove()` ends it.
    """
    return [layer.register_forward_hook(_scale, with_kwargs=True) for layer in gated_layers(model)]


def _scale(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call = kwargs.get(KWARG)
    policy = unwatched(call.policy) if isinstance(call, Call) else None
    if not isinstance(call, Call) or not isinstance(policy, TopVision) or policy.keep[module.skipit_index] >= 1:
        return output
    hidden = args[0] if args else kwargs["hidden_states"]
    states = states_of(output)
    run = policy.decide_layer(module.skipit_index, hidden, call, module.layer_gate).run
    weight = pmod_weight(module.layer_gate(hidden, call.modality))[..., None].to(hidden.dtype)
    scaled = torch.where(run[..., None], hidden + weight * (states - hidden), weight * hidden)
    return with_states(output, torch.where((call.modality == VISION)[..., None], scaled, states))


class FlexiGate(nn.Module):
    """FlexiDepth's router and adapter of one layer.

    Router: w = sigmoid(W_h W_u tanh(RMSNorm(W_d x))), bottleneck d / 16, x normalized. Adapter: SwiGLU of width m / 16.
    """

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        bottleneck, inner = max(4, width // 16), max(4, mlp // 16)
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.norm = nn.RMSNorm(bottleneck)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.head = nn.Linear(width, 1)
        self.input_norm, self.adapter_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.value = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.head.bias, TokenGate.OPEN)
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(width))

    def forward(
        self, hidden: Float[Tensor, "batch seq dim"], modality: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Logits of running."""
        inside = torch.tanh(self.norm(self.down(self.input_norm(hidden.float()))))
        return self.head(self.up(inside))[..., 0]

    def adapt(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """What a token that skips gets instead of the layer's MLP."""
        normed = self.adapter_norm(hidden.float())
        return self.out(F.silu(self.gate(normed)) * self.value(normed)).to(hidden.dtype)

    @property
    def router_flops(self) -> float:
        """Per token."""
        return linear_flops(self.down) + linear_flops(self.up) + linear_flops(self.head)

    @property
    def adapter_flops(self) -> float:
        """Per token that skips."""
        return linear_flops(self.gate) + linear_flops(self.value) + linear_flops(self.out)


_weight: ContextVar[tuple[Tensor, Layout] | None] = ContextVar("skipit_flexidepth", default=None)


def scale_by_router(model: nn.Module) -> list[Any]:
    """FlexiDepth's two paths: where a token runs, its MLP counts w; where it skips, it gets (1 - w) adapter(x).

    Returns:
        Handles whose `remove()` ends it.
    """
    handles: list[Any] = []
    for layer in gated_layers(model):
        if layer.skipit_parts is None:
            raise UnsupportedModelError(f"`{type(layer).__name__}` has no one MLP to be scaled.")
        mlp = layer.get_submodule(layer.skipit_parts[1])
        handles += [
            layer.register_forward_pre_hook(_weigh, with_kwargs=True),
            mlp.register_forward_hook(_scale_mlp),
            layer.register_forward_hook(_adapt, with_kwargs=True, always_call=True),
        ]
    return handles


def _weigh(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = kwargs.get(KWARG)
    if not isinstance(call, Call):  # a dense run
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    run = call.decision(module.skipit_index).run
    _weight.set((torch.sigmoid(module.layer_gate(hidden, call.modality)), Layout.of(run & call.real)))


def _scale_mlp(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    held = _weight.get()
    if held is None:
        return output
    weight, layout = held[0][..., None].to(output.dtype), held[1]
    return output * (weight if output.shape[:2] == weight.shape[:2] else layout.pack(weight))


def _adapt(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    held = _weight.get()
    _weight.set(None)
    if held is None or output is None:  # no call, or the layer has failed
        return output
    hidden = args[0] if args else kwargs["hidden_states"]
    weight, layout = held
    run = torch.zeros_like(weight, dtype=torch.bool)
    run.view(-1)[layout.places] = True
    other = hidden + (1 - weight)[..., None].to(hidden.dtype) * module.layer_gate.adapt(hidden)
    return with_states(output, torch.where(run[..., None], states_of(output), other))


def linear_flops(module: nn.Module) -> float:
    """FLOPs per token of the linear maps in a module, a multiply-accumulate counting as 2."""
    maps = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return float(sum(2 * part.in_features * part.out_features for part in maps))
