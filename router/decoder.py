"""Finding the decoder layers of a model, whatever its family."""

from torch import nn
from transformers import PreTrainedModel

from .errors import DecoderNotFoundError


def find_decoder(model: nn.Module, layers: str | None = None) -> tuple[str, nn.Module, nn.ModuleList]:
    """Find the decoder of a model: the module whose layers turn embeddings into next-token states.

    Args:
        model: any model; vision-language models of transformers are found by `get_decoder()`.
        layers: dotted path of the layer list, for models that are not found by themselves.

    Returns:
        The path of the layer list, the module that holds it, and the list.

    Raises:
        DecoderNotFoundError: no layer list at the path, or none found; the message lists the module lists there are.
    """
    if layers is None and isinstance(model, PreTrainedModel):
        found = getattr(model.get_decoder(), "layers", None)
        layers = next((name for name, module in model.named_modules() if module is found), None)
    if layers is not None:
        try:
            found = model.get_submodule(layers)
        except AttributeError:
            found = None
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            parent, _, _ = layers.rpartition(".")
            return layers, model.get_submodule(parent), found
    raise DecoderNotFoundError(_describe(model, layers))


def _describe(model: nn.Module, layers: str | None) -> str:
    wanted = f"no decoder layers at `layers={layers!r}`" if layers else "no decoder layers"
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    found = ", ".join(lists) or "none"
    example = lists[-1].split(" ")[0] if lists else "model.layers"
    return (
        f"{wanted} in `{type(model).__name__}`. Module lists found: {found}. "
        f'Name one: RouterConfig(layers="{example}").'
    )
