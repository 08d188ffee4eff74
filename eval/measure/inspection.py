"""What skipit would find in a model, from its configuration alone: no weights are read, none are made."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from skipit.router import MODALITIES, RouterConfig, SkipItError, attach, detach
from skipit.router.attention import SUPPORTED
from skipit.router.checkpoint import ROUTER_FILE
from skipit.router.decoder import find_decoder, layer_kinds
from skipit.router.errors import CheckpointError, UnsupportedModelError
from skipit.router.files import CONFIG, check_config
from skipit.router.modality import PLACEHOLDERS
from skipit.router.paths import missing
from skipit.theory.cost import CostModel
from skipit.train.data.sources import resolve_model


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer.

    Attributes:
        kind: of its attention, in transformers' names.
        name: its class.
        parameters: its own weights.
        gate_parameters: what a gate adds.
        flops_per_token: all linear maps; a multiply-accumulate is 2 FLOPs.
        flops_per_key: attention, for each key that a token sees.
        flops_if_skipped: per token that skips it under `retain`: its keys and values; `evict` spends nothing.
        kv_bytes: of cache per token; none where keys and values come from images.
        flops_per_image_state: keys and values of images, in a cross-attention layer; whatever tokens do.
    """

    kind: str
    name: str
    parameters: int
    gate_parameters: int
    flops_per_token: float
    flops_per_key: float
    flops_if_skipped: float
    kv_bytes: int
    flops_per_image_state: float


@dataclass(frozen=True)
class Inspection:
    """What a model's configuration says.

    Attributes:
        model: what was asked for.
        name: class of the model.
        model_type: of its configuration.
        dtype: in which its weights are stored; bytes are counted in it.
        parameters: of the whole model.
        decoder: dotted path of the decoder layers.
        layers: of the decoder, in order.
        vision_tokens: the placeholders of image and video features in `input_ids`, by their name in the configuration.
        attention: whether each attention implementation of the model can run gated.
        refused: why gates cannot be attached; None if they can.
        router: settings of the gates beside the configuration, if it is a gated checkpoint.
    """

    model: str
    name: str
    model_type: str
    dtype: str
    parameters: int
    decoder: str
    layers: tuple[LayerFacts, ...]
    vision_tokens: dict[str, int]
    attention: dict[str, bool]
    refused: str | None
    router: dict[str, Any] | None

    @property
    def share_if_skipped(self) -> float:
        """FLOPs in linear maps of a token that skips every layer under `retain`, of those of one that runs them."""
        return sum(layer.flops_if_skipped for layer in self.layers) / sum(x.flops_per_token for x in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with totals over the layers."""
        names = ("gate_parameters", "flops_per_token", "kv_bytes")
        totals = {name: sum(getattr(layer, name) for layer in self.layers) for name in names}
        return {**asdict(self), "supported": self.refused is None, "totals": totals}


def inspect_model(source: str, layers: str | None = None) -> Inspection:
    """Inspect a model on the meta device.

    Args:
        source: a folder with a config.json, a Hub id, or `reference`.
        layers: dotted path of the decoder layers, where they are not found by themselves.

    Raises:
        CheckpointError: there is no configuration, or transformers does not know it.
        UnsupportedModelError: it is not a vision-language model, transformers cannot build it, or what its layers cost
            cannot be read off them.
        DecoderNotFoundError: its decoder layers are not found; the message lists what could be named.
    """
    folder = resolve_model(source)
    router_file = Path(folder) / ROUTER_FILE
    router = RouterConfig.from_file(router_file) if router_file.is_file() else None
    layers = layers or (router.layers if router else None)
    model = without_weights(source, folder)
    config: Any = model.config
    path, decoder, decoder_layers = find_decoder(model, layers)
    refused = _refused(model, layers)
    try:
        costs = CostModel.of(model, layers).layers
    except UnsupportedModelError as error:
        # Why there can be no gates says more than that an attention is unlike others.
        raise UnsupportedModelError(refused or str(error)) from error
    width = int(decoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    gate = len(MODALITIES) * (width + 1)
    facts = tuple(
        LayerFacts(
            kind,
            type(layer).__name__,
            sum(p.numel() for p in layer.parameters()),
            gate,
            cost.linear,
            cost.attention,
            cost.keys_values,
            cost.kv_bytes,
            cost.image,
        )
        for kind, layer, cost in zip(layer_kinds(decoder.config), decoder_layers, costs, strict=True)
    )
    return Inspection(
        source,
        type(model).__name__,
        config.model_type,
        str(model.dtype).removeprefix("torch."),
        sum(p.numel() for p in model.parameters()),
        path,
        facts,
        _vision_tokens(config),
        _attention(model),
        refused,
        None if router is None else router.to_dict(),
    )


def without_weights(source: str, folder: str) -> Any:
    """A model on the meta device.

    Args:
        source: what the user called it.
        folder: `resolve_model` of that.

    Raises:
        CheckpointError: there is no configuration, or transformers does not know it.
        UnsupportedModelError: it is not a vision-language model, or transformers cannot build it.
    """
    return _on_meta(source, _config(source, folder))


def _config(source: str, folder: str) -> Any:
    from transformers import AutoConfig

    try:
        if (Path(folder) / CONFIG).exists():
            check_config(Path(folder) / CONFIG)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration may be wrong in any way
        reason = " ".join(f"{missing(folder)} {error}".split())
        raise CheckpointError(
            f"model {source!r} has no configuration that transformers can read: {reason}\n"
            "Give a folder with a config.json, a Hub id, or `reference` for the embedded model."
        ) from error


def _on_meta(source: str, config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UnsupportedModelError(
            f"model {source!r} is no vision-language model: `{config.model_type}` has no image-text-to-text class in "
            "transformers. Its decoder can still have gates: attach(model)."
        )
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                config, dtype=config.dtype or torch.float32, trust_remote_code=False
            )
    except Exception as error:  # a configuration may be wrong in any way
        raise UnsupportedModelError(f"model {source!r} cannot be built from its configuration: {error}") from error


def _attention(model: Any) -> dict[str, bool]:
    """Whether gated execution wraps each implementation that the model has."""
    has = {
        "eager": True,
        "sdpa": model._supports_sdpa,
        "flash_attention_2": model._supports_flash_attn,
        "flex_attention": model._supports_flex_attn,
    }
    return {name: name in SUPPORTED for name, there in has.items() if there}


def _vision_tokens(config: Any) -> dict[str, int]:
    """Placeholders by name; several families give each two names."""
    tokens: dict[str, int] = {}
    for name in PLACEHOLDERS:
        value = getattr(config, name, None)
        twin = name.replace("_index", "_id")
        if isinstance(value, int) and tokens.get(twin) != value:
            tokens[name] = value
    return tokens


def _refused(model: Any, layers: str | None) -> str | None:
    try:
        attach(model, RouterConfig(layers=layers))
    except SkipItError as error:
        return str(error)
    detach(model)
    return None
