"""Laws of what else the engine can do: skip the attention or the MLP alone, decide by sequence, spend per input.

The laws of `test_laws.py` are about whole layers and tokens that decide for themselves; these are the same ones for
every unit and granularity.
"""

import copy
from typing import Any

import pytest
import torch
from families import LAYERS, ROWS, WIDTH, attention_of, build, inputs
from tiny_models import FAMILIES, PATTERNS, logits, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipit.router import (
    Decision,
    FixedUnits,
    Gated,
    InputError,
    LayerByLayer,
    RouterConfig,
    RouterConfigError,
    SkipCache,
    Trace,
    UnsupportedModelError,
    attach,
    detach,
    gated_layers,
    running,
    set_gates,
)
from skipit.router.gates import logits_of
from skipit.theory.cost import CostModel

EVERY_FAMILY = pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "mllama"])
EVERY_INPUT_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
EVERY_UNIT = pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
EVERY_PART = pytest.mark.parametrize("unit", ["attention", "mlp"])
EVERY_PATTERN = pytest.mark.parametrize("pattern", ["first", "all", "units", "tokens", "gates"])
NEW_TOKENS = {"max_new_tokens": 5, "do_sample": False}


def gated(family: str, **settings: Any) -> Any:
    """A model whose gates tell tokens and rows apart."""
    model = build(family)
    attach(model, RouterConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    set_gates(model, torch.randn(LAYERS, 2, WIDTH, generator=generator), torch.zeros(LAYERS, 2))
    return model


class TestUnits:
    """Skipping the attention or the MLP alone obeys the laws of skipping a layer."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_PART
    @EVERY_PATTERN
    def test_masked_is_gathered_is_cached(self, family: str, kv: str, unit: str, pattern: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit), inputs(family, ROWS)
        policy, real = PATTERNS[pattern](model), batch["attention_mask"].bool()
        masked = logits(model, batch, policy=policy, mode="masked")
        assert same(logits(model, batch, policy=policy)[real], masked[real])
        assert not same(masked[real], logits(model, batch, mode="dense")[real])
        with running(policy=policy):
            cached = model.generate(**batch, **NEW_TOKENS)
            assert torch.equal(model.generate(**batch, **NEW_TOKENS, use_cache=False), cached)
        with running(policy=policy, mode="masked"):
            assert torch.equal(model.generate(**batch, **NEW_TOKENS), cached)

    @EVERY_FAMILY
    @EVERY_PART
    def test_all_run_is_the_base(self, family: str, unit: str) -> None:
        model, batch = build(family), inputs(family, ROWS)
        base = logits(model, batch)
        attach(model, RouterConfig(unit=unit))  # type: ignore[arg-type]
        assert torch.equal(logits(model, batch), base)

    @EVERY_FAMILY
    @EVERY_PART
    @EVERY_POLICY
    def test_skipped_tokens_never_enter_and_the_other_part_is_untouched(self, family: str, unit: str, kv: str) -> None:
        model, batch = gated(family, unit=unit, kv=kv), inputs(family, ROWS)
        entered = {"attention": [0] * LAYERS, "mlp": [0] * LAYERS}
        for index, layer in enumerate(model.get_decoder().layers):
            for name, module in (("attention", attention_of(layer).o_proj), ("mlp", layer.mlp.down_proj)):

                def count(m: nn.Module, args: Any, name: str = name, index: int = index) -> None:
                    entered[name][index] += args[0].shape[:-1].numel()

                module.register_forward_pre_hook(count)
        trace = Trace()
        logits(model, batch, trace=trace)
        step, everything = trace.steps[0], batch["input_ids"].numel()
        assert 0 < step.run.sum() < LAYERS * step.real.sum()
        other = "mlp" if unit == "attention" else "attention"
        assert entered[unit] == step.run.sum((1, 2)).tolist()
        assert entered[other] == [everything] * LAYERS

    @EVERY_POLICY
    def test_skipping_both_parts_is_skipping_the_layer(self, kv: str) -> None:
        """One layer, no later layer that could see a difference in what the parts were given."""
        model, batch = gated("llava", kv=kv), inputs("llava", ROWS)
        run = torch.ones(LAYERS, 2, dtype=torch.bool)
        run[2] = False
        real = batch["attention_mask"].bool()
        whole = logits(model, batch, policy=FixedUnits(run), unit="block")[real]
        model.get_decoder().layers[2].self_attn.o_proj.weight.data.zero_()
        assert same(logits(model, batch, policy=FixedUnits(run), unit="mlp")[real], whole)

    @EVERY_PART
    def test_the_gates_learn(self, unit: str) -> None:
        model, batch = gated("llava", unit=unit).train(), inputs("llava", ROWS, "right")
        trace = Trace()
        with running(trace=trace):
            model(**batch, use_cache=False).logits.square().mean().backward()
        grads = [p.grad for n, p in model.named_parameters() if "layer_gate.weight" in n]
        assert len(grads) == LAYERS
        assert all(g is not None and g.abs().sum() > 0 for g in grads)

    def test_a_layer_of_another_make(self) -> None:
        model, batch = build("llava"), inputs("llava", ROWS)
        model.get_decoder().layers[1].extra = nn.Linear(2, 2)
        attach(model, RouterConfig(unit="mlp"))
        message = (
            r"`unit`: got 'mlp', but `LlamaDecoderLayer` is not one attention and one MLP; it has self_attn \(Llama"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            logits(model, batch)
        assert logits(model, batch, unit="block").isfinite().all()
        detach(model)

    def test_bad_choice(self) -> None:
        with (
            pytest.raises(RouterConfigError, match="`unit`: got 'head', expected one of block, attention, mlp"),
            running(unit="head"),
        ):
            pass


def answers_in_the_input_are_as_generated(model: Any, batch: dict[str, Tensor], **options: Any) -> None:
    """One pass over prompt and answer, told which is the prompt, has the logits of prefill and decoding."""
    more = {**NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True, **options}
    generated = model.generate(**batch, **more)
    length = batch["input_ids"].shape[1]
    whole = batch | {"input_ids": generated.sequences[:, :-1]}
    whole["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    prompt = torch.zeros_like(whole["input_ids"], dtype=torch.bool)
    prompt[:, :length] = True
    for mode in ("masked", "gathered"):
        got = logits(model, whole, prompt=prompt, mode=mode, **options)
        for step, expected in enumerate(generated.logits):
            assert same(got[:, length - 1 + step], expected)


class TestSequences:
    """Under `sequence` the prompt of each row decides once, and what is generated follows."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_UNIT
    def test_one_decision_per_row_layer_and_modality(self, family: str, kv: str, unit: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit, granularity="sequence"), inputs(family, ROWS)
        outputs, traces = [], []
        for mode in ("gathered", "masked"):
            traces.append(Trace())
            with running(mode=mode, trace=traces[-1]):
                outputs.append(model.generate(**batch, **NEW_TOKENS))
        assert torch.equal(*outputs)
        assert all(torch.equal(a.run, b.run) for a, b in zip(*(t.steps for t in traces), strict=True))
        prefill, *decode = traces[0].steps
        different = 0
        for row in range(len(ROWS)):
            rates = []
            for modality in (0, 1):
                chosen = prefill.real[row] & (prefill.modality[row] == modality)
                run = prefill.run[:, row, chosen]
                if chosen.any():
                    assert (run == run[:, :1]).all()  # all or none
                    rates.append(run[:, 0])
            assert all(torch.equal(step.run[:, row, 0], rates[0]) for step in decode)
            different += len(rates) == 2 and not torch.equal(*rates)
        assert different

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_a_row_decides_alone(self, family: str, kv: str) -> None:
        model = gated(family, kv=kv, granularity="sequence")
        rows: list[list[int | str]] = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15]]
        for padding in ("left", "right"):
            batch = inputs(family, rows, padding)
            together = logits(model, batch)
            for row in range(len(rows)):
                real = batch["attention_mask"][row].bool()
                one = inputs(family, [rows[row]])
                assert same(together[row][real], logits(model, one)[0])

    @EVERY_POLICY
    def test_beams_and_samples_take_their_decisions_along(self, kv: str) -> None:
        model, batch = gated("llava", kv=kv, granularity="sequence"), inputs("llava", ROWS)
        for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
            outputs, traces = [], []
            for mode in ("gathered", "masked"):
                torch.manual_seed(0)
                traces.append(Trace())
                with running(mode=mode, trace=traces[-1]):
                    outputs.append(model.generate(**batch, max_new_tokens=4, **how))
            assert torch.equal(*outputs)
            prefill, *decode = traces[0].steps
            text = [
                run[:, int((modality == 0).nonzero()[-1])]
                for run, modality in zip(prefill.run.transpose(0, 1), prefill.modality, strict=True)
            ]
            for step in decode:  # the rows of one prompt lie side by side
                assert torch.equal(
                    step.run[..., 0].T, torch.stack(text).repeat_interleave(step.run.shape[1] // len(text), 0)
                )

    @EVERY_POLICY
    def test_answers_in_the_input_do_not_decide(self, kv: str) -> None:
        """As in training: a prompt mask makes one pass over prompt and answer what prefill and decoding are."""
        model, batch = gated("llava", kv=kv, granularity="sequence"), inputs("llava", ROWS)
        answers_in_the_input_are_as_generated(model, batch)

    def test_the_gates_learn(self) -> None:
        model, batch = gated("llava", granularity="sequence").train(), inputs("llava", ROWS, "right")
        model(**batch, use_cache=False).logits.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "layer_gate.weight" in n)


class TestBudgetsPerInput:
    """With `budget_per="input"` each prompt spends the budget, to one token-layer, and what is generated follows."""

    @EVERY_INPUT_FAMILY
    @EVERY_POLICY
    @EVERY_UNIT
    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_the_budget_is_spent(self, family: str, kv: Any, unit: Any, padding: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit), inputs(family, ROWS, padding)
        trace, costs, top = Trace(), CostModel.of(model), 0
        for budget in (0.75, 0.85, 0.95):
            with running(budget_per="input", budget=budget, trace=trace), torch.no_grad():
                entered = model(**batch, output_hidden_states=True).hidden_states[0]
            step = trace.steps.pop()
            scores = logits_of([layer.layer_gate for layer in gated_layers(model)], entered, step.modality)
            for row in range(len(ROWS)):
                run, real, score = step.run[:, [row]], step.real[[row]], scores[:, [row]]
                assert score[run].min() > score[~run & real].max()  # in the order of the logits
                assert share(costs, run, real, kv, unit) <= budget
                one_more = run | (score == score[~run & real].max())
                assert share(costs, one_more & real, real, kv, unit) > budget
                top += int((one_more & ~run & real).sum() == 1)
        assert top  # some of these are one token-layer more, and no two that are alike

    @EVERY_INPUT_FAMILY
    @EVERY_POLICY
    @EVERY_UNIT
    def test_what_is_generated_follows_its_row(self, family: str, kv: str, unit: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit), inputs(family, ROWS)
        found = []
        for how in ({}, {"mode": "masked"}, {"use_cache": False}):
            trace = Trace()
            with running(budget_per="input", budget=0.8, trace=trace, mode=how.pop("mode", None)):
                found.append(model.generate(**batch, **NEW_TOKENS, **how))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        length = batch["input_ids"].shape[1]
        for row, tokens in enumerate(found[0]):
            alone = model.generate(**inputs(family, ROWS[row : row + 1]), **NEW_TOKENS, budget=0.8, budget_per="input")
            assert torch.equal(alone[0, -5:], tokens[length:])

    def test_rows_have_thresholds_of_their_own(self) -> None:
        model, batch = gated("llava"), inputs("llava", ROWS)
        cache, traces = SkipCache(LAYERS), (Trace(), Trace())
        with running(budget_per="input", budget=0.8), torch.no_grad():
            model(**batch, past_key_values=cache)
            thresholds = cache.layers[0].threshold
            assert thresholds is not None
            assert len(set(thresholds.tolist())) == len(ROWS)
            turned, order = copy.deepcopy(cache), torch.tensor([1, 2, 0])
            turned.batch_select_indices(order)
            ids = torch.full((len(ROWS), 1), 9)
            for kept, trace, rows in ((cache, traces[0], slice(None)), (turned, traces[1], order)):
                mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)[rows]
                with running(trace=trace):
                    model(input_ids=ids, attention_mask=mask, past_key_values=kept)
        run = traces[0].steps[0].run
        assert torch.equal(traces[1].steps[0].run, run[:, order])
        assert (run != run[:, :1]).any()  # the same token, by other thresholds

    @EVERY_POLICY
    def test_beams_and_samples_take_their_thresholds_along(self, kv: str) -> None:
        model, batch = gated("llava", kv=kv, budget_per="input"), inputs("llava", ROWS)
        for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
            outputs = []
            for mode, cached in (("gathered", True), ("masked", True), ("gathered", False)):
                torch.manual_seed(0)
                with running(mode=mode):
                    settings = {"max_new_tokens": 4, "use_cache": cached, "budget": 0.8, **how}
                    outputs.append(model.generate(**batch, **settings))
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[0], outputs[2])

    @EVERY_POLICY
    def test_answers_in_the_input_do_not_spend(self, kv: str) -> None:
        model, batch = gated("llava", kv=kv, budget_per="input"), inputs("llava", ROWS)
        answers_in_the_input_are_as_generated(model, batch, budget=0.8)

    def test_the_gates_learn(self) -> None:
        model, batch = gated("llava", budget_per="input").train(), inputs("llava", ROWS, "right")
        with running(budget=0.8):
            model(**batch, use_cache=False).logits.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "layer_gate.weight" in n)

    @EVERY_POLICY
    def test_the_device_is_waited_for_no_more_often(self, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = gated("llava", kv=kv), inputs("llava", ROWS)
        tolist, listed = Tensor.tolist, []
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: listed.append(1) or tolist(tensor))
        reads = {}
        for per, budget in (("data", None), ("input", 0.8)):
            listed.clear()
            with Reads() as counted:
                logits(model, batch, budget_per=per, budget=budget)
            reads[per] = (len(listed), counted.count)
        assert reads["input"] == reads["data"]
        assert reads["data"][0] == 1

    def test_the_default_budget_is_that_of_the_default_point(self) -> None:
        model, batch = (
            gated("llava", budget_per="input", operating_points={"0.8": 0.0, "0.5": 1.0}),
            inputs("llava", ROWS),
        )
        wanted = model.generate(**batch, **NEW_TOKENS, budget=0.8)
        assert torch.equal(model.generate(**batch, **NEW_TOKENS), wanted)
        trace = Trace()
        with running(trace=trace):
            model.generate(**batch, **NEW_TOKENS, budget_per="data")
        assert torch.equal(trace.steps[0].run, _run_at(model, batch, budget_per="data", budget="0.8"))

    @pytest.mark.parametrize("budget", [None, "0.8", "certified", True, 0, 1.5, float("nan")])
    def test_no_budget(self, budget: Any) -> None:
        model, batch = gated("llava", operating_points={"certified": 0.0}), inputs("llava", ROWS)
        message = r"`budget`: got .*budget_per='input' each prompt spends a share .* Give a number in \(0, 1\]"
        with pytest.raises(RouterConfigError, match=message):
            logits(model, batch, budget_per="input", budget=budget)

    @EVERY_UNIT
    @EVERY_POLICY
    def test_less_than_can_be(self, kv: Any, unit: Any) -> None:
        model, batch = gated("llava", kv=kv, unit=unit), inputs("llava", ROWS[:1])
        nothing = FixedUnits(torch.zeros(LAYERS, 2, dtype=torch.bool))
        run, real = _run_at(model, batch, policy=nothing), batch["attention_mask"].bool()
        least = share(CostModel.of(model), run, real, kv, unit)
        message = (
            rf"`budget`: got 0.001, expected more than {least:.3f}: .* prompt of {real.sum()} tokens .* \(unit '{unit}'"
        )
        with pytest.raises(InputError, match=message):
            logits(model, batch, budget_per="input", budget=0.001)
        assert not _run_at(model, batch, budget_per="input", budget=least + 1e-6).any()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"decide_at": None}, "at once, got decide_at=None. Use"),
            ({"decide_at": (0, 2)}, r"at once, got decide_at=\(0, 2\). Use"),
            ({"granularity": "sequence"}, "got granularity='sequence'. Use decide_at="),
        ],
    )
    def test_settings_that_it_does_not_go_with(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(RouterConfigError, match=message):
            RouterConfig(budget_per="input", **settings)
        with pytest.raises(RouterConfigError, match=message):
            logits(gated("llava", **settings), inputs("llava", ROWS), budget_per="input", budget=0.8)

    def test_calls_that_it_does_not_go_with(self) -> None:
        model, batch = gated("llava"), inputs("llava", ROWS)
        for policy in (FixedUnits(torch.ones(LAYERS, 2, dtype=torch.bool)), Gated(0.0)):
            with (
                pytest.raises(
                    RouterConfigError, match=f"`budget_per`: .* got policy `{type(policy).__name__}` in their"
                ),
                running(policy=policy),
            ):
                model.generate(**batch, **NEW_TOKENS, budget=0.8, budget_per="input")
        with pytest.raises(RouterConfigError, match="`budget_per`: got 'row', expected one of data, input"):
            model.generate(**batch, **NEW_TOKENS, budget_per="row")
        with torch.no_grad():
            cache = model(**batch).past_key_values
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        one = {"input_ids": torch.full((len(ROWS), 1), 9), "attention_mask": mask, "past_key_values": cache}
        with pytest.raises(InputError, match=r"`past_key_values`: .* was run with budget_per='data'"):
            logits(model, one, budget_per="input", budget=0.8)
        with pytest.raises(UnsupportedModelError, match="`budget_per`: 'input' has no price for layers"):
            logits(gated("mllama"), inputs("mllama", ROWS), budget_per="input", budget=0.8)


class Reads(TorchDispatchMode):
    """Counts the operators that wait for the device, but for `tolist`, which is none."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


def share(costs: CostModel, run: Tensor, real: Tensor, kv: Any, unit: Any) -> float:
    """Executed share of the dense decoder's FLOPs in one pass."""
    executed, dense = costs.spend(run.double(), real, kv, unit=unit)
    return float(executed.sum() / dense.sum())


def _run_at(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    trace = Trace()
    logits(model, batch, trace=trace, **options)
    return trace.steps[0].run


class TestWhatIsHandedOut:
    """Hidden states and attention weights stay what they are without skipit."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_UNIT
    def test_hidden_states(self, family: str, kv: str, unit: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit), inputs(family, ROWS)
        real = batch["attention_mask"].bool()
        states = []
        for mode in ("masked", "gathered"):
            with running(mode=mode), torch.no_grad():
                states.append(model(**batch, output_hidden_states=True).hidden_states)
        assert len(states[0]) == len(states[1]) == LAYERS + 1
        assert all(same(a[real], b[real]) for a, b in zip(*states, strict=True))

    @EVERY_POLICY
    def test_attention_weights(self, kv: str) -> None:
        """Gathered execution does not have those of skipped tokens, so a call that wants them is run masked."""
        model, batch = build("llava", attention="eager"), inputs("llava", ROWS)
        attach(model, RouterConfig(kv=kv))  # type: ignore[arg-type]
        policy = PATTERNS["units"](model)
        with running(policy=policy), torch.no_grad():
            got = model(**batch, output_attentions=True)
            plain = model(**batch)
        tokens, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
        assert [w.shape for w in got.attentions] == [(3, 4, tokens, tokens)] * LAYERS
        assert same(got.logits[real], plain.logits[real])
        if kv == "evict":
            skipped = batch["input_ids"][0] == model.config.image_token_index
            others = (~skipped & real[0]).nonzero()[-1]
            assert not got.attentions[0][0, :, others][..., skipped].any()  # vision skips layer 0


class TestUseOfGenerate:
    """What people do with `generate`."""

    @EVERY_FAMILY
    @EVERY_POLICY
    @EVERY_UNIT
    def test_chunked_prefill(self, family: str, kv: str, unit: str) -> None:
        model = gated(family, kv=kv, unit=unit)
        batch = inputs(family, [[5, 6, 7, 8, 9, 10, 11, 12, 13]])
        whole = model.generate(**batch, **NEW_TOKENS)
        assert torch.equal(model.generate(**batch, **NEW_TOKENS, prefill_chunk_size=4), whole)

    @pytest.mark.parametrize("family", ["llava", "mllama"])
    @EVERY_POLICY
    @EVERY_UNIT
    def test_a_second_turn_reuses_the_cache(self, family: str, kv: str, unit: str) -> None:
        model, batch = gated(family, kv=kv, unit=unit), inputs(family, [[5, "image", 6, 7]])
        images = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        first = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True)
        more = torch.tensor([[9, 10, 11]])
        ids = torch.cat([first.sequences, more], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        who_sees = {name: value for name, value in images.items() if name == "cross_attention_mask"}
        reused = model.generate(**turn, **who_sees, **NEW_TOKENS, past_key_values=first.past_key_values)
        assert isinstance(first.past_key_values, SkipCache)
        fresh = model.generate(**turn, **images, **NEW_TOKENS)
        assert torch.equal(reused, fresh)

    @EVERY_UNIT
    @EVERY_POLICY
    def test_evicting_saves_memory(self, unit: str, kv: str) -> None:
        model, batch = gated("llava", kv=kv, unit=unit), inputs("llava", ROWS[:1])
        trace = Trace()
        with running(trace=trace):
            cache = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True).past_key_values
        kept = [step.run if kv == "evict" and unit != "mlp" else step.real.expand_as(step.run) for step in trace.steps]
        tokens = sum(int(k.sum()) for k in kept)
        assert cache.num_bytes() == tokens * 2 * 2 * 8 * 4  # keys and values, heads, head_dim, fp32

    @EVERY_FAMILY
    @EVERY_POLICY
    def test_a_prompt_of_one_token(self, family: str, kv: str) -> None:
        model = gated(family, kv=kv)
        batch = {name: value[:, -1:] for name, value in inputs(family, [[5]]).items()}  # without what some begin with
        for pattern in PATTERNS.values():
            with running(policy=pattern(model)):
                assert model.generate(**batch, **NEW_TOKENS).shape == (1, 6)

    @EVERY_UNIT
    @EVERY_POLICY
    def test_bfloat16(self, unit: str, kv: str) -> None:
        model, batch = gated("llava", kv=kv, unit=unit).bfloat16(), inputs("llava", ROWS)
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        policy, real = PATTERNS["units"](model), batch["attention_mask"].bool()
        masked = logits(model, batch, policy=policy, mode="masked")[real].float()
        gathered = logits(model, batch, policy=policy)[real].float()
        assert (masked - gathered).abs().max() <= 0.05 * masked.abs().max()

    @pytest.mark.slow
    @EVERY_UNIT
    @EVERY_POLICY
    def test_compiled(self, unit: str, kv: str) -> None:
        """Graphs break where the number of tokens depends on data; what is between them is compiled."""
        model, batch = gated("llava", kv=kv, unit=unit), inputs("llava", ROWS)
        expected = logits(model, batch)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert same(compiled(**batch).logits, expected)
            assert same(compiled(**inputs("llava", ROWS[:1])).logits, logits(model, inputs("llava", ROWS[:1])))

    def test_embeddings_instead_of_tokens(self) -> None:
        model = gated("llava")
        with pytest.raises(InputError, match="cannot tell text from vision tokens"):
            model(inputs_embeds=torch.zeros(1, 3, WIDTH))


class TestLongPrompts:
    """Attention of one row's packed tokens goes span by span, also beyond the model's context: no result changes."""

    @EVERY_PART
    @pytest.mark.parametrize("skipped", [1, 3])
    def test_spans(self, unit: str, skipped: int) -> None:
        model = build("llava")
        attach(model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 20, (1, 700), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert ids.shape[1] > model.config.get_text_config().max_position_embeddings
        assert torch.equal(logits(model, batch), logits(model, batch, mode="dense"))  # transformers refuses nothing
        table = torch.rand(LAYERS, 1, 700, generator=generator) > skipped / 4

        class Table(LayerByLayer):
            def decide_layer(self, layer: int, hidden: Tensor, call: Any, gate: Any) -> Any:
                return Decision(table[layer][:, call.past : call.past + hidden.shape[1]])

        for unit_ in ("block", unit):
            masked = logits(model, batch, policy=Table(), mode="masked", unit=unit_)
            assert same(logits(model, batch, policy=Table(), unit=unit_), masked)
