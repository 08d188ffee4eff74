"""Peers' learned gates and what they scale, as modules in the place of our gate: re-implemented from the formulas."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from skipit.router import VISION, gated_layers
from skipit.router.call import KWARG, Call
from skipit.router.gates import TokenGate
from skipit.router.gathered import states_of, with_states


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
            self.net[-1].bias.copy_(torch.tensor([0.1, 2.0]))  # type: ignore[operator, union-attr]

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

    The model's policy must be a `TopVision`, which decides again here, from the same states.

    Returns:
        Handles whose `remove()` ends it.
    """
    return [layer.register_forward_hook(_scale, with_kwargs=True) for layer in gated_layers(model)]


def _scale(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call: Call | None = kwargs.get(KWARG)
    keep = getattr(getattr(call, "policy", None), "keep", None)
    if call is None or keep is None or keep[module.skipit_index] >= 1:
        return output
    hidden = args[0] if args else kwargs["hidden_states"]
    states = states_of(output)
    run = call.policy.decide(module.skipit_index, hidden, call, module.layer_gate).run
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

    def router_flops(self) -> float:
        """Per token."""
        return linear_flops(self.down) + linear_flops(self.up) + linear_flops(self.head)

    def adapter_flops(self) -> float:
        """Per token that skips."""
        return linear_flops(self.gate) + linear_flops(self.value) + linear_flops(self.out)


def linear_flops(module: nn.Module) -> float:
    """FLOPs per token of the linear maps in a module, a multiply-accumulate counting as 2."""
    maps = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return float(sum(2 * part.in_features * part.out_features for part in maps))
