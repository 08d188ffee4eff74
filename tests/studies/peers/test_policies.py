"""Peers' policies: who runs, how many, and that nothing but a row's own past and the call itself decides."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router import FixedUnits, Trace, attach, gated_layers, running, set_gates
from studies.peers.policies import (
    FixedMask,
    SequenceRouter,
    TopVision,
    UnitRates,
    Watched,
    over_layers,
    over_rows,
    over_tokens,
    top_vision,
    uniform,
)

L = tiny_models.LAYERS
FAMILIES = ("llava", "qwen2.5-vl")


def gated(family: str, seed: int = 5) -> Any:
    model = tiny_models.build(family)
    attach(model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(L, 2, tiny_models.WIDTH, generator=generator)
    set_gates(model, weight, 0.1 * torch.randn(L, 2, generator=generator))
    return model


def run_of(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    trace = Trace()
    with torch.no_grad(), running(trace=trace, **options):
        model(**batch, use_cache=False)
    return trace.steps[0].run


def test_rates_of_zero_and_one_are_fixed_units() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    table = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)
    got = tiny_models.logits(model, batch, policy=UnitRates(table.float()), mode="gathered")
    assert torch.equal(got, tiny_models.logits(model, batch, policy=FixedUnits(table), mode="gathered"))


def test_draws_are_uniform_and_differ_by_layer_and_seed() -> None:
    place = torch.arange(20_000)
    drawn = uniform(place, 3, 0)
    assert 0 <= float(drawn.min()) < 0.001
    assert 0.999 < float(drawn.max()) < 1
    assert torch.histc(drawn.float(), 10, 0, 1).div(2000).sub(1).abs().max() < 0.1
    for other in (uniform(place, 4, 0), uniform(place, 3, 1)):
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_draw(family: str, side: str) -> None:
    model, policy = gated(family), UnitRates(torch.full((L, 2), 0.5), seed=2)
    batch = tiny_models.inputs(family, tiny_models.ROWS, padding=side)
    together = run_of(model, batch, policy=policy)
    for index, row in enumerate(tiny_models.ROWS):
        single = tiny_models.inputs(family, [row])
        alone = run_of(model, single, policy=policy)[:, 0][:, single["attention_mask"][0].bool()]
        assert torch.equal(together[:, index][:, batch["attention_mask"][index].bool()], alone)
        assert 0 < alone.double().mean() < 1


def test_permutations_keep_the_number() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    run = (torch.rand(6, 2, 8, generator=generator) < 0.5) & real
    tokens, layers = over_tokens(run, real, 1), over_layers(run, 1)
    assert torch.equal(tokens.sum(-1), run.sum(-1))
    assert torch.equal(layers.sum(0), run.sum(0))
    for shuffled in (tokens, layers):
        assert not (shuffled & ~real).any()
        assert not torch.equal(shuffled, run)
    every = real.expand_as(run)
    assert torch.equal(over_tokens(every, real, 1), every)


def test_rows_change_places_layer_by_layer() -> None:
    rows = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    real = torch.ones(5, 8, dtype=torch.bool)
    real[1, 3:] = False
    run = rows[..., None] & real
    shuffled = over_rows(run, real, 1)
    assert torch.equal(shuffled.any(-1).sum(1), rows.sum(1))
    assert torch.equal(shuffled, shuffled.any(-1)[..., None] & real)  # a row runs whole or not at all
    assert not torch.equal(shuffled, run)


def test_a_written_mask_runs_what_it_says() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    learned = run_of(model, batch)
    assert torch.equal(run_of(model, batch, policy=FixedMask(learned)), learned)
    want = tiny_models.logits(model, batch, mode="gathered")
    assert torch.equal(tiny_models.logits(model, batch, mode="gathered", policy=FixedMask(learned)), want)


def test_top_vision_keeps_text_and_the_best() -> None:
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0, 0.0], [0.0, 5.0, 5.0, 9.0, 9.0]])
    vision = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    assert top_vision(scores, vision, 0.5).int().tolist() == [[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]]
    assert top_vision(scores, vision, 0.0).int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]
    assert top_vision(scores, vision, 1.0).all()


def test_one_decision_per_row_and_no_one_elses_tokens_in_it() -> None:
    model, policy = gated("llava"), SequenceRouter(L // 2, L - 1)
    for side in ("left", "right"):
        batch = tiny_models.inputs("llava", tiny_models.ROWS, padding=side)
        real = batch["attention_mask"].bool()
        for threshold in (-0.2, 0.0, 0.2):
            run = run_of(model, batch, policy=replace(policy, threshold=threshold), unit="attention")
            of_rows = (run.sum(-1).double() / real.sum(-1))[L // 2 : L - 1]
            assert ((of_rows == 0) | (of_rows == 1)).all()
            assert run[: L // 2].sum() + run[L - 1 :].sum() == real.sum() * (L - len(of_rows))
            for index, row in enumerate(tiny_models.ROWS):
                alone = run_of(model, tiny_models.inputs("llava", [row]), policy=replace(policy, threshold=threshold))
                assert torch.equal(alone[:, 0].any(-1), run[:, index].any(-1))


def test_every_layer_may_have_a_router() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    real = batch["attention_mask"].bool()
    for threshold, wanted in ((-1e3, real.expand(L, -1, -1)), (1e3, torch.zeros(L, *real.shape, dtype=torch.bool))):
        assert torch.equal(run_of(model, batch, policy=SequenceRouter(0, L, threshold), kv="evict"), wanted)


def test_a_row_decision_holds_while_it_generates() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS[:1])
    trace = Trace()
    with running(trace=trace, policy=SequenceRouter(L // 2, L - 1), unit="attention", kv="evict"):
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(trace.steps) == 4
    for step in trace.steps[1:]:
        assert torch.equal(step.run[:, 0, 0], trace.steps[0].run[:, 0].any(-1))


def test_pmod_counts_per_layer() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    keep = torch.tensor([1.0, 0.75, 0.5, 0.25])
    trace = Trace()
    with torch.no_grad(), running(trace=trace, policy=TopVision(keep), kv="evict"):
        model(**batch, use_cache=False)
    step = trace.steps[0]
    vision = (step.modality == 1) & step.real
    assert torch.equal((step.run & vision).sum(-1), (keep[:, None] * vision.sum(-1) + 1e-6).floor().long())
    assert ((step.run | vision) == step.real).all()


def test_random_tokens_in_the_place_of_pmods_are_as_many_but_others() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    policy = TopVision(torch.tensor([1.0, 0.75, 0.5, 0.25]))
    chosen, random = (run_of(model, batch, policy=replace(policy, seed=seed), kv="evict") for seed in (None, 1))
    assert torch.equal(random.sum(-1), chosen.sum(-1))
    assert not torch.equal(random, chosen)
    assert not (random[2] <= random[1]).all()  # every layer has its own


def test_watching_changes_nothing_and_has_gradients() -> None:
    model, batch = gated("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    policy = Watched(UnitRates(torch.full((L, 2), 0.5)), [])
    want = tiny_models.logits(model, batch, policy=policy.policy)
    assert torch.equal(tiny_models.logits(model, batch, policy=policy), want)
    policy = Watched(SequenceRouter(L // 2, L - 1), [])
    with running(policy=policy, mode="masked"):
        model(**batch, use_cache=False)
    assert len(policy.seen) == L
    assert [entry.requires_grad for entry in policy.seen] == [L // 2 <= layer < L - 1 for layer in range(L)]
    policy.seen[L // 2].sum().backward()
    assert gated_layers(model)[L // 2].layer_gate.weight.grad.abs().sum() > 0
