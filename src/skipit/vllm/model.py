"""The model that vLLM runs: its own transformers backend, with layers in which tokens skip.

Attention is computed for every token, since its kernel cannot leave some out, and the output of those that skip is
multiplied by 0; keys and values are kept (`retain`). The MLP is computed for the tokens that run alone: by an operation
at which vLLM splits its graphs, so that what is compiled never sees how many they are.
"""

import os
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import direct_register_custom_op

from skipit.router import UnsupportedModelError

from .decisions import Decisions
from .hooks import wrap_runner
from .metrics import FOLDER, Counts
from .requests import names
from .served import served

wrap_runner()


class Packed:
    """The MLP of a layer, computed for the tokens that run; what `packed_mlp` finds by its name."""

    def __init__(self, own: Callable[[Tensor], Tensor], decisions: Decisions, layer: int) -> None:
        self.own, self.decisions, self.layer = own, decisions, layer

    def __call__(self, hidden: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """The MLP's output, 0 for tokens that skip."""
        places = self.decisions.places(self.layer)
        if places is None or len(places) == hidden.shape[-2]:
            return self.own(hidden)
        output = torch.zeros_like(hidden)
        if len(places):
            flat = hidden.flatten(0, -2)
            output.view_as(flat).index_copy_(0, places, self.own(flat[places]))
        return output


def packed_mlp(hidden: Tensor, name: str) -> Tensor:
    """Run the MLP of a layer, by its name among those that vLLM does not compile."""
    output: Tensor = get_forward_context().no_compile_layers[name](hidden)
    return output


def _like_packed_mlp(hidden: Tensor, name: str) -> Tensor:
    return torch.empty_like(hidden)


_LIBRARY = torch.library.Library("skipit", "FRAGMENT")
direct_register_custom_op("packed_mlp", packed_mlp, fake_impl=_like_packed_mlp, target_lib=_LIBRARY)


def _drop_skipped(attention: nn.Module, keep: Float[Tensor, "seq 1"]) -> None:
    """Let an attention give 0 for tokens that skip."""
    # vLLM has given the instance a forward of its own.
    own = attention.forward
    attention.register_buffer("skipit_keep", keep, persistent=False)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        states, *rest = output if isinstance(output, tuple) else (output,)
        states = states * self.skipit_keep[: states.shape[-2]]
        return (states, *rest) if isinstance(output, tuple) else states

    attention.forward = MethodType(forward, attention)


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class Gated(TransformersMultiModalForCausalLM):
    """Any vision-language model of vLLM's transformers backend, with the gates of its checkpoint.

    Attributes:
        decisions: who runs what in the step that comes.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        hf_config = vllm_config.model_config.hf_config
        router = served(vllm_config.model_config.model, vllm_config.model_config.revision)
        # Names of weights are translated by the architecture that the checkpoint names.
        ours, hf_config.architectures = hf_config.architectures, router.architectures
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            hf_config.architectures = ours
        self.router, self._layers = router.config, router.layers
        layers: Any = self.model.get_submodule(router.layers)
        group = get_tp_group()
        like = torch.empty((), dtype=vllm_config.model_config.dtype, device=self.device_config.device)
        self.decisions = Decisions(
            **router.gates,
            config=hf_config,
            costs=router.costs,
            unit=router.config.unit,
            most=vllm_config.scheduler_config.max_num_batched_tokens,
            like=like,
            agree=lambda run: group.broadcast(run, src=0) if group.world_size > 1 else run,
        )
        if FOLDER in os.environ and group.rank_in_group == 0:
            self.decisions.count = Counts(os.environ[FOLDER], names(router.config))
        uncompiled = vllm_config.compilation_config.static_forward_context
        for index, layer in enumerate(layers):
            attention, mlp = (getattr(layer, name) for name in router.parts)
            if router.config.unit == "block":
                _drop_skipped(attention, self.decisions.keep[index])
            name = f"{prefix}{router.layers}.{index}.skipit"
            uncompiled[name] = Packed(mlp.forward, self.decisions, index)
            mlp.forward = partial(torch.ops.skipit.packed_mlp, name=name)

    def load_weights(self, weights: Any) -> set[str]:
        """Load the checkpoint's weights; see `_check_entry`."""
        loaded = super().load_weights(weights)
        self._check_entry(self.model.get_submodule(self._layers))
        return loaded

    def forward(
        self,
        input_ids: Any,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **rest: Any,
    ) -> Any:
        """Run a step as it was decided, or in full where nothing was, as in vLLM's own trial runs."""
        if not self.decisions.decided:
            self.decisions.open(positions.shape[-1])
        try:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **rest)
        finally:
            self.decisions.close()

    @torch.no_grad()
    def _check_entry(self, layers: Any) -> None:
        """Refuse a decoder that changes embeddings before its first layer: gates read what enters that.

        Raises:
            UnsupportedModelError: names the decoder.
        """
        decoder: Any = self.model.get_decoder()
        embeddings = torch.randn(1, 2, self.text_config.hidden_size).to(self.decisions.keep)
        entered: list[Tensor] = []

        def stop(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            # Not by a call, which vLLM may have made one that compiles.
            places = torch.arange(2, device=embeddings.device)[None]
            decoder.forward(inputs_embeds=embeddings, position_ids=places, use_cache=False, return_dict=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not torch.equal(entered[0], embeddings):
            raise UnsupportedModelError(
                f"`{type(decoder).__name__}` changes embeddings before its first layer, and under vLLM gates read them "
                "before. Use `skipit.load`, or serve it without gates: SKIPIT_VLLM=0."
            )


class _Reached(Exception):
    """The first layer was reached."""
