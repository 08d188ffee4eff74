"""Peers' statistics, orders and budgets."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router import attach
from skipit.theory.cost import CostModel
from studies.answers import answers, right
from studies.peers.choices import (
    OutOfReachError,
    Static,
    at_budget,
    executed,
    in_order,
    pmod_keep,
    static_choices,
    with_gate_cost,
)
from studies.peers.similarities import Similarities, similarities

L = tiny_models.LAYERS


def batch_of(rows: list[list[int | str]], side: str = "right") -> dict[str, Tensor]:
    batch = tiny_models.inputs("llava", rows, padding=side)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"]):
        ends = mask.nonzero()[-2:, 0]
        labels[row, ends] = batch["input_ids"][row, ends]
    return {**batch, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = tiny_models.build("llava")
    attach(model)
    return model


class TestStatistics:
    def test_padding_does_not_count(self, model: Any) -> None:
        alone = [batch_of([row]) for row in tiny_models.ROWS]
        want = similarities(model, alone)
        for side in ("left", "right"):
            found = similarities(model, [batch_of(tiny_models.ROWS, side)])
            for name, value in vars(want).items():
                torch.testing.assert_close(getattr(found, name), value, atol=1e-6, rtol=1e-4)

    def test_the_last_state_is_the_one_before_the_final_norm(self, model: Any) -> None:
        batch = batch_of(tiny_models.ROWS[:1])
        states: list[Tensor] = []
        layer = model.model.language_model.layers[-1]
        handle = layer.register_forward_hook(lambda module, args, output: states.extend([args[0], output]))
        before = similarities(model, [batch])
        handle.remove()
        x, y = states
        want = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert float(before.influence[-1]) == pytest.approx(float(want), rel=1e-4)
        final = model.model.language_model.norm
        with torch.no_grad():
            final.weight.mul_(torch.linspace(-3, 3, len(final.weight)))
            after = similarities(model, [batch])
            final.weight.div_(torch.linspace(-3, 3, len(final.weight)))
        assert torch.equal(after.influence, before.influence)

    def test_parts_are_compared_with_what_enters_them(self, model: Any) -> None:
        batch = batch_of(tiny_models.ROWS[:1])
        layer = model.model.language_model.layers[1]
        seen: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output)),
            layer.post_attention_layernorm.register_forward_hook(
                lambda module, args, output: seen.update(middle=args[0])
            ),
        ]
        found = similarities(model, [batch])
        for handle in handles:
            handle.remove()
        cosine = torch.nn.functional.cosine_similarity
        assert float(found.attention[1]) == pytest.approx(float(cosine(seen["x"], seen["middle"], dim=-1).mean()))
        assert float(found.mlp[1]) == pytest.approx(float(cosine(seen["middle"], seen["y"], dim=-1).mean()))

    def test_angles_are_of_the_last_prompt_token_and_in_half_turns(self, model: Any) -> None:
        found = similarities(model, [batch_of(tiny_models.ROWS)])
        assert found.angles.shape == (L + 1, L + 1)
        assert torch.equal(found.angles, found.angles.triu(1))
        assert 0 < found.angles.max() <= 1
        other = batch_of(tiny_models.ROWS)
        other["input_ids"] = torch.where(other["labels"] == -100, other["input_ids"], 3)  # other answers
        torch.testing.assert_close(similarities(model, [other]).angles, found.angles)


class TestChoices:
    FOUND = Similarities(
        torch.tensor([0.5, 0.1, 0.2, 0.4]).double(),
        torch.tensor([0.1, 0.4, 0.3, 0.2]).double(),
        torch.tensor([0.1, 0.9, 0.5, 0.6]).double(),
        torch.tensor([0.9, 0.1, 0.5, 0.6]).double(),
        torch.tensor(
            [[0, 0.3, 0.5, 0.9, 1], [0, 0, 0.4, 0.6, 0.8], [0, 0, 0, 0.1, 0.2], [0, 0, 0, 0, 0.3], [0, 0, 0, 0, 0]]
        ).double(),
    )
    LC = torch.tensor([[0, 0.1], [0, 0.01], [0, 0.4], [0, 0.2]]).double()

    @pytest.mark.parametrize(
        ("name", "x", "run"),
        [
            ("bi", 0.25, [[1, 1], [0, 0], [1, 1], [1, 1]]),
            ("bi", 0.5, [[1, 1], [0, 0], [0, 0], [1, 1]]),
            ("bi", 0.375, [[1, 1], [0, 0], [0.5, 0.5], [1, 1]]),
            ("bi-vision", 0.5, [[1, 0], [1, 1], [1, 1], [1, 0]]),
            ("drop-attention", 0.25, [[1, 1], [0, 0], [1, 1], [1, 1]]),
            ("drop-mlp", 0.25, [[0, 0], [1, 1], [1, 1], [1, 1]]),
            ("shortv", 0.5, [[1, 0], [1, 0], [1, 1], [1, 1]]),
            ("vtw", 0.5, [[1, 1], [1, 1], [1, 0], [1, 0]]),
            ("angular", 0.25, [[1, 1], [1, 1], [0, 0], [1, 1]]),
            ("angular", 0.5, [[1, 1], [1, 1], [0, 0], [0, 0]]),
            ("angular", 1.0, [[0, 0]] * 4),
        ],
    )
    def test_what_peers_skip_first(self, name: str, x: float, run: list[list[float]]) -> None:
        (choice,) = static_choices(self.FOUND, self.LC, seed=0)[name]
        assert choice.rates(x).tolist() == run

    def test_nothing_is_skipped_at_zero(self) -> None:
        for choices in static_choices(self.FOUND, self.LC, seed=0).values():
            assert all((choice.rates(0.0) == 1).all() for choice in choices)

    def test_random_layers_spare_the_first_and_the_last_and_differ(self) -> None:
        draws = static_choices(self.FOUND, self.LC, seed=0)["random"]
        assert len(draws) >= 5
        for choice in draws:
            assert choice.rates(1.0).tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
        assert len({str(choice.rates(0.5).tolist()) for choice in draws}) > 1

    def test_pmod_keeps_less_with_depth_and_never_below_its_floor(self) -> None:
        keep = pmod_keep(12, 0.0)
        assert (keep.diff() <= 0).all()
        assert keep[0] == 1
        assert float(keep.min()) == pytest.approx(0.15)
        assert (pmod_keep(12, 1.0) == 1).all()


class TestBudgets:
    @pytest.mark.parametrize("kv", ["retain", "evict"])
    @pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
    def test_what_is_planned_is_what_gathered_execution_spends(self, model: Any, kv: Any, unit: Any) -> None:
        choice = Static(in_order([[(2, 0), (2, 1)], [(1, 1)], [(0, 0)]], L), kv, unit, seed=3)
        costs, batches = with_gate_cost(CostModel.of(model), 0.0), [batch_of(tiny_models.ROWS, "left")]
        steps = answers(model, batches, lambda batch: {}).steps
        for x in (0.0, 0.5, 0.8, 1.0):
            spent = answers(model, batches, lambda batch, x=x: choice.at(x)).share(costs)
            assert choice.share(x, steps, costs) == pytest.approx(spent, rel=1e-12)
        assert choice.share(0.0, steps, costs) == 1

    def test_budgets_are_met_where_they_can_be(self, model: Any) -> None:
        choice = Static(in_order([[(layer, 0), (layer, 1)] for layer in range(L)], L), "evict")
        costs = with_gate_cost(CostModel.of(model), 0.0)
        steps = answers(model, [batch_of(tiny_models.ROWS)], lambda batch: {}).steps
        for budget in (0.75, 0.5):
            x = at_budget(lambda x: choice.share(x, steps, costs), budget)
            assert choice.share(x, steps, costs) == pytest.approx(budget, abs=0.03)  # few tokens, coarse

    def test_the_nearest_point_is_taken(self) -> None:
        assert at_budget(lambda x: 1 - x, 0.3) == pytest.approx(0.7, abs=0.002)
        assert at_budget(lambda x: 1.0 if x < 0.5 else 0.4, 0.5) >= 0.5
        assert at_budget(lambda z: 0.5 - z / 80, 0.25, low=-40, high=40) == pytest.approx(20, abs=0.2)

    def test_a_method_that_cannot_says_what_it_spends_at_least(self) -> None:
        with pytest.raises(OutOfReachError, match=r"budget 0\.25: this method spends 0\.400 at least") as caught:
            at_budget(lambda x: 1 - 0.6 * x, 0.25)
        assert caught.value.floor == pytest.approx(0.4)


def test_answers_count_rows_and_do_not_look_at_prompts(model: Any) -> None:
    batches = [batch_of(tiny_models.ROWS)]
    found = answers(model, batches, lambda batch: {})
    assert found.same(found.predicted) == 1
    assert found.same(right(batches)) < 1
    assert ((found.predicted[0] == -100) == (right(batches)[0] == -100)).all()
    changed = [found.predicted[0].clone()]
    place = (changed[0][0] != -100).nonzero()[0, 0]
    changed[0][0, place] += 1
    assert found.same(changed) == pytest.approx(1 - 1 / len(tiny_models.ROWS))


def test_rates_executed_are_those_of_real_tokens(model: Any) -> None:
    table = in_order([[(1, 0), (1, 1)]], L)(1.0)
    steps = answers(model, [batch_of(tiny_models.ROWS)], lambda b: Static(lambda x: table, "retain").at(1.0)).steps
    assert executed(steps).tolist() == [1, 0, 1, 1]
