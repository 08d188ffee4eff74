"""Laws of lossless decoding: whatever the gated model drafts, the answer is the dense model's, and so is the cache.

In fp32: the dense model runs one token at a time on its own, and several when it verifies, which is the same but for
the order in which sums are taken.
"""

from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, build, inputs
from tiny_models import PATTERNS, same
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

import skipit
from skipit.router import Drafts, FixedUnits, RouterConfig, SkipCache, attach, running

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
ROW = [5, "image", 6, 7, 6, 7]
STEPS = 16
# Tied embeddings make a tiny random model repeat its last token, which any draft guesses.
NEW = {"max_new_tokens": STEPS, "do_sample": False, "no_repeat_ngram_size": 1}


def gated(family: str, pattern: str = "gates", **settings: Any) -> Any:
    model = build(family)
    attach(model, RouterConfig(**settings))
    if pattern != "open":
        PATTERNS[pattern](model)
    return model


def lossless(model: Any, batch: dict[str, Tensor], **settings: Any) -> tuple[Any, Drafts]:
    return skipit.generate(model, lossless=True, return_trace=True, **batch, **{**NEW, **settings})


def complete(cache: Any) -> None:
    """No layer lacks a token, owes one, or says that it does."""
    assert isinstance(cache, SkipCache)
    assert not any(layer.partial or layer._owed or layer.gaps for layer in cache.layers)


@EVERY_FAMILY
@EVERY_POLICY
def test_the_answer_and_the_cache_are_the_dense_models(family: str, kv: str) -> None:
    batch, cache = inputs(family, [ROW]), DynamicCache()  # which keeps all tokens where a window slides, too
    wanted = build(family).generate(**batch, **NEW, past_key_values=cache)
    made, drafts = lossless(gated(family, kv=kv), batch, return_dict_in_generate=True)
    assert torch.equal(made.sequences, wanted)
    assert drafts.accepted < drafts.drafted, "some drafts were wrong, so what they left had to be forgotten"
    complete(made.past_key_values)
    for mine, dense in zip(made.past_key_values.layers, cache.layers, strict=True):
        assert mine.get_seq_length() == dense.get_seq_length()
        assert same(mine.keys, dense.keys)
        assert same(mine.values, dense.values)


@EVERY_FAMILY
def test_a_draft_that_is_right_is_accepted_whole(family: str) -> None:
    batch = inputs(family, [ROW])
    made, drafts = lossless(gated(family, "open"), batch, draft_tokens=4, max_new_tokens=17)
    assert torch.equal(made, build(family).generate(**batch, **{**NEW, "max_new_tokens": 17}))
    # The prompt gives one token, and three passes four drafted ones and one more; one token is left for a last pass.
    assert drafts == Drafts(drafted=12, accepted=12, verifications=4)


@EVERY_FAMILY
@EVERY_POLICY
def test_a_draft_that_runs_no_layer_is_of_no_matter(family: str, kv: str) -> None:
    batch, nobody = inputs(family, [ROW]), FixedUnits(torch.zeros(LAYERS, 2, dtype=torch.bool))
    with running(policy=nobody):
        made, _ = lossless(gated(family, "open", kv=kv), batch)
    assert torch.equal(made, build(family).generate(**batch, **NEW))


@EVERY_POLICY
@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_whatever_is_skipped(kv: str, unit: str, granularity: str) -> None:
    batch = inputs("llava", [ROW])
    made, drafts = lossless(gated("llava", kv=kv, unit=unit, granularity=granularity), batch)
    assert torch.equal(made, build("llava").generate(**batch, **NEW))
    assert drafts.accepted < drafts.drafted


@EVERY_POLICY
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_a_padded_row_longer_than_every_window(family: str, kv: str) -> None:
    batch = inputs(family, [[5, "image", *range(6, 30), "image", *range(6, 30), 6, 7]])
    texts = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    batch = {name: pad(value, (3, 0), value=0) if name in texts else value for name, value in batch.items()}
    made, drafts = lossless(gated(family, kv=kv), batch, no_repeat_ngram_size=2)
    assert torch.equal(made, build(family).generate(**batch, **{**NEW, "no_repeat_ngram_size": 2}))
    assert drafts.accepted < drafts.drafted
