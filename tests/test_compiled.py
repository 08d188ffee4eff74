"""Layers as graphs: what `skipit.compile` changes is how a result is computed, and a capacity changes who runs alike.

Which kernels a backend makes of a graph is its own affair: the laws run with `eager`, which traces and makes none, one
with `aot_eager`; that inductor's kernels do the same is slow to show.
"""

import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES as EVERY_FAMILY
from families import ROWS, build, inputs
from test_engine_laws import NEW_TOKENS, gated
from tiny_models import FAMILIES, PATTERNS, logits, same

import skipit
from skipit.router import (
    FixedUnits,
    Gated,
    InputError,
    RouterConfigError,
    SkipItError,
    Trace,
    UnsupportedModelError,
    find_router,
    running,
)
from skipit.router import call as call_module
from skipit.router import compiled as compiled_module
from skipit.router.config import EVERYTHING
from studies.counts import counting, models
from studies.shapes import prompt

ALL_RUN = -1e9  # a threshold above which all logits happen to be
KV = pytest.mark.parametrize("kv", ["retain", "evict"])


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch.compiler.reset()
    compiled_module._graphs.clear()


@pytest.fixture
def steps_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "CAPACITY_STEP", 4)


def pair(family: str, backend: Any, **settings: Any) -> tuple[Any, Any]:
    """The same model twice, the second one compiled."""
    plain, compiled = gated(family, **settings), gated(family, **settings)
    assert skipit.compile(compiled, backend=backend) is compiled
    return plain, compiled


def check(family: str, backend: str, pattern: str, *, answers: bool = True, **settings: Any) -> None:
    """Compiled or not, a model says the same about a prompt, and goes on in the same way."""
    (plain, compiled), batch = pair(family, backend, **settings), inputs(family, ROWS)
    real, found = batch["attention_mask"].bool(), []
    for model in (plain, compiled):
        with running(route="whole", policy=(policy := PATTERNS[pattern](model))):
            found.append(
                (logits(model, batch, policy=policy)[real], model.generate(**batch, **NEW_TOKENS) if answers else None)
            )
    (expected, answer), (got, own) = found
    assert same(got, expected)
    assert answer is None or torch.equal(own, answer)


class Counter:
    """A backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


class TestSameResults:
    @KV
    def test_prompts_and_answers(self, kv: str) -> None:
        check("llava", "eager", "tokens", kv=kv)

    def test_masks_and_positions_by_another_backend(self) -> None:
        check("gemma3", "aot_eager", "tokens", answers=False, kv="evict")

    def test_mlp_alone(self) -> None:
        check("llava", "eager", "tokens", answers=False, unit="mlp")

    def test_what_has_no_graph(self) -> None:
        check("llava", "eager", "tokens", answers=False, unit="attention")

    @pytest.mark.slow
    @KV
    @pytest.mark.parametrize("family", EVERY_FAMILY)
    def test_every_family(self, family: str, kv: str) -> None:
        for pattern in ("all", "gates", "tokens", "units"):
            check(family, "aot_eager", pattern, kv=kv)

    @pytest.mark.slow
    @KV
    @pytest.mark.parametrize("family", FAMILIES)
    def test_by_inductor(self, family: str, kv: str) -> None:
        check(family, "inductor", "gates", kv=kv)

    def test_gates_that_learn_are_not_compiled(self) -> None:
        counter = Counter()
        _, model = pair("llava", counter)
        with running(trace=(trace := Trace())):
            model.train()(**inputs("llava", ROWS))
        trace.steps[0].probability.sum().backward()
        assert counter.graphs == 0
        assert any(parameter.grad is not None for parameter in model.parameters())


class TestGraphs:
    @KV
    @torch.no_grad()
    def test_one_graph_for_every_count_layer_and_prompt(self, kv: str) -> None:
        counter = Counter()
        plain, model = pair("llava", counter, kv=kv)
        for row, words in enumerate((5, 6, 7, 9, 11)):
            batch = inputs("llava", [["image", *range(40, 40 + words)]])
            policy = PATTERNS["tokens"](model)
            with running(policy=policy, route="whole"):
                assert same(model(**batch).logits, plain(**batch).logits)
            with running(policy=policy, trace=(trace := Trace())):
                model(**batch)
            assert len({int(run.sum()) for run in trace.steps[0].run}) > 1
            assert counter.graphs == 1, row

    @torch.no_grad()
    @pytest.mark.parametrize("threshold", [ALL_RUN, EVERYTHING])
    def test_one_graph_for_every_step(self, threshold: float) -> None:
        counter = Counter()
        _, model = pair("llava", counter)
        with running(policy=Gated(threshold)):
            model.generate(**inputs("llava", [["image", 40, 41]]), max_new_tokens=2, do_sample=False)
            before = counter.graphs
            model.generate(**inputs("llava", [["image", 40, 41]]), max_new_tokens=9, do_sample=False)
        assert counter.graphs == before == 2

    def test_a_layer_that_makes_no_graph(self) -> None:
        _, model = pair("llava", "eager")
        attention = model.model.language_model.layers[0].self_attn
        own = attention.forward

        def prints(*args: Any, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return own(*args, **kwargs)

        attention.forward = prints
        with pytest.raises(UnsupportedModelError, match=r"cannot be compiled as one graph.*without `skipit.compile`"):
            logits(model, inputs("llava", ROWS), policy=Gated(ALL_RUN))

    def test_the_model_can_still_be_sent(self) -> None:
        _, model = pair("llava", "eager")
        sent = pickle.loads(pickle.dumps(model))
        assert find_router(sent)[1].compiling == find_router(model)[1].compiling


@pytest.mark.usefixtures("steps_of_four")
class TestCapacity:
    @KV
    @pytest.mark.parametrize("pattern", ["gates", "units"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_way_to_run_gives_the_same(self, family: str, pattern: str, kv: str) -> None:
        model, batch = gated(family, kv=kv), inputs(family, ROWS)
        policy, real = PATTERNS[pattern](model), batch["attention_mask"].bool()
        free = logits(model, batch, policy=policy)
        with running(policy=policy, capacity=0.3):
            masked = logits(model, batch, policy=policy, mode="masked")
            assert same(logits(model, batch, policy=policy)[real], masked[real])
            answer = model.generate(**batch, **NEW_TOKENS)
            with running(mode="masked"):
                assert torch.equal(model.generate(**batch, **NEW_TOKENS), answer)
        assert not same(masked[real], free[real])

    @KV
    def test_compiled(self, kv: str) -> None:
        model, batch = gated("llava", kv=kv), inputs("llava", ROWS)
        policy, real = PATTERNS["gates"](model), batch["attention_mask"].bool()
        with running(policy=policy, capacity=0.3):
            masked = logits(model, batch, policy=policy, mode="masked")
            answer = model.generate(**batch, **NEW_TOKENS)
        skipit.compile(model, capacity=0.3, backend="eager")
        assert same(logits(model, batch, policy=policy)[real], masked[real])
        with running(policy=policy):
            assert torch.equal(model.generate(**batch, **NEW_TOKENS), answer)

    @torch.no_grad()
    @pytest.mark.parametrize("threshold", [ALL_RUN, EVERYTHING])
    def test_the_highest_logits_run(self, threshold: float) -> None:
        model, batch = gated("llava"), inputs("llava", ROWS)
        with running(trace=(free := Trace()), policy=Gated(ALL_RUN)):
            model(**batch)
        with running(trace=(limited := Trace()), policy=Gated(threshold), capacity=0.3):
            model(**batch)
        real = batch["attention_mask"].bool()
        for layer in range(len(free.steps[0].run)):
            for row in range(len(real)):
                scores = free.steps[0].decisions[layer].probability[row][real[row]]
                run = limited.steps[0].run[layer, row][real[row]]
                most = -(-3 * len(scores) // 40) * 4
                assert int(run.sum()) == min(most, len(scores))
                assert not run.any() or scores[run].min() >= scores[~run].max()

    @torch.no_grad()
    def test_a_row_does_not_depend_on_the_others(self) -> None:
        model = gated("llava")
        with running(policy=Gated(-1e9), capacity=0.3):
            together = model(**(batch := inputs("llava", ROWS))).logits
            for row, items in enumerate(ROWS):
                alone = model(**inputs("llava", [items])).logits[0]
                assert same(together[row][batch["attention_mask"][row].bool()], alone)

    @KV
    @pytest.mark.parametrize("batch", [1, 4])
    @torch.no_grad()
    def test_the_host_never_waits_for_a_prompt(self, kv: str, batch: int) -> None:
        dense, model = models((0,), image_tokens=16)
        given = prompt(16, 12, batch)
        skipit.compile(model, capacity=0.5, disable=True)  # the same code; torch.compile cannot be counted
        waited = []
        for one in (dense, model):
            with counting(one) as found, running(kv=kv):
                one(**given, use_cache=True)
            waited.append(found.waited())
        assert waited[0] == waited[1]

    @KV
    @torch.no_grad()
    def test_more_capacity_than_needed_changes_nothing(self, kv: str) -> None:
        model, batch = gated("llava", kv=kv), inputs("llava", ROWS)
        real = batch["attention_mask"].bool()
        free = logits(model, batch)
        skipit.compile(model, capacity=skipit.measure_capacity(model, [batch], quantile=1.0), backend="eager")
        assert same(logits(model, batch)[real], free[real])

    def test_pieces_of_a_prompt_are_refused(self) -> None:
        model = gated("llava")
        with (
            running(capacity=0.3),
            pytest.raises(InputError, match="`capacity`: 'a limit' decides by the whole prompt"),
        ):
            model.generate(**inputs("llava", [["image", 40, 41]]), **NEW_TOKENS, prefill_chunk_size=3)


class TestBadInput:
    @pytest.mark.parametrize("capacity", [0, -0.5, 1.5, float("nan"), "half", True, [0.5], [0.5] * 99, [0.5, None]])
    def test_capacity(self, capacity: Any) -> None:
        model = gated("llava")
        with pytest.raises(RouterConfigError, match=r"`capacity`: got .*, expected the share of a prompt's tokens"):
            skipit.compile(model, capacity=capacity)
        with running(capacity=capacity), pytest.raises(RouterConfigError, match="`capacity`"):
            logits(model, inputs("llava", ROWS))

    @pytest.mark.parametrize("multiple", [0, -64, 0.5, True])
    def test_multiple(self, multiple: Any) -> None:
        with pytest.raises(RouterConfigError, match=r"`multiple`: got .*, expected a number of tokens, at least 1"):
            skipit.compile(gated("llava"), multiple=multiple)

    def test_a_model_without_gates(self) -> None:
        with pytest.raises(SkipItError, match="has no gates"):
            skipit.compile(build("llava"))

    def test_no_rows_to_measure(self) -> None:
        with pytest.raises(InputError, match="`batches`"):
            skipit.measure_capacity(gated("llava"), [])


def test_fixed_units_have_no_scores() -> None:
    model, batch = gated("llava"), inputs("llava", ROWS)
    everyone = FixedUnits(torch.ones(5, 2, dtype=torch.bool))
    with running(capacity=1.0):
        assert same(logits(model, batch, policy=everyone), logits(model, batch, mode="dense"))
