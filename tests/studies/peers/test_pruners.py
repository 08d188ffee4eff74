"""Pruners before the LLM: their formulas by hand, and that what is dropped is nowhere."""

from itertools import combinations
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor

from skipit.router import Gated, Trace, attach, running, set_gates
from skipit.theory.cost import CostModel
from studies.answers import always, answers
from studies.peers.attended import BY_PROMPT
from studies.peers.choices import with_gate_cost
from studies.peers.pruners import PRUNERS, Choose, Pruned, cdpruner, dart, pruned_share, random_pruners

L, WIDTH = tiny_models.LAYERS, tiny_models.WIDTH
EVERY: dict[str, Choose] = {**PRUNERS, "random": random_pruners(0, 1)[0]}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = tiny_models.build("llava")
    attach(model)
    generator = torch.Generator().manual_seed(5)
    set_gates(model, torch.randn(L, 2, WIDTH, generator=generator), 0.1 * torch.randn(L, 2, generator=generator))
    return model


def run_of(model: Any, batch: dict[str, Tensor], policy: Pruned, **more: Any) -> Tensor:
    trace = Trace()
    with torch.no_grad(), running(trace=trace, policy=policy, kv="evict", **more):
        model(**batch, use_cache=False)
    return trace.steps[0].run


def at(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def test_dart_keeps_pivots_and_what_duplicates_them_least() -> None:
    # Four long vision tokens are the pivots, at 0 degrees; so is the text. The least alike are at 180 and 120.
    vision = torch.cat([10 * at(0, 0, 0, 0), at(10, 120, 20, 180)])
    assert dart(vision, at(0), 4).tolist() == [0, 1, 2, 3]
    assert dart(vision, at(0), 5).tolist() == [0, 1, 2, 3, 7]
    assert dart(vision, at(0), 6).tolist() == [0, 1, 2, 3, 5, 7]
    assert dart(vision, at(0), 2).tolist() == [0, 1]  # fewer than there are pivots: the longest


def test_each_pivot_of_dart_keeps_a_share() -> None:
    # Pivots at 0 and 90 degrees, two of each: each of them, and the text at 180, takes one of what is left.
    vision = torch.cat([10 * at(0, 90), 9 * at(0, 90), at(5, 95, 175, 185, 265)])
    # 0: the one at 175 or 185 (equally far: the first). 90: 265. 0 again: 185. 90 again: 5. Text at 180: 95.
    assert dart(vision, at(180), 8).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert dart(vision, at(180), 7).tolist() == [0, 1, 2, 3, 6, 7, 8]


def test_cdpruner_is_the_greedy_maximum_of_the_determinant() -> None:
    generator = torch.Generator().manual_seed(1)
    vision, text = torch.randn(7, 6, generator=generator), torch.randn(3, 6, generator=generator)
    unit = F.normalize(vision.double(), dim=-1)
    r = (unit @ F.normalize(text.double(), dim=-1).T).mean(-1)
    r = (r - r.min() + 1e-6) / (r.max() - r.min() + 1e-6)
    kernel = r[:, None] * (unit @ unit.T) * r
    greedy: list[int] = []
    for count in range(1, 5):
        values = {
            i: float(torch.linalg.det(kernel[[*greedy, i]][:, [*greedy, i]])) for i in range(7) if i not in greedy
        }
        greedy.append(max(values, key=lambda i: values[i]))
        assert cdpruner(vision, text, count).tolist() == sorted(greedy)
    best = max(combinations(range(7), 2), key=lambda pair: float(torch.linalg.det(kernel[list(pair)][:, list(pair)])))
    assert len(set(best) & set(cdpruner(vision, text, 2).tolist())) >= 1


def test_cdpruner_keeps_one_of_twins_and_what_the_text_is_about() -> None:
    vision = at(0, 1, 90)
    assert cdpruner(vision, at(45), 2).tolist() in ([0, 2], [1, 2])
    assert cdpruner(at(0, 80, 170), at(75), 1).tolist() == [1]
    assert sorted(cdpruner(at(0, 0, 0, 0), at(0), 4).tolist()) == [0, 1, 2, 3]  # nothing is new, and as many stay


@pytest.mark.parametrize("name", EVERY)
def test_pruners_keep_as_many_as_they_are_asked(name: str) -> None:
    vision, text = torch.randn(36, 16), torch.randn(5, 16)
    for count in (1, 3, 4, 7, 18, 35, 36):
        kept = EVERY[name](vision, text, count)
        assert len(set(kept.tolist())) == count
        assert torch.equal(kept, kept.sort().values)


def test_random_tokens_differ_by_draw_and_from_what_is_chosen() -> None:
    vision, text = torch.randn(36, 16), torch.randn(5, 16)
    chosen = [choose(vision, text, 12).tolist() for choose in (*PRUNERS.values(), *random_pruners(0, 3))]
    assert len({tuple(places) for places in chosen}) == len(chosen)


@pytest.mark.parametrize("name", EVERY)
def test_who_is_dropped_skips_every_layer_and_nobody_else_does(name: str, model: Any) -> None:
    batch = tiny_models.inputs("llava", tiny_models.ROWS)
    run = run_of(model, batch, Pruned(EVERY[name], 0.5))
    vision, real = batch["input_ids"] == tiny_models.IMAGE, batch["attention_mask"].bool()
    assert (run == run[0]).all()
    assert torch.equal((run[0] & vision).sum(-1), (0.5 * vision.sum(-1) + 1e-6).long())
    assert torch.equal(run[0] & ~vision, real & ~vision)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_alone_and_masked_is_gathered(side: str, name: str, model: Any) -> None:
    batch, policy = tiny_models.inputs("llava", tiny_models.ROWS, padding=side), Pruned(EVERY[name], 0.4, Gated())
    together = run_of(model, batch, policy)
    assert torch.equal(run_of(model, batch, policy, mode="masked"), together)
    for index, row in enumerate(tiny_models.ROWS):
        single = tiny_models.inputs("llava", [row])
        alone = run_of(model, single, policy)[:, 0][:, single["attention_mask"][0].bool()]
        assert torch.equal(together[:, index][:, batch["attention_mask"][index].bool()], alone)


def test_a_dropped_token_is_as_if_it_were_not_there(model: Any) -> None:
    batch = tiny_models.inputs("llava", [[5, "image", 6, 7]])
    policy = Pruned(dart, 0.5)
    want = tiny_models.logits(model, batch, policy=policy, kv="evict")
    place = int((~run_of(model, batch, policy)[0, 0]).nonzero()[0])
    embeds = model.get_input_embeddings()

    def other(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        changed = kwargs["inputs_embeds"].clone()
        changed[0, place] = changed[0, place] * 0.5 + 0.01  # still short, and still alike
        return args, {**kwargs, "inputs_embeds": changed}

    handle = model.model.language_model.register_forward_pre_hook(other, with_kwargs=True)
    got = tiny_models.logits(model, batch, policy=policy, kv="evict")
    full = tiny_models.logits(model, batch, mode="dense")
    handle.remove()
    assert embeds is model.get_input_embeddings()
    kept = torch.ones(want.shape[1], dtype=torch.bool).index_fill(0, torch.tensor([place]), False)
    assert tiny_models.same(got[:, kept], want[:, kept])
    assert not tiny_models.same(full[:, kept], tiny_models.logits(model, batch, mode="dense")[:, kept])


def test_answers_that_are_part_of_the_input_choose_nothing_and_tokens_decide_alone(model: Any) -> None:
    batch = tiny_models.labelled("llava")
    other = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 3)}
    prompt = batch["labels"] == -100
    for choose in EVERY.values():
        options = {"policy": Pruned(choose, 0.5, Gated()), "kv": "evict", **BY_PROMPT}
        first, second = (answers(model, [each], always(options)).steps[0].run for each in (batch, other))
        assert torch.equal(first[:, prompt], second[:, prompt])
    gates = answers(model, [batch], always({"policy": Gated(), "kv": "evict"})).steps[0].run
    assert torch.equal(
        answers(model, [batch], always({**options, "policy": Pruned(choose, 1.0, Gated())})).steps[0].run, gates
    )


def test_what_is_planned_is_what_is_spent(model: Any) -> None:
    batch, costs = tiny_models.labelled("llava", tiny_models.ROWS[:2]), with_gate_cost(CostModel.of(model), 0.0)
    steps = answers(model, [batch], always({})).steps
    for keep in (0.0, 0.3, 0.5, 1.0):
        for choose in EVERY.values():
            spent = answers(model, [batch], always({"policy": Pruned(choose, keep), "kv": "evict", **BY_PROMPT}))
            assert pruned_share(keep, steps, costs) == pytest.approx(spent.share(costs), rel=1e-12)


def test_generation_is_the_same_masked(model: Any) -> None:
    first = tiny_models.inputs("llava", tiny_models.ROWS[:1])
    options = {"policy": Pruned(cdpruner, 0.4, Gated()), "kv": "evict", **BY_PROMPT}
    got = []
    for mode in ("gathered", "masked"):
        with running(**options, mode=mode):
            got.append(model.generate(**first, max_new_tokens=4, do_sample=False))
    assert torch.equal(*got)
