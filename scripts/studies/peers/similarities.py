"""Statistics of a dense model from which peers choose what to skip: similarities of states before and after layers.

Re-implemented from the formulas of ShortGPT (block influence), Gromov et al. (angles of blocks) and LLM-Drop.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from skipit.router import VISION, UnsupportedModelError, running, token_modality
from skipit.router.decoder import find_decoder
from skipit.theory.inputs import to_model
from skipit.theory.labels import IGNORE, predicts_answer
from skipit.theory.measures import angular_distance, cosine_distance
from skipit.theory.states import LayerRun, recorded, watching


@dataclass(frozen=True)
class Similarities:
    """How far states turn. Padding never counts, and the last layer's state is the one before the final norm.

    Attributes:
        influence: [layers], block influence: 1 - E cos(x_l, x_{l+1}) over all tokens.
        vision_influence: [layers], over vision tokens; NaN without any.
        attention: [layers], E cos(u, u + attention(u)).
        mlp: [layers], E cos(u, u + mlp(u)).
        angles: [layers + 1, layers + 1], entry (a, b) for a < b: mean over rows of arccos(cos(x_a, x_b)) / pi at
            the last prompt token; 0 elsewhere.
    """

    influence: Float[Tensor, " layers"]
    vision_influence: Float[Tensor, " layers"]
    attention: Float[Tensor, " layers"]
    mlp: Float[Tensor, " layers"]
    angles: Float[Tensor, "boundaries boundaries"]


@torch.no_grad()
def similarities(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Similarities:
    """Measure a dense model, or a gated one with everything running.

    Layers are taken to be pre-norm (x, x + attention, x + attention + MLP), as Llama's and Qwen's are.

    Args:
        model: on any device, in eval mode.
        batches: with labels, which tell where the prompt ends; -100 everywhere is a prompt alone.
    """
    _, _, layers = find_decoder(model)
    attentions = [_attention(layer) for layer in layers]
    device = next(model.parameters()).device
    sums = torch.zeros(4, len(layers), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    angles, rows = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64), 0
    for batch in batches:
        inputs = to_model({key: value for key, value in batch.items() if key != "labels"}, model)
        real = inputs["attention_mask"].bool()
        vision = real & (token_modality(model.config, inputs["input_ids"], inputs.get("mm_token_type_ids")) == VISION)
        attended: list[LayerRun] = []
        with running(mode="dense"), recorded(layers) as runs, watching(attentions, attended.append):
            model(**inputs, use_cache=False)
        for index, (run, attention) in enumerate(zip(runs, attended, strict=True)):
            x, y, middle = run.entered, run.left, run.entered + attention.left
            turned = cosine_distance(x, y)
            found = (turned[real], turned[vision], cosine_distance(x, middle)[real], cosine_distance(middle, y)[real])
            sums[:, index] += torch.stack([values.double().sum() for values in found]).cpu()
        counts += torch.stack([real.sum(), vision.sum()]).double().cpu()
        last = _last_prompt(batch["labels"].to(device), real)
        states = [runs[0].entered, *(run.left for run in runs)]
        ends = [state[torch.arange(len(last), device=device), last] for state in states]
        for first in range(len(ends)):
            for end in range(first + 1, len(ends)):
                angles[first, end] += angular_distance(ends[first], ends[end]).double().sum().cpu() / torch.pi
        rows += len(last)
    influence, of_vision = sums[0] / counts[0], sums[1] / counts[1]
    return Similarities(influence, of_vision, 1 - sums[2] / counts[0], 1 - sums[3] / counts[0], angles / rows)


def _attention(layer: nn.Module) -> nn.Module:
    attention = next((child for child in layer.children() if hasattr(child, "head_dim")), None)
    if attention is None:
        raise UnsupportedModelError(f"`{type(layer).__name__}` has no one attention to compare states around.")
    return attention


def _last_prompt(labels: Tensor, real: Tensor) -> Tensor:
    """The place of each row's last prompt token, int64 [batch]: the one that predicts the first answer token."""
    places = torch.arange(labels.shape[1], device=labels.device)
    first = torch.nn.functional.pad(predicts_answer(labels), (0, 1)).int().argmax(-1)
    answered = (labels != IGNORE).any(-1)
    return torch.where(answered, first, (places * real).amax(-1))
