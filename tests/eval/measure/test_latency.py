"""Timing with a clock that is made of the models' own work: medians, ratios pair by pair, warm-up not counted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs, processor
from families.family import picture
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from skipit.eval.measure import latency, stopwatch, twin
from skipit.eval.measure.latency import Subject, compiled_subject, hardware, time_models
from skipit.router import FixedUnits, attach, running

INPUTS = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


class Machine:
    """A clock that work moves on, and that gets slower with every repeat."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slowness = 1.0

    def now(self, device: torch.device) -> float:
        return self.time


class Model(LlamaForCausalLM):
    """Takes a fixed time for a prompt and for a step, and writes down what it was called with."""

    def __init__(self, name: str, machine: Machine, prefill: float, step: float, log: list[str]) -> None:
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        super().__init__(LlamaConfig(vocab_size=9, **small))
        self.name, self.machine, self.costs, self.log = name, machine, (prefill, step), log
        self.calls: list[dict[str, Any]] = []

    def forward(self, **inputs: Any) -> Any:
        self.calls.append(inputs)
        decoding = inputs["past_key_values"].get_seq_length() > 0
        if not decoding:
            self.log.append(self.name)
        self.machine.time += self.costs[decoding] * self.machine.slowness
        outputs = super().forward(**inputs)
        outputs.logits = torch.zeros_like(outputs.logits)
        outputs.logits[..., 4] = 1
        return outputs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(stopwatch, "now", machine.now)
    return machine


def test_models_take_turns_and_are_compared_pair_by_pair(machine: Machine) -> None:
    log: list[str] = []
    dense, fast = Model("dense", machine, 0.040, 0.008, log), Model("fast", machine, 0.010, 0.004, log)

    @contextmanager
    def drifting() -> Iterator[None]:
        machine.slowness *= 2  # before the fast model of each repeat
        yield

    result = time_models({"dense": Subject(dense), "fast": Subject(fast, drifting)}, INPUTS, decode_steps=2, repeats=3)
    assert log == ["dense", "fast", "fast", "dense"] * 2 + ["dense", "fast"], "two repeats warm up"
    # In repeats 3, 4, 5 the dense model ran at slowness 4, 16, 16 and the fast one at 8, 16, 32.
    assert result["dense"].prefill_ms == pytest.approx(40 * 16)
    assert result["dense"].decode_ms == pytest.approx(8 * 16)
    assert result["fast"].prefill_ms == pytest.approx(10 * 16)
    assert result["fast"].decode_ms == pytest.approx(4 * 16)
    assert (result["dense"].prefill_speed_up, result["dense"].decode_speed_up) == (1, 1)
    assert result["fast"].prefill_speed_up == pytest.approx(2)
    assert result["fast"].decode_speed_up == pytest.approx(1)
    assert result["fast"].repeats == 3


def test_a_step_decodes_one_token_from_the_cache(machine: Machine) -> None:
    model = Model("dense", machine, 1.0, 1.0, [])
    time_models({"dense": Subject(model)}, INPUTS, decode_steps=2, repeats=1)
    first, *steps = model.calls[:3]
    assert torch.equal(first["input_ids"], INPUTS["input_ids"])
    assert first["use_cache"]
    for number, step in enumerate(steps, start=1):
        assert step["input_ids"].tolist() == [[4]], "the most likely token"
        assert step["attention_mask"].shape == (1, 3 + number)
        assert step["past_key_values"] is first["past_key_values"]
        assert not isinstance(step.get("pixel_values"), Tensor)


def test_a_picture_has_rows_and_columns_while_it_is_timed() -> None:
    """M-RoPE: positions that only the family's own preparation knows, in the prompt and after it."""
    model, positions = build("qwen2.5-vl"), list[Tensor]()
    model.register_forward_pre_hook(lambda _, __, given: positions.append(given["position_ids"]), with_kwargs=True)
    text = "USER : <|vision_start|><|image_pad|><|vision_end|> what is it ASSISTANT :"
    inputs = dict(processor("qwen2.5-vl")(text=[text], images=[[picture(0, 0)]], return_tensors="pt"))
    time_models({"dense": Subject(model)}, inputs, decode_steps=2, repeats=1)
    timed, positions = positions[:3], []
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(timed, positions, strict=True))
    assert not torch.equal(timed[0][1], timed[0][2]), "rows and columns"


def test_the_context_is_left_between_repeats(machine: Machine) -> None:
    entered = 0

    @contextmanager
    def context() -> Iterator[None]:
        nonlocal entered
        entered += 1
        yield
        entered -= 1

    model = Model("dense", machine, 1.0, 1.0, [])
    time_models({"dense": Subject(model, context)}, INPUTS, repeats=1)
    assert entered == 0


def test_a_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("dense", Machine(), 0.0, 0.0, [])
    figures = time_models({"dense": Subject(model)}, INPUTS, repeats=1)["dense"]
    assert figures.prefill_ms > 0
    assert figures.decode_ms > 0
    assert json.loads(json.dumps(figures.to_json())).keys() == {
        "prefill_ms", "decode_ms", "prefill_speed_up", "decode_speed_up", "repeats",
        "prefill_interval", "decode_interval", "decode_ideal",
    }  # fmt: skip
    assert figures.prefill_interval is None, "one repeat has no interval"


def test_the_ideal_counts_the_layers_that_are_entered() -> None:
    model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7]])
    attach(model)
    nobody = torch.tensor([[True, True], [False, True], [False, True], [True, True]])  # vision has no tokens to decode
    subjects = {"all": Subject(model), "half": Subject(model, lambda: running(policy=FixedUnits(nobody)))}
    found = time_models(subjects, batch, decode_steps=2, repeats=1)
    assert {name: one.decode_ideal for name, one in found.items()} == {"all": 1.0, "half": 2.0}


def test_the_interval_of_a_median() -> None:
    fifteen = [float(value) for value in range(15)]
    assert latency.median_interval(fifteen[::-1]) == (3.0, 11.0)
    assert latency.median_interval(fifteen[:6]) == (0.0, 5.0)
    assert latency.median_interval(fifteen[:5]) is None, "the widest interval of five values covers 93.75 % only"


def test_the_interval_of_a_median_covers() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(500, 15, generator=generator).exp().tolist()
    covered = [low <= 1.0 <= high for low, high in (latency.median_interval(values) or (9, 9) for values in draws)]
    assert 0.94 <= sum(covered) / len(covered) <= 0.99


def test_the_processor_is_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nmodel name\t: Some CPU @ 2.00GHz\n")
    assert "Some CPU @ 2.00GHz, " in hardware(info)
    assert "PyTorch threads: 1" in hardware(info)


def test_it_is_never_empty(tmp_path: Path) -> None:
    assert not hardware(tmp_path / "none").startswith(",")


def test_the_compiled_model_answers_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "BACKEND", "eager")
    model = build("llava")
    batch = inputs("llava", [[5, "image", 6, 7]])
    fast = compiled_subject(model, batch)
    assert isinstance(fast, Subject)
    assert fast.model is not model
    assert next(fast.model.parameters()) is next(model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fast.model(**batch).logits, model(**batch).logits)


def test_why_a_model_could_not_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr(twin, "BACKEND", broken)
    why = compiled_subject(build("llava"), INPUTS)
    assert isinstance(why, str)
    assert "no compiler" in why
    assert "\n" not in why
