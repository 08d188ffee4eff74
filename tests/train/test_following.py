"""The derivative of a threshold that keeps a budget spent, against the threshold found anew."""

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from shallow import shallow_reference

from skipit.router import Gated, RouterConfig, Step, Trace, attach, find_router, gated_layers, running, set_gates
from skipit.theory.cost import CostModel
from skipit.train.following import Following, _Rising

LAYERS, THRESHOLD = 3, 0.4


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Any:
    """A model with gates of all kinds of opinions, which decide at the layers that are asked for."""
    model = shallow_reference(LAYERS).train()
    attach(model, RouterConfig(decide_at=getattr(request, "param", (0,))))
    width = model.config.text_config.hidden_size
    set_gates(model, 0.1 * torch.randn(LAYERS, 2, width), torch.randn(LAYERS, 2))
    return model


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of text, one with padding."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    return {
        "input_ids": torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(1)),
        "attention_mask": mask,
    }


def ran(model: Any, policy: Gated, kv: Any) -> tuple[Any, Step]:
    trace = Trace()
    with running(policy=policy, mode="masked", kv=kv, trace=trace):
        logits = model(**inputs(), use_cache=False).logits
    return logits, trace.steps[0]


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_the_threshold_moves_as_one_that_is_found_anew(made: Any, kv: Any) -> None:
    """Expected spending stays what it was, whichever logit rises by a little."""
    costs, policy = CostModel.of(made), Following(THRESHOLD, costs=CostModel.of(made))
    _, step = ran(made, policy, kv)
    (said,), real = policy.said, step.real

    def spent(logits: torch.Tensor, threshold: float) -> float:
        executed, _ = costs.spend(torch.sigmoid(logits.double() - threshold), real, kv)
        return float(executed.sum())

    budget, moves = spent(said, THRESHOLD), policy.moves(said, real, kv)
    assert moves.sum() == pytest.approx(1)
    assert not moves[:, ~real].any()
    for place in [(0, 0, 0), (1, 0, 8), (2, 1, 3)]:
        raised = said.double().clone()
        raised[place] += 1e-3
        found = brentq(lambda threshold, raised=raised: spent(raised, threshold) - budget, -9, 9, xtol=1e-13)
        assert (found - THRESHOLD) / 1e-3 == pytest.approx(float(moves[place]), rel=1e-2)


@pytest.mark.parametrize("made", [(0,), (0, 2), None], indirect=True)
class Slower:
    """Times in which a layer that some tokens skip takes longer than one that all run, as small layers do."""

    depth = LAYERS

    def __init__(self, also: float) -> None:
        self.also = also  # of the first layer, where a token more takes more time

    def spend(self, run: torch.Tensor, real: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        spent = torch.cat([self.also * run[:1], -run[1:]]) * real
        return spent, torch.ones_like(spent)


def test_where_a_token_more_takes_less_time_no_threshold_follows_it() -> None:
    said, real = torch.randn(LAYERS, 2, 9), torch.ones(2, 9, dtype=torch.bool)
    costs: Any = Slower(also=0.0)
    assert not Following(THRESHOLD, costs=costs).moves(said, real, "retain").any()
    costs = Slower(also=1e-6)
    moves = Following(THRESHOLD, costs=costs).moves(said, real, "retain")
    assert moves.sum() == pytest.approx(1)
    assert moves[0].min() > 0
    assert not moves[1:].any()


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_gates_learn_which_tokens_run_and_not_how_many(made: Any, kv: Any) -> None:
    """What all gates have in common has no gradient; decisions and probabilities are those of `Gated`."""
    logits, step = ran(made, Following(THRESHOLD, costs=CostModel.of(made)), kv)
    plain, other = ran(made, Gated(THRESHOLD), kv)
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(step.probability, other.probability)
    logits.square().sum().backward()
    biases = torch.stack([layer.layer_gate.bias.grad for layer in gated_layers(made)])
    assert biases.abs().sum() > 0
    assert biases.sum().abs() < 1e-4 * biases.abs().sum()


def test_nothing_moves_without_gradients(made: Any) -> None:
    policy = Following(THRESHOLD, costs=CostModel.of(made))
    with torch.no_grad():
        _, step = ran(made, policy, "evict")
    assert not step.probability.requires_grad


@pytest.mark.parametrize("frozen", [(), (0,)], ids=["all learn", "the first does not"])
@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_several_points_are_as_one_that_reads_what_they_read(made: Any, kv: Any, frozen: tuple[int, ...]) -> None:
    """States that do not depend on what ran before make both derivatives the same, which one point has in closed form.

    The layers' own maps are taken out, so that the states at every point are the embeddings.
    """
    found = []
    for points in ((0,), (0, 2), None):
        model = copy.deepcopy(made)
        for layer in gated_layers(model):
            for name in ("o_proj.weight", "down_proj.weight"):
                for module in layer.modules():
                    if hasattr(module, name.split(".")[0]):
                        torch.nn.init.zeros_(module.get_parameter(name))
        model.requires_grad_(False)
        gates = [layer.layer_gate for layer in gated_layers(model)]
        for number, gate in enumerate(gates):
            gate.requires_grad_(number not in frozen)
        _, router = find_router(model)
        router.config = replace(router.config, decide_at=points)
        policy = Following(THRESHOLD, costs=CostModel.of(model))
        trace = Trace()
        with running(policy=policy, mode="masked", kv=kv, trace=trace):
            model(**inputs(), use_cache=False)
        # Any function of what ran will do.
        taste = torch.randn(LAYERS, *trace.steps[0].real.shape, generator=torch.Generator().manual_seed(2))
        (taste * trace.steps[0].probability).sum().backward()
        found.append([weight.grad for gate in gates for weight in gate.parameters() if weight.requires_grad])
    for several in found[1:]:
        torch.testing.assert_close(several, found[0])


@pytest.mark.parametrize("made", [(0,), (0, 2), None], indirect=True)
def test_nothing_of_a_step_is_kept_after_it(made: Any) -> None:
    """A graph that leads to itself is never freed: a training of hours would end for want of memory."""
    policy = Following(THRESHOLD, costs=CostModel.of(made))
    logits, _ = ran(made, policy, "evict")
    logits.square().sum().backward()
    kept = weakref.ref(policy)
    del logits, _, policy
    gc.collect()
    assert kept() is None
    assert not any(isinstance(each, _Rising) for each in gc.get_objects())


@pytest.mark.parametrize("made", [(0,), (0, 2), None], indirect=True)
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_for_their_gradients_change_none(made: Any, reentrant: bool) -> None:
    found = []
    for again in (False, True):
        model = copy.deepcopy(made).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        logits, _ = ran(model, Following(THRESHOLD, costs=CostModel.of(model)), "evict")
        logits.square().sum().backward()
        found.append(torch.stack([layer.layer_gate.bias.grad for layer in gated_layers(model)]))
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found)
