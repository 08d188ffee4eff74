"""Packing and unpacking lose nothing, and a query sees the keys it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build
from torch import Tensor

from skipit.router import UnsupportedModelError, attach
from skipit.router.attention import packed_implementation, visible_keys
from skipit.router.layout import Layout

examples = settings(max_examples=60, deadline=None)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    batch, seq = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=batch * seq, max_size=batch * seq))).view(batch, seq)


@given(masks())
@examples
def test_layout_round_trip(chosen: Tensor) -> None:
    batch, seq = chosen.shape
    layout = Layout.of(chosen, past=10)
    tokens = torch.randn(batch, seq, 3)
    packed = layout.pack(tokens)
    assert torch.equal(packed[0], tokens[chosen])
    assert layout.width == int(chosen.sum(1).max())

    heads = torch.randn(1, 2, len(layout.places), 5)
    rows = layout.to_rows(heads)
    assert rows.shape == (batch, 2, layout.width, 5)
    for row in range(batch):
        count = int(chosen[row].sum())
        assert torch.equal(rows[row, :, :count], heads[0, :, layout.places // seq == row])
        assert not rows[row, :, count:].any()
    assert torch.equal(layout.from_rows(rows.transpose(1, 2)), heads.transpose(1, 2))

    index = layout.index
    assert index.shape == (batch, layout.width)
    for row in range(batch):
        expected = (chosen[row].nonzero()[:, 0] + 10).tolist()
        assert index[row].tolist() == expected + [-1] * (layout.width - len(expected))


@given(masks())
@examples
def test_positions_are_gathered_never_renumbered(chosen: Tensor) -> None:
    layout = Layout.of(chosen)
    batch, seq = chosen.shape
    shared = torch.arange(seq).float()[None, :, None].expand(1, seq, 2)  # one row of positions for all
    assert torch.equal(layout.pack(shared)[0, :, 0].long(), chosen.nonzero()[:, 1])
    rope = torch.randn(3, batch, seq, 2)  # M-RoPE: time, height and width
    assert torch.equal(layout.pack(rope)[:, 0], rope[:, chosen])


@given(st.data())
@examples
def test_visible_keys(data: st.DataObject) -> None:
    """Against one comparison per query and key."""
    batch, past, seq = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    total = past + seq

    def draw(rows: int, low: int, high: int) -> Tensor:
        size = data.draw(st.integers(1, 5))
        values = data.draw(st.lists(st.integers(low, high - 1), min_size=rows * size, max_size=rows * size))
        return torch.tensor(values).view(rows, size)

    query = draw(batch, past, total)
    key = draw(batch, -1, total)
    alive = draw(batch, 0, 2)[:, :1].expand_as(key).bool() if data.draw(st.booleans()) else None
    kind = data.draw(st.sampled_from(["causal", "bool", "additive", "shared"]))
    full = None
    if kind != "causal":
        rows = 1 if kind == "shared" else batch
        full = torch.rand(rows, 1, seq, total) < 0.6
        if kind == "additive":
            full = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    mask = visible_keys(full, query, key, past, alive)
    assert mask.shape == (batch, 1, query.shape[1], key.shape[1])
    if full is not None:
        assert mask.dtype == full.dtype
    for b in range(batch):
        for i, q in enumerate(query[b].tolist()):
            for j, k in enumerate(key[b].tolist()):
                expected = k >= 0 and (alive is None or bool(alive[b, j]) or k == q)
                if full is None:
                    expected = expected and k <= q
                else:
                    value = full[b % len(full), 0, q - past, max(k, 0)]
                    expected = expected and bool(value if full.dtype == torch.bool else value == 0)
                got = mask[b, 0, i, j]
                assert bool(got if mask.dtype == torch.bool else got == 0) is expected


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"attention mask: got 2 dimensions, expected 4. Load the model with attn"
    ):
        visible_keys(torch.ones(1, 3), torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), 0)


def test_an_implementation_that_is_not_wrapped() -> None:
    message = (
        "attention implementation: got 'flex_attention', gated execution supports sdpa, eager. Load the model with"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        packed_implementation("flex_attention")
    model = build("llava")
    model.config.text_config._attn_implementation_internal = "flex_attention"
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        attach(model)
    assert {name: type(module) for name, module in model.named_modules()} == before  # nothing half-attached


def test_linear_attention() -> None:
    model = build("llava")
    model.config.text_config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(
        UnsupportedModelError,
        match="has linear-attention layers; a token can be left out of attention that is full, sliding, chunked, cross",
    ):
        attach(model)


def test_an_encoder_decoder() -> None:
    model = build("llava")
    model.config.is_encoder_decoder = True
    with pytest.raises(
        UnsupportedModelError, match="`LlavaForConditionalGeneration` is an encoder-decoder: images are"
    ):
        attach(model)
