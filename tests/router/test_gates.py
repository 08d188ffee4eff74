"""Gates score in fp32, by modality, whatever the scale and type of the states."""

import pytest
import torch
from tiny_models import build, inputs

from skipit.router import FixedUnits, Gated, Trace, attach, gated_layers, running, set_gates
from skipit.router.gates import TokenGate, normalize


def random_gate(dim: int = 8) -> TokenGate:
    gate = TokenGate(dim, 0)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    return gate


def test_formula() -> None:
    gate = random_gate()
    x, modality = torch.randn(2, 5, 8), torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    scores = gate(x, modality)
    for row in range(2):
        for token in range(5):
            m, state = modality[row, token], x[row, token]
            expected = gate.weight[m] @ (state / state.square().mean().sqrt()) + gate.bias[m]
            torch.testing.assert_close(scores[row, token], expected)


def test_a_new_gate_is_open() -> None:
    assert (TokenGate(4, 0)(torch.randn(1, 3, 4), torch.tensor([[0, 1, 0]])) == TokenGate.OPEN).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_fp32(dtype: torch.dtype) -> None:
    gate, x, modality = random_gate().to(dtype), torch.randn(2, 5, 8).to(dtype), torch.zeros(2, 5, dtype=torch.long)
    scores = gate(x, modality)
    assert scores.dtype == torch.float32
    exact = (normalize(x) @ gate.weight.float().T + gate.bias.float())[..., 0]
    assert torch.equal(scores, exact)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_scale_does_not_matter(scale: float) -> None:
    gate, x, modality = random_gate(), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.long)
    torch.testing.assert_close(gate(x * scale, modality), gate(x, modality), atol=1e-3, rtol=0)


def test_a_zero_state_is_no_nan() -> None:
    assert torch.isfinite(random_gate()(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.long))).all()


def test_gates_of_a_bf16_model_stay_fp32() -> None:
    model = build("llava").to(torch.bfloat16)
    attach(model)
    gates = [layer.layer_gate for layer in gated_layers(model)]
    assert all(p.dtype == torch.float32 for gate in gates for p in gate.parameters())
    set_gates(model, torch.randn(4, 2, 32), torch.zeros(4, 2))
    batch = inputs("llava", [[5, "image", 6, 7], [8, 9]])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    traces = Trace(), Trace()
    for trace, mode in zip(traces, ("masked", "gathered"), strict=True):
        with running(trace=trace, mode=mode), torch.no_grad():
            assert model(**batch).logits.dtype == torch.bfloat16
        assert trace.steps[0].probability.dtype == torch.float32
    assert 0 < traces[0].steps[0].run.sum() < 4 * batch["attention_mask"].sum()


def test_threshold_is_strict() -> None:
    gate = TokenGate(4, 0)
    x, modality = torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long)
    call = type(
        "Call", (), {"modality": modality, "granularity": "token", "step": object(), "held": None, "capacity": None}
    )()
    assert Gated(TokenGate.OPEN - 1e-3).decide(range(1), x, call, [gate]).run.all()
    decision = Gated(TokenGate.OPEN).decide(range(1), x, call, [gate])
    assert not decision.run.any()
    assert (decision.probability == 0.5).all()


def test_fixed_units() -> None:
    run = torch.tensor([[True, False], [False, True]])
    modality = torch.tensor([[0, 1, 1, 0]])
    call = type("Call", (), {"modality": modality})()
    for layer, expected in enumerate(([True, False, False, True], [False, True, True, False])):
        decision = FixedUnits(run).decide(range(layer, layer + 1), torch.randn(1, 4, 2), call, [])
        assert decision.run.tolist() == [[expected]]
        assert decision.probability is None


def test_scores_are_fp32_under_autocast() -> None:
    gate = TokenGate(32, 0)
    torch.nn.init.normal_(gate.weight)
    hidden, modality = torch.randn(2, 5, 32), torch.randint(2, (2, 5))
    wanted = gate(hidden, modality)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(hidden, modality), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        scores = gate.to(dtype)(hidden.to(dtype), modality)
        assert scores.dtype == torch.float32
