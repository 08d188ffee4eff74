"""FastV and PyramidDrop: who is attended to, that who has left stays away, and that answers choose nothing."""

from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router import SkipItError, Trace, attach, gated_layers, running
from skipit.theory.cost import CostModel, share_of
from studies.answers import always, answers
from studies.peers.attended import BY_PROMPT, Attended, fastv, pyramid_drop, watch_attention
from studies.peers.choices import with_gate_cost

L = tiny_models.LAYERS
FAMILIES = ("llava", "qwen2.5-vl")
POLICIES = {"fastv": fastv(0.5), "pyramid-drop": pyramid_drop(0.7, L)}


def watched(family: str, attention: str = "sdpa") -> Any:
    model = tiny_models.build(family, attention=attention)
    attach(model)
    watch_attention(model, range(L))
    return model


def run_of(model: Any, batch: dict[str, Tensor], policy: Attended, mode: str = "gathered") -> Tensor:
    trace = Trace()
    with torch.no_grad(), running(trace=trace, policy=policy, kv="evict", mode=mode):
        model(**batch, use_cache=False)
    return trace.steps[0].run


def test_stages_are_those_of_the_authors() -> None:
    assert fastv(0.3).stages == ((1, 0.3),)
    assert pyramid_drop(0.5, 32).stages == ((7, 0.5), (15, 0.25), (23, 0.125))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", POLICIES)
def test_what_stays_is_what_transformers_says_the_last_token_attends_to(family: str, name: str) -> None:
    row: list[int | str] = [5, "image", 6, 7, 8]
    model, batch = watched(family, "eager"), tiny_models.inputs(family, [row])
    policy = POLICIES[name]
    with torch.no_grad(), running(policy=policy, kv="evict", mode="masked", trace=(trace := Trace())):
        attentions = model(**batch, use_cache=False, output_attentions=True).attentions
    run, vision = run_of(model, batch, policy)[:, 0], trace.steps[0].modality[0] == 1
    assert run[:, ~vision].all()
    left = vision
    for watched_layer, keep in policy.stages:
        mass = attentions[watched_layer][0, :, -1].mean(0)
        count = int(keep * int(vision.sum()) + 1e-6)
        left = torch.zeros_like(left).index_fill(0, mass.masked_fill(~left, -1).topk(count).indices, True)
        assert torch.equal(run[watched_layer + 1] & vision, left)
    assert 0 < left.sum() < vision.sum()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_alone_and_masked_is_gathered(side: str, name: str) -> None:
    model, policy = watched("llava"), POLICIES[name]
    batch = tiny_models.inputs("llava", tiny_models.ROWS, padding=side)
    together = run_of(model, batch, policy)
    assert not together[-1].equal(together[0])
    assert torch.equal(run_of(model, batch, policy, "masked"), together)
    for index, row in enumerate(tiny_models.ROWS):
        single = tiny_models.inputs("llava", [row])
        alone = run_of(model, single, policy)[:, 0][:, single["attention_mask"][0].bool()]
        assert torch.equal(together[:, index][:, batch["attention_mask"][index].bool()], alone)


def test_generation_is_the_same_masked_and_interleaved_calls_do_not_mix() -> None:
    model = watched("llava")
    first = tiny_models.inputs("llava", tiny_models.ROWS[:1])
    options = {"policy": fastv(0.4), "kv": "evict", **BY_PROMPT}
    with running(**options, mode="gathered"):
        want = model.generate(**first, max_new_tokens=4, do_sample=False)
        tiny_models.logits(model, tiny_models.inputs("llava", tiny_models.ROWS[1:]))
        assert torch.equal(model.generate(**first, max_new_tokens=4, do_sample=False), want)
    with running(**options, mode="masked"):
        assert torch.equal(model.generate(**first, max_new_tokens=4, do_sample=False), want)


@pytest.mark.parametrize("name", POLICIES)
def test_answers_that_are_part_of_the_input_choose_nothing(name: str) -> None:
    model, options = watched("llava"), {"policy": POLICIES[name], "kv": "evict", **BY_PROMPT}
    batch = tiny_models.labelled("llava")
    other = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 3)}
    first, second = (answers(model, [each], always(options)).steps[0].run for each in (batch, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_planned_is_what_is_spent_and_random_tokens_spend_as_much(name: str) -> None:
    model, batch = watched("llava"), tiny_models.labelled("llava", tiny_models.ROWS[:2])
    costs = with_gate_cost(CostModel.of(model), 0.0)
    (step,) = answers(model, [batch], always({})).steps
    make = fastv if name == "fastv" else partial(pyramid_drop, layers=L)
    for keep in (0.0, 0.5, 1.0):
        found = [
            answers(model, [batch], always({"policy": make(keep, seed=seed), "kv": "evict", **BY_PROMPT}))
            for seed in (None, 1, 2, 3, 4)
        ]
        for each in found:
            assert share_of([make(keep).planned(step)], costs) == pytest.approx(each.share(costs), rel=1e-12)
        if keep == 0.5:
            assert len({str(each.steps[0].run.tolist()) for each in found}) > 2  # of few tokens two draws may be alike


def test_it_says_when_nobody_watches() -> None:
    model, batch = tiny_models.build("llava"), tiny_models.inputs("llava", tiny_models.ROWS)
    attach(model)
    with pytest.raises(SkipItError, match=r"nobody watched layer 1.*watch_attention\(model, \[1\]\)"):
        run_of(model, batch, fastv(0.5))
    assert len(gated_layers(model)) == L
