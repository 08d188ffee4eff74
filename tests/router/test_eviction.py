"""Attention with weights on keys has the values of a mask, and derivatives that say what one key is worth."""

from typing import Any

import pytest
import torch
from families import LAYERS, ROWS, WIDTH, build, inputs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skipit.router import RouterConfig, attach, eviction, gated_layers, running, set_gates
from skipit.router.eviction import weighted_attention


def tensors(seed: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
    return query, key, value


def hidden_by_mask(query: Tensor, key: Tensor, value: Tensor, there: Tensor) -> Tensor:
    """Attention [batch, queries, heads, head_dim] with a mask that hides keys from all but their own token."""
    tokens = query.shape[2]
    own = torch.eye(tokens, dtype=torch.bool)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (there[:, None, None, :] | own)
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("additive", [False, True, None])
def test_values_are_those_of_the_mask(seed: int, additive: bool | None) -> None:
    query, key, value = tensors(seed)
    there = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) > 0.5
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask = {False: causal, True: torch.zeros(1, 1, 6, 6).masked_fill(~causal, torch.finfo().min), None: None}[additive]
    got = weighted_attention(query, key, value, mask, there.float(), None)
    torch.testing.assert_close(got, hidden_by_mask(query, key, value, there))


def test_a_key_that_would_take_everything_does_no_harm_while_it_is_hidden() -> None:
    query, key, value = tensors(0)
    key[:, :, 1] = 100 * query[:, :2, 5]  # a score far above all others
    there = torch.ones(2, 6)
    there[:, 1] = 0
    weight = there.clone().requires_grad_()
    got = weighted_attention(query, key, value, None, weight, None)
    torch.testing.assert_close(got, hidden_by_mask(query, key, value, there.bool()))
    got.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("additive", [False, True])
def test_other_derivatives_are_those_of_the_mask(additive: bool) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors(2))
    there = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]]).bool()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    if additive:
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo().min)
    wanted, loss = torch.randn(2, 6, 4, 8), lambda output: (output * wanted).sum()
    got = torch.autograd.grad(
        loss(weighted_attention(query, key, value, mask, there.float(), None)), (query, key, value)
    )
    plain = torch.autograd.grad(loss(hidden_by_mask(query, key, value, there)), (query, key, value))
    for ours, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_heads_and_queries_may_be_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as a limit of memory allows, of keys those that they see, and with the same result."""
    wanted, found, sizes = torch.randn(2, 6, 4, 8), [], []
    derivatives = eviction._derivatives

    def watched(query: Tensor, output: Tensor, gradient: Tensor, key: Tensor, *rest: Any) -> Any:
        sizes.append((query.shape[1], query.shape[2], key.shape[2]))
        return derivatives(query, output, gradient, key, *rest)

    monkeypatch.setattr(eviction, "_derivatives", watched)
    for at_once in (2**21, 3 * 2 * 6 * 6, 4 * 2 * 6, 1):
        monkeypatch.setitem(eviction.AT_ONCE, "cpu", at_once)
        given = [tensor.requires_grad_() for tensor in (*tensors(3), torch.tensor([[1.0, 0, 1, 1, 0, 1]] * 2))]
        loss = (weighted_attention(*given[:3], None, given[3], None) * wanted).sum()
        found.append(torch.autograd.grad(loss, given))
    some_queries = [(1, 4, 4)] * 4 + [(1, 2, 6)] * 4
    one_by_one = [(1, 1, seen) for seen in range(1, 7) for _ in range(4)]
    assert sizes == [(4, 6, 6), (3, 6, 6), (1, 6, 6), *some_queries, *one_by_one]
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert all(gradient.any() for gradient in found[0])


def test_a_query_that_sees_nothing() -> None:
    """Padding, in some families."""
    query, key, value = (tensor.requires_grad_() for tensor in tensors(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 0, :] = mask[..., 0] = False
    weight = torch.tensor([[1.0, 0, 1, 1, 0, 1]] * 2).requires_grad_()
    output = weighted_attention(query, key, value, mask, weight, None)
    assert not output[:, 0].any()
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("token", [0, 2, 3])
def test_the_derivative_at_a_hidden_key_is_what_showing_it_changes(token: int) -> None:
    query, key, value = tensors(1)
    there = torch.ones(2, 6)
    there[:, [1, token]] = 0
    more = there.clone()
    more[:, token] = 1
    change = hidden_by_mask(query, key, value, more.bool()) - hidden_by_mask(query, key, value, there.bool())
    weight = there.clone().requires_grad_()
    got = weighted_attention(query, key, value, None, weight, None)
    for batch, place, head in ((0, 5, 0), (1, 4, 3), (0, token, 1)):
        (slope,) = torch.autograd.grad(got[batch, place, head, 2], weight, retain_graph=True)
        torch.testing.assert_close(slope[batch, token], change[batch, place, head, 2], rtol=1e-4, atol=1e-6)
        assert not slope[1 - batch].any()


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_training_has_the_values_of_execution_without_gradient(family: str) -> None:
    model, batch = build(family), inputs(family, ROWS, "right")
    attach(model, RouterConfig(kv="evict"))
    generator = torch.Generator().manual_seed(3)
    set_gates(model, torch.randn(LAYERS, 2, WIDTH, generator=generator), torch.zeros(LAYERS, 2))
    real = batch["attention_mask"].bool()
    with running(mode="masked"):
        learning = model(**batch, use_cache=False).logits[real]
        with torch.no_grad():
            plain = model(**batch, use_cache=False).logits[real]
    assert (learning - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_gate_learns_what_others_lose() -> None:
    """The last token's logits depend on the last layer's gate of every token before, which a mask does not show."""
    model, batch = build("llava"), inputs("llava", [[5, 6, 7, 8]])
    attach(model, RouterConfig(kv="evict"))
    bias = torch.full((LAYERS, 2), 4.0)
    bias[-1] = -1.0  # all skip the last layer ...
    weight = torch.zeros(LAYERS, 2, WIDTH)
    set_gates(model, weight, bias)
    gate = gated_layers(model)[-1].layer_gate
    seen: list[Tensor] = []
    gate.register_forward_hook(lambda m, a, out: seen.append(out) or out.retain_grad())  # type: ignore[func-returns-value]
    with running(mode="masked"):
        model(**batch, use_cache=False).logits[0, -1, 3].backward()
    assert seen[0].grad is not None
    assert (seen[0].grad[0, -1] != 0).all()
    assert not seen[0].grad[0, :-1].any()  # ... so nobody sees anybody there, and only its own gate matters
    set_gates(model, weight, torch.full((LAYERS, 2), 4.0))
    seen.clear()
    with running(mode="masked"):
        model(**batch, use_cache=False).logits[0, -1, 3].backward()
    assert (seen[0].grad[0] != 0).all()
