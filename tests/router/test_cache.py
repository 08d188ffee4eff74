"""A cache whose layers hold different tokens keeps count of them through everything transformers does to a cache."""

import copy
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from skipit.router import SkipCache, UnsupportedModelError
from skipit.router.cache import SkipCacheLayer, take_over
from skipit.router.room import SPARE


def states(index: Tensor, heads: int = 2) -> Tensor:
    """Keys or values [batch, heads, slots, 1] that say of which token they are."""
    return index.float()[:, None, :, None].expand(-1, heads, -1, 1)


def fill(layer: SkipCacheLayer, index: Tensor, tokens: int) -> Tensor:
    keys, values = layer.append(states(index), -states(index), index, tokens)
    assert torch.equal(values, -keys)
    return keys


def held(layer: SkipCacheLayer, batch: int) -> list[list[int]]:
    """The tokens each row holds, from the index; where it is not -1, the keys must say the same."""
    slots = layer.slots(batch, torch.device("cpu"))
    if layer.is_initialized:
        keys = layer.keys[:, 0, :, 0].long()
        assert torch.equal(slots[slots >= 0], keys[slots >= 0])
        assert torch.equal(layer.keys, -layer.values)
    return [row[row >= 0].tolist() for row in slots]


def test_a_layer_that_keeps_everything_is_a_dynamic_layer() -> None:
    cache, dynamic = SkipCache(1), DynamicCache()
    for tokens in (3, 1, 2):
        keys, values = torch.randn(2, 2, tokens, 4), torch.randn(2, 2, tokens, 4)
        for ours, theirs in zip(cache.update(keys, values, 0), dynamic.update(keys, values, 0), strict=True):
            assert torch.equal(ours, theirs)
        assert cache.get_seq_length() == dynamic.get_seq_length()
    assert cache.layers[0].index is None
    assert cache.num_bytes() == 2 * 2 * 2 * 6 * 4 * 4


@given(
    st.lists(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=3), max_size=4), st.data()
)
@settings(max_examples=60, deadline=None)
def test_any_history(history: list[list[list[bool]]], data: st.DataObject) -> None:
    """Append, pass over, crop and reorder in any order: the rows hold what plain lists would."""
    layer, expected, seen = SkipCacheLayer(), [[], []], 0
    for block in history:
        kind = data.draw(st.sampled_from(["append", "whole", "pass", "crop", "reorder"]))
        tokens = len(block)
        if kind == "append":
            kept = [[seen + i for i in range(tokens) if block[i][row]] for row in range(2)]
            width = max(map(len, kept))
            index = torch.tensor([row + [-1] * (width - len(row)) for row in kept], dtype=torch.long)
            fill(layer, index.view(2, width), tokens)
        elif kind == "whole":
            kept = [list(range(seen, seen + tokens))] * 2
            index = torch.tensor(kept)
            layer.update(states(index), -states(index))
        elif kind == "pass":
            kept = [[], []]
            layer.pass_over(tokens)
        if kind in ("append", "whole", "pass"):
            seen += tokens
            expected = [old + new for old, new in zip(expected, kept, strict=True)]
        elif kind == "crop":
            layer.crop(-tokens)
            seen = max(0, seen - tokens)
            expected = [[i for i in row if i < seen] for row in expected]
        else:
            layer.reorder_cache(torch.tensor([1, 0]))
            expected = expected[::-1]
        assert layer.get_seq_length() == layer.seen == seen
        assert held(layer, 2) == expected
    layer.reset()
    assert layer.get_seq_length() == 0
    assert held(layer, 2) == [[], []]


def test_rows_are_repeated_and_chosen() -> None:
    layer = SkipCacheLayer()
    fill(layer, torch.tensor([[0, 2], [1, -1]]), 3)
    layer.threshold = torch.tensor([0.5, 1.5])
    layer.batch_repeat_interleave(2)
    assert held(layer, 4) == [[0, 2], [0, 2], [1], [1]]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert held(layer, 2) == [[1], [0, 2]]
    assert layer.threshold.tolist() == [1.5, 0.5]
    layer.reset()
    assert layer.threshold is None
    # A layer all rows of which are alike keeps one row of index.
    layer = SkipCacheLayer()
    layer.pass_over(2)
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    assert held(layer, 1) == [[]]
    index = torch.tensor([[2], [2]])
    layer.append(states(index), -states(index), None, 1)
    assert held(layer, 2) == [[2], [2]]


def test_crop_frees_memory() -> None:
    layer = SkipCacheLayer()
    fill(layer, torch.tensor([[0, 1, 2, 3], [1, 3, -1, -1]]), 4)
    layer.crop(-2)
    assert layer.keys.shape[-2] == 2
    assert held(layer, 2) == [[0, 1], [1]]
    layer.crop(0)
    assert held(layer, 2) == [[0, 1], [1]]
    layer.crop(-5)
    assert layer.keys.shape[-2] == layer.seen == 0


def test_crop_to_a_length() -> None:
    with pytest.raises(ValueError, match="`tokens_to_remove`: got 3, expected zero or a negative number"):
        SkipCacheLayer().crop(3)


def test_taking_over_a_dynamic_cache() -> None:
    dynamic = DynamicCache()
    keys, values = torch.randn(2, 1, 1, 3, 2)
    dynamic.update(keys, values, 0)
    cache = take_over(dynamic, 2)
    assert torch.equal(cache.layers[0].keys, keys)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 0]
    assert take_over(DynamicCache(), 2).get_seq_length() == 0


def test_caches_that_cannot_be_taken_over() -> None:
    from tiny_models import build

    config = build("llava").config.get_text_config()
    message = (
        r"`past_key_values`: got {}, a gated model takes `SkipCache` or `DynamicCache`. "
        r"Leave `cache_implementation` unset, or run the dense model: `with running\(mode='dense'\)`."
    )
    with pytest.raises(UnsupportedModelError, match=message.format("StaticCache")):
        take_over(StaticCache(config, max_cache_len=8), 4)
    offloaded = DynamicCache()
    offloaded.offloading = True
    with pytest.raises(UnsupportedModelError, match=message.format("DynamicCache")):
        take_over(offloaded, 4)
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(sliding_window=3))
    sliding.update(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2), 0)
    with pytest.raises(
        UnsupportedModelError, match=r"a sliding window has already dropped tokens.*Start from an empty cache"
    ):
        take_over(sliding, 1)


@torch.no_grad()
def test_decoding_steps_do_not_copy_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.router.room.WORTH_A_ROOM", 0)
    layer = SkipCacheLayer()
    whole = torch.randn(2, 3, 10 + 2 * SPARE, 4)
    layer.append(whole[:, :, :10], whole[:, :, :10], None, 10)
    places = set()
    for slot in range(10, 10 + 2 * SPARE):
        new = whole[:, :, slot : slot + 1]
        keys, values = layer.append(new, 2 * new, None, 1)
        places.add(keys.data_ptr())
        assert torch.equal(keys, whole[:, :, : slot + 1])
        assert torch.equal(values[:, :, 10:], 2 * whole[:, :, 10 : slot + 1])
    assert len(places) <= 3  # room is made twice


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "deepcopy"])
def test_room_is_not_shared_by_mistake(change: str) -> None:
    layer = SkipCacheLayer()
    start = torch.randn(2, 1, 5, 4)
    layer.append(start, start, None, 5)
    one = torch.randn(2, 1, 1, 4)
    layer.append(one, one, None, 1)
    held, _ = layer.append(one + 1, one + 1, None, 1)
    before = held.clone()
    expected = held.clone()
    if change == "crop":
        layer.crop(-2)
        expected = expected[:, :, :5]
    elif change == "reorder":
        layer.reorder_cache(torch.tensor([1, 0]))
        expected = expected[[1, 0]]
    elif change == "repeat":
        layer.batch_repeat_interleave(2)
        expected = expected.repeat_interleave(2, dim=0)
    elif change == "select":
        layer.batch_select_indices(torch.tensor([1]))
        expected = expected[1:]
    else:
        layer = copy.deepcopy(layer)
    new = torch.randn(len(expected), 1, 1, 4)
    keys, _ = layer.append(new, new, None, 1)
    assert torch.equal(keys, torch.cat([expected, new], dim=2))
    if change != "crop":
        assert torch.equal(held, before)


def test_growing_under_gradient() -> None:
    layer = SkipCacheLayer()
    first, second = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(2))
    layer.append(first, first, None, 2)
    keys, _ = layer.append(second, second, None, 2)
    keys.sum().backward()
    assert (first.grad == 1).all() and (second.grad == 1).all()  # type: ignore[union-attr] # noqa: PT018


@pytest.mark.parametrize("order", ["original first", "copy first"])
def test_copies_share_memory_until_one_goes_on(order: str) -> None:
    """As those of plain layers, whose tensors are new ones at each step."""
    layer = SkipCacheLayer()
    with torch.no_grad():
        for tokens in (5, 1):
            start = torch.randn(1, 1, tokens, 4)
            layer.append(start, start, None, tokens)
        twin = copy.copy(layer)
        held, one, other = layer.keys.clone(), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
        for which, new in ((layer, one), (twin, other)) if order == "original first" else ((twin, other), (layer, one)):
            which.append(new, new, None, 1)
    assert torch.equal(layer.keys, torch.cat([held, one], dim=2))
    assert torch.equal(twin.keys, torch.cat([held, other], dim=2))
    assert torch.equal(twin.values, twin.keys)


def test_what_a_backward_pass_will_read_is_not_written_over() -> None:
    layer, weight = SkipCacheLayer(), torch.ones(1, 1, 1, 4, requires_grad=True)
    for _ in range(4):  # frozen keys, read by a product that has a gradient
        new = torch.randn(1, 1, 1, 4)
        keys, _ = layer.append(new, new, None, 1)
        total = (keys * weight).sum()
    total.backward()
    assert torch.equal(weight.grad, layer.keys.sum(2, keepdim=True))
    layer.reset()
    assert (layer.seen, layer.learned) == (0, False)


def test_the_object_that_is_taken_over_stays_its_owners() -> None:
    mine = DynamicCache()
    taken = take_over(mine, 3)
    assert taken is mine
    assert isinstance(mine, SkipCache)
    assert take_over(mine, 3) is mine
    fork = copy.deepcopy(mine)
    keys = torch.randn(1, 1, 2, 4)
    mine.update(keys, keys, 0)
    assert (mine.get_seq_length(), fork.get_seq_length()) == (2, 0)
    for other in (EncoderDecoderCache(DynamicCache(), DynamicCache()), ((keys, keys),), None):
        with pytest.raises(
            UnsupportedModelError, match=rf"got {type(other).__name__}, a gated model takes `SkipCache`"
        ):
            take_over(other, 3)


@torch.no_grad()
@pytest.mark.parametrize("room", [0, 2**16])
def test_what_is_undone_leaves_nothing_and_copies_nothing(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.router.room.WORTH_A_ROOM", room)
    cache, whole, wrong = SkipCache(2), torch.randn(1, 2, 20, 4), torch.randn(1, 2, 20, 4)
    for layer in range(2):
        cache.update(whole[:, :, :5], whole[:, :, :5], layer)
        cache.update(whole[:, :, 5:8], whole[:, :, 5:8], layer)
    places = {layer.keys.data_ptr() for layer in cache.layers}
    for _ in range(3):
        with cache.undone():
            cache.layers[0].append(wrong[:, :, :1], wrong[:, :, :1], torch.tensor([[8]]), 2)  # of two tokens, the first
            cache.layers[1].pass_over(2)
            cache.update(wrong[:, :, 1:2], wrong[:, :, 1:2], 1)
            assert [layer.partial for layer in cache.layers] == [True, True]
        for layer in cache.layers:
            assert (layer.seen, layer.partial, layer.gaps) == (8, False, False)
            assert torch.equal(layer.keys, whole[:, :, :8])
    for layer in range(2):
        cache.update(whole[:, :, 8:12], whole[:, :, 8:12], layer)
    cache.crop(-2)
    for layer in range(2):
        keys, _ = cache.update(whole[:, :, 10:], whole[:, :, 10:], layer)
        assert torch.equal(keys, whole)
        assert (keys.data_ptr() in places) == (room == 0)
    with suppress(KeyError), cache.undone():
        cache.layers[0].pass_over(1)
        raise KeyError
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_a_crop_in_place_leaves_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.router.room.WORTH_A_ROOM", 0)
    layer, start, one = SkipCacheLayer(), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 1, 4)
    layer.append(start[:, :, :5], start[:, :, :5], None, 5)
    layer.append(start[:, :, 5:], start[:, :, 5:], None, 1)
    twin = copy.copy(layer)
    layer.crop(-2)
    layer.append(one, one, None, 1)
    assert torch.equal(twin.keys, start)
    assert torch.equal(layer.keys, torch.cat([start[:, :, :4], one], dim=2))
