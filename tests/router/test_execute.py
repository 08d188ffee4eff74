"""Layers that attend to images outside the sequence: what the laws, which leave them to chance, must not miss."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import LAYERS, ROWS, build, inputs
from tiny_models import PATTERNS, logits, same
from torch import Tensor

from skipit.router import Decision, LayerByLayer, RouterConfig, SkipCache, Trace, attach, running
from skipit.router.cache import ImageCacheLayer

IMAGES = 1  # the index of the layer that attends to images
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
EVERY_UNIT = pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
EVERY_MODE = pytest.mark.parametrize("mode", ["masked", "gathered"])


@dataclass(frozen=True)
class Late(LayerByLayer):
    """Tokens skip the layer that attends to images, until one place in the row; all others run all the time."""

    first: int

    def decide_layer(self, layer: int, hidden: Tensor, call: Any, gate: Any) -> Decision:
        return Decision((call.position >= self.first) | (layer != IMAGES))


def gated(**settings: Any) -> Any:
    model = build("mllama")
    attach(model, RouterConfig(**settings))
    return model


@EVERY_POLICY
@EVERY_UNIT
@EVERY_MODE
def test_images_are_kept_although_no_token_of_the_prompt_looks(kv: str, unit: str, mode: str) -> None:
    model, batch = gated(kv=kv, unit=unit), inputs("mllama", ROWS[:1])
    last = batch["input_ids"].shape[1] - 1
    mask = batch["cross_attention_mask"]
    whole = logits(model, batch, policy=Late(last), mode=mode)
    with torch.no_grad(), running(policy=Late(last), mode=mode):
        ids, real = batch["input_ids"], batch["attention_mask"]
        images = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", "cross_attention_mask")}
        prompt = model(input_ids=ids[:, :last], attention_mask=real[:, :last], cross_attention_mask=mask, **images)
        cache = prompt.past_key_values
        token = model(
            input_ids=ids[:, last:], attention_mask=real, cross_attention_mask=mask[:, last:], past_key_values=cache
        )
    assert isinstance(cache, SkipCache)
    assert [isinstance(layer, ImageCacheLayer) for layer in cache.layers] == [at == IMAGES for at in range(LAYERS)]
    assert same(torch.cat([prompt.logits, token.logits], dim=1), whole)
    assert not same(whole, logits(model, batch, policy=Late(last + 1)))  # the last token did look


@EVERY_POLICY
@EVERY_MODE
def test_a_later_image_joins_the_earlier_one(kv: str, mode: str) -> None:
    model, batch = gated(kv=kv), inputs("mllama", [["image", 5, 6, 7, "image", 8, 9]])
    policy = PATTERNS["tokens"](model)
    whole = logits(model, batch, policy=policy, mode=mode)
    cut, cache, parts = 4, None, []
    for image, tokens in enumerate((slice(0, cut), slice(cut, None))):
        one = {name: batch[name][:, image : image + 1] for name in ("pixel_values", "aspect_ratio_ids")}
        with torch.no_grad(), running(policy=policy, mode=mode):
            output = model(
                input_ids=batch["input_ids"][:, tokens],
                attention_mask=batch["attention_mask"][:, : tokens.stop],
                cross_attention_mask=batch["cross_attention_mask"][:, tokens, : image + 1],
                aspect_ratio_mask=batch["aspect_ratio_mask"][:, image : image + 1],
                past_key_values=cache,
                use_cache=True,
                **one,
            )
        cache = output.past_key_values
        parts.append(output.logits)
    assert same(torch.cat(parts, dim=1), whole)


@EVERY_POLICY
@EVERY_UNIT
def test_without_a_mask(kv: str, unit: str) -> None:
    """What a token sees then depends on its place in the call, so such a layer is run as it is."""
    model, batch = gated(kv=kv, unit=unit), inputs("mllama", [["image", 5, 6, 7, 8]])
    batch.pop("cross_attention_mask")
    policy = PATTERNS["tokens"](model)
    assert same(logits(model, batch, policy=policy), logits(model, batch, policy=policy, mode="masked"))


@EVERY_POLICY
def test_without_images_there_is_no_such_layer(kv: str) -> None:
    model, batch = build("mllama"), inputs("mllama", ROWS[1:2])
    dense = logits(model, batch)
    attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
    trace = Trace()
    assert torch.equal(logits(model, batch, trace=trace), dense)
    (step,) = trace.steps
    assert step.run.all((1, 2)).tolist() == [at != IMAGES for at in range(LAYERS)]
    assert step.probability[IMAGES].eq(0).all()
    assert step.images == (0, 0)
    logits(model, inputs("mllama", ROWS), trace=trace)
    assert trace.steps[1].run[IMAGES].any()
    assert trace.steps[1].images.held == trace.steps[1].images.new > 0
