"""Matched probes find what was planted, and only that; what they read of a model is its prompt and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipit.router import InputError, attach, detach
from skipit.theory.bounds import probe_gap_bound
from skipit.theory.pooling import SITES, Pool, PooledStates, join, pool_states
from skipit.theory.probes import FEWEST, Probes, fit_probe, halves, held_out, mean_and_error, prior_loss, probe_states
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data, load_model

ROWS, DIM = 400, 16
TEXT, VISION, LAST = range(3)


def unit(x: Tensor) -> Tensor:
    """Directions of root mean square 1, as `Pool` makes them."""
    return torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def states(*boundaries: Tensor, answer: Tensor) -> PooledStates:
    """The same states at every site."""
    table = torch.stack([unit(x) for x in boundaries])[:, None].expand(-1, len(SITES), -1, -1)
    return PooledStates(table, torch.zeros(len(boundaries) - 1, len(SITES), len(answer)), answer)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, classes: int = 3, rows: int = ROWS) -> Tensor:
    return torch.arange(rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))] % classes


class TestPlanted:
    def test_a_layer_that_writes_the_class_adds_v_information(self) -> None:
        z, x = labels(0), draw(1, ROWS, DIM)
        written = x + 3 * torch.eye(DIM)[z]
        found = probe_states(states(x, written, answer=z + 5))
        assert found.gain[0, TEXT] > 0.3
        assert found.gain[0, TEXT] > 5 * found.gain_error[0, TEXT]
        assert found.accuracy_gain[0, TEXT] > 0.3
        assert found.accuracy[1, TEXT] - found.accuracy[0, TEXT] == pytest.approx(found.accuracy_gain[0, TEXT])
        torch.testing.assert_close(found.information[1] - found.information[0], found.gain[0])
        torch.testing.assert_close(found.entropy, torch.full((3,), 3.0).double().log(), atol=1e-3, rtol=0)

    def test_a_layer_that_only_rotates_or_rescales_adds_nothing(self) -> None:
        z = labels(0)
        x = draw(1, ROWS, DIM) + 3 * torch.eye(DIM)[z]
        rotation = torch.linalg.qr(draw(2, DIM, DIM)).Q
        found = probe_states(states(x, x @ rotation, 7 * x @ rotation, answer=z))
        assert found.information[0, TEXT] > 0.3
        assert found.gain.abs().max() < 1e-3
        assert found.accuracy_gain.abs().max() < 0.01

    def test_v_information_grows_by_computation_where_shannon_information_cannot(self) -> None:
        signs = draw(0, ROWS, 2).sign()
        z = (signs.prod(-1) > 0).long()
        x = torch.cat([signs, 0.3 * draw(1, ROWS, DIM - 2)], -1)
        computed = torch.cat([x[:, :-1], signs.prod(-1, keepdim=True)], -1)  # a function of x, which decides z
        found = probe_states(states(x, computed, answer=z))
        assert found.information[0, TEXT] < 0.05
        assert found.information[1, TEXT] > 0.6

    def test_a_layer_that_erases_the_class_loses_information(self) -> None:
        z, noise = labels(0), draw(1, ROWS, DIM)
        found = probe_states(states(noise + 3 * torch.eye(DIM)[z], noise, answer=z))
        assert found.gain[0, TEXT] < -5 * found.gain_error[0, TEXT]

    @pytest.mark.parametrize("seed", range(4))
    def test_labels_in_another_order_leave_nothing_to_learn(self, seed: int) -> None:
        x = draw(1, ROWS, DIM) + 3 * torch.eye(DIM)[labels(0)]
        found = probe_states(states(x, 2 * x, answer=labels(10 + seed)))
        assert found.information.max() < 0.02


class TestProbe:
    def test_the_family_holds_what_sees_nothing(self) -> None:
        """States that are all the same leave the class frequencies of the other half, whatever the penalty."""
        z = labels(0)
        second = halves(z)
        loss = held_out(torch.ones(ROWS, DIM), z, second).loss
        torch.testing.assert_close(loss, prior_loss(z, second), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("classes", [2, 3])
    @pytest.mark.parametrize("dim", [4, 100])
    def test_no_other_probe_is_better(self, classes: int, dim: int) -> None:
        z, x = labels(0, classes, 60), draw(1, 60, dim)
        probe, penalty = fit_probe(x, z, 0.1), 0.1 * (2 if classes == 2 else 1)
        best = probe.loss(x, z).mean() + probe.penalty
        torch.testing.assert_close(probe.penalty, penalty / 2 * float(probe.weight.square().sum()))
        for seed in range(20):
            other = probe._replace(weight=probe.weight + 0.05 * draw(seed, *probe.weight.shape))
            if classes == 2:
                other = other._replace(weight=(other.weight - other.weight.flip(0)) / 2)
            assert other.loss(x, z).mean() + penalty / 2 * other.weight.square().sum() >= best - 1e-6

    def test_more_penalty_makes_smaller_probes(self) -> None:
        z, x = labels(0), draw(1, ROWS, DIM)
        norms = [fit_probe(x, z, penalty).norm for penalty in (1e-3, 1e-2, 1e-1)]
        assert norms == sorted(norms, reverse=True)

    def test_the_order_of_rows_does_not_matter(self) -> None:
        z = labels(0)
        x = draw(1, ROWS, DIM) + torch.eye(DIM)[z]
        second, order = halves(z), torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
        one, other = held_out(x, z, second), held_out(x[order], z[order], second[order])
        torch.testing.assert_close(other.loss, one.loss[order], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(prior_loss(z[order], second[order]), prior_loss(z, second)[order])

    def test_the_same_again_and_another_seed_splits_otherwise(self) -> None:
        z = labels(0)
        pooled = states(draw(1, ROWS, DIM) + torch.eye(DIM)[z], draw(2, ROWS, DIM), answer=z)
        one, again, other = (probe_states(pooled, seed=seed) for seed in (0, 0, 1))
        assert one.to_json() == again.to_json()
        assert not torch.equal(one.information, other.information)
        assert (one.gain - other.gain).abs().max() < 3 * one.gain_error.max()

    def test_halves_share_every_class(self) -> None:
        z = torch.tensor([0] * 8 + [1] * 31 + [2] * 11)
        second = halves(z)
        assert all(abs(2 * int((z[second] == k).sum()) - int((z == k).sum())) <= 1 for k in range(3))

    def test_standard_error_over_rows_is_the_bootstraps(self) -> None:
        values = draw(0, 50)
        index = torch.randint(50, (20000, 50), generator=torch.Generator().manual_seed(1))
        mean, error = mean_and_error(values[None, None])
        assert float(values[index].mean(-1).std()) == pytest.approx(float(error), rel=0.03)
        assert float(values.mean()) == pytest.approx(float(mean))

    def test_standard_error_knows_how_much_splits_differ(self) -> None:
        """Two splits differ by 2, though all rows of each agree: a mean of two draws with deviation sqrt 2."""
        mean, error = mean_and_error(torch.tensor([0.0, 2.0])[:, None, None].expand(2, 1, 30))
        assert (float(mean), float(error)) == (1.0, pytest.approx(1.0))


class TestStatement4:
    @given(st.integers(0, 10**6), st.floats(1e-6, 2), st.sampled_from([1e-3, 1e-1]), st.integers(2, 4))
    @settings(max_examples=30, deadline=None)
    def test_4_fitted_probes_keep_the_bound(self, seed: int, size: float, penalty: float, classes: int) -> None:
        z, x = labels(seed, classes, 40), draw(seed, 40, DIM)
        check_bound(unit(x), unit(x + size * draw(seed + 1, 40, DIM)), z, penalty, None)

    def test_4_fitted_probes_keep_the_bound_on_measured_states(self, reference: PooledStates) -> None:
        z = torch.unique(reference.answer, return_inverse=True)[1]
        for layer, distance in list(enumerate(reference.distance))[::3]:
            for site in range(len(SITES)):
                check_bound(*reference.states[layer : layer + 2, site], z, 1e-2, distance[site])


def check_bound(x: Tensor, y: Tensor, z: Tensor, penalty: float, distance: Tensor | None) -> None:
    """One probe on both sides, on any rows; and the two best ones, each with its penalty, on the rows of the fit."""
    if distance is None:
        distance = (x - y).double().square().sum(-1) / 2 / x.shape[-1]
    probes = [fit_probe(s, z, penalty) for s in (x, y)]
    bounds = [probe_gap_bound(distance.mean(), fitted.norm) for fitted in probes]
    for fitted, bound in zip(probes, bounds, strict=True):
        assert (fitted.loss(x, z) - fitted.loss(y, z)).mean().abs() <= bound + 1e-6
    best = [fitted.loss(s, z).mean() + fitted.penalty for fitted, s in zip(probes, (x, y), strict=True)]
    assert (best[0] - best[1]).abs() <= max(bounds) + 1e-4  # the solver's tolerance


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, list[dict[str, Tensor]]]:
    model, processor = load_model("reference")
    return model, list(batches(load_data("reference", "test", 160, 0), Collator(processor), 20))


@pytest.fixture(scope="module")
def reference(loaded: tuple[Any, list[dict[str, Tensor]]]) -> PooledStates:
    return pool_states(*loaded)


@pytest.fixture(scope="module")
def few(reference: PooledStates) -> PooledStates:
    """As if every fourth boundary were one of three layers, which is faster."""
    return replace(reference, states=reference.states[::4], distance=reference.distance[::4])


class TestPooling:
    def test_shapes_and_norms(self, reference: PooledStates, loaded: Any) -> None:
        layers, dim = loaded[0].config.text_config.num_hidden_layers, loaded[0].config.text_config.hidden_size
        assert reference.states.shape == (layers + 1, len(SITES), 160, dim)
        rms = reference.states.square().mean(-1).sqrt()
        assert rms.max() <= 1 + 1e-5, "a mean of directions is never longer than they are"
        torch.testing.assert_close(rms[:, LAST], torch.ones_like(rms[:, LAST]))

    def test_the_answer_is_the_first_token_of_the_completion(self, reference: PooledStates, loaded: Any) -> None:
        batch = loaded[1][0]
        first = [next(int(t) for t in row if t != -100) for row in batch["labels"]]
        assert reference.answer[: len(first)].tolist() == first

    def test_nothing_of_the_answer_is_read(self, loaded: Any, reference: PooledStates) -> None:
        model, data = loaded
        other = {**data[0], "input_ids": torch.where(data[0]["labels"] == -100, data[0]["input_ids"], 7)}
        found = pool_states(model, [other])
        torch.testing.assert_close(found.states, reference.states[:, :, :20], atol=1e-4, rtol=1e-4)

    def test_the_batch_does_not_matter(self, loaded: Any, reference: PooledStates) -> None:
        model, data = loaded
        rows = [{key: value[i : i + 1] for key, value in data[0].items()} for i in range(3)]
        found = pool_states(model, rows)
        torch.testing.assert_close(found.states, reference.states[:, :, :3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.distance, reference.distance[..., :3], atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("family", tiny_models.FAMILIES)
    def test_by_hand_on_every_family(self, family: str) -> None:
        model = tiny_models.build(family)
        batch = tiny_models.inputs(family, tiny_models.ROWS, padding="right")
        real = batch["attention_mask"].bool()
        ends = real.sum(-1)
        answer = torch.arange(real.shape[1]) == ends[:, None] - 2
        batch["labels"] = torch.where(answer, batch["input_ids"], -100)
        found = pool_states(model, [batch])
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        prompt = torch.arange(real.shape[1]) < ends[:, None] - 2
        vision = batch["input_ids"] == tiny_models.IMAGE
        for boundary, x in enumerate(hidden[:-1]):  # the last one is behind the final norm
            for row in range(len(real)):
                u = unit(x[row])
                text = u[prompt[row] & ~vision[row]].mean(0)
                torch.testing.assert_close(found.states[boundary, TEXT, row], text, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found.states[boundary, LAST, row], u[ends[row] - 3], atol=1e-4, rtol=1e-4)
        assert found.states[:, VISION, 1].isnan().all(), "the row without an image"
        assert found.states[:, VISION, [0, 2]].isfinite().all()

    def test_gates_are_not_asked_and_the_model_is_left_as_it_was(self, loaded: Any, reference: PooledStates) -> None:
        model, data = loaded
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        attach(model)
        try:
            tiny_models.set_gates(model, bias=torch.full((12, 2), -9.0), weight=torch.zeros(12, 2, 128))
            found = pool_states(model.train(), data[:1])
            assert model.training
        finally:
            detach(model.eval())
        torch.testing.assert_close(found.states, reference.states[:, :, :20])
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


class TestResult:
    def test_the_reference_model_makes_the_answer_readable(self, few: PooledStates) -> None:
        found = probe_states(few, splits=1)
        assert found.information[0, LAST] < 0.02, "the last prompt token itself is always the same"
        assert found.information[-1, LAST] > 0.5 * found.entropy[LAST]
        assert found.gain.shape == (3, 3)

    def test_modalities_that_are_not_there_have_no_figures(self, few: PooledStates) -> None:
        blind = replace(few, states=few.states.clone())
        blind.states[:, VISION] = torch.nan
        found, whole = probe_states(blind, splits=1), probe_states(few, splits=1)
        assert found.information[:, VISION].isnan().all()
        assert found.gain[:, VISION].isnan().all()
        assert found.rows.tolist()[VISION] == 0
        assert torch.equal(found.information[:, LAST], whole.information[:, LAST])

    def test_rare_answers_are_left_out(self) -> None:
        answer = torch.tensor([3] * FEWEST + [7] * FEWEST + [9] * (FEWEST - 1))
        found = probe_states(states(draw(0, len(answer), DIM), draw(1, len(answer), DIM), answer=answer))
        assert found.classes.tolist() == [2] * 3
        assert found.rows.tolist() == [2 * FEWEST] * 3
        assert found.about["rows"] == len(answer)


class TestBadInput:
    def test_one_answer(self) -> None:
        with pytest.raises(
            InputError, match="of 40 rows with 1 different first answer tokens, 1 of these occur 8 times"
        ):
            probe_states(states(draw(0, 40, DIM), draw(1, 40, DIM), answer=torch.ones(40).long()))

    def test_too_few_rows(self) -> None:
        with pytest.raises(InputError, match=r"expected two or more, hence 16 rows at least. Measure more rows"):
            probe_states(states(draw(0, 12, DIM), draw(1, 12, DIM), answer=labels(0, 2, 12)))

    def test_states_that_are_not_finite(self) -> None:
        x = draw(0, 40, DIM)
        x[3, 2], x[5, 0] = torch.nan, torch.inf
        with pytest.raises(InputError, match="`x`: 2 of 40 states are not finite"):
            fit_probe(x, labels(0, 2, 40))

    def test_a_class_without_rows(self) -> None:
        with pytest.raises(InputError, match=r"`z`: rows per class are \[2, 0, 2\]"):
            fit_probe(draw(0, 4, DIM), torch.tensor([0, 2, 0, 2]))
        z = torch.tensor([0, 1, 0, 1, 2, 2])
        with pytest.raises(InputError, match=r"`z`: rows per class are \[1, 1, 0\]"):
            held_out(draw(0, 6, DIM), z, torch.tensor([True, True, False, False, True, True]))

    def test_rows_that_are_not_finite_are_counted_and_left_out(self, loaded: Any, reference: PooledStates) -> None:
        model, data = loaded
        batch = {**data[0], "pixel_values": data[0]["pixel_values"].clone()}
        batch["pixel_values"][4] = torch.nan
        found = pool_states(model, [batch, data[1]])
        kept = [*range(4), *range(5, 40)]
        assert found.skipped == 1
        torch.testing.assert_close(found.states, reference.states[:, :, kept], atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match="got 20 rows, none of which gave finite states"):
            pool_states(model, [{**batch, "pixel_values": torch.full_like(batch["pixel_values"], torch.nan)}])

    def test_no_batch_and_no_labels(self, loaded: Any) -> None:
        model, data = loaded
        with pytest.raises(InputError, match="the probes got no batch"):
            join([])
        unlabelled = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
        with pytest.raises(InputError, match="every row needs `labels` with at least one answer token"):
            pool_states(model, [unlabelled])
        with pytest.raises(InputError, match="every row needs `labels` with at least one answer token"):
            pool_states(model, [{key: value for key, value in data[0].items() if key != "labels"}])


def test_distances_are_those_of_what_is_read() -> None:
    """Mean over prompt tokens of a modality of the cosine distance, row by row."""
    modality = torch.tensor([[1, 0, 0, -1]])
    pool = Pool(modality, torch.tensor([[-100, -100, 5, -100]]))
    pool.add(torch.tensor([[[1.0, 0], [1, 0], [9, 9], [torch.nan, 0]]]))
    pool.add(torch.tensor([[[0.0, 1], [-2, 0], [9, 0], [torch.nan, 0]]]))
    assert torch.stack(pool.distance)[0].tolist() == [[2.0], [1.0], [2.0]]
    assert pool.answer.tolist() == [5]


def test_json_has_every_field() -> None:
    found = probe_states(states(draw(0, 40, DIM), draw(1, 40, DIM), answer=labels(0, 2, 40)))
    assert set(found.to_json()) == {"sites", *Probes.__dataclass_fields__}
