"""Laws of what else the engine can do: skip the attention or the MLP alone, decide by sequence, hand out what ran.

The laws of `test_laws.py` are about whole layers and tokens that decide for themselves; these are the same ones for
every unit and granularity.
"""

from typing import Any

import pytest
import torch
from families import LAYERS, ROWS, WIDTH, attention_of, build, inputs
from tiny_models import PATTERNS, logits, same
from torch import Tensor, nn

from skipit.router import (
    Decision,
    FixedUnits,
    InputError,
    LayerByLayer,
    RouterConfig,
    RouterConfigError,
    SkipCache,
    Trace,
    UnsupportedModelError,
    attach,
    detach,
    running,
    set_gates,
)

EVERY_FAMILY = pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "mllama"])
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
        generated = model.generate(**batch, **NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
        length = batch["input_ids"].shape[1]
        whole = batch | {"input_ids": generated.sequences[:, :-1]}
        whole["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
        prompt = torch.zeros_like(whole["input_ids"], dtype=torch.bool)
        prompt[:, :length] = True
        for mode in ("masked", "gathered"):
            got = logits(model, whole, prompt=prompt, mode=mode)
            for step, expected in enumerate(generated.logits):
                assert same(got[:, length - 1 + step], expected)

    def test_the_gates_learn(self) -> None:
        model, batch = gated("llava", granularity="sequence").train(), inputs("llava", ROWS, "right")
        model(**batch, use_cache=False).logits.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "layer_gate.weight" in n)


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
