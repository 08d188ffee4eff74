"""A run that goes on from another begins where that one ended: with its gates, its LoRA and its record."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from shallow import shallow_reference

from skipit.router import CheckpointError, InputError, find_router, gate_state, running
from skipit.router.attach import gated_layers
from skipit.router.checkpoint import load_router
from skipit.router.decoder import find_decoder
from skipit.router.measured import bench_file
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime
from skipit.theory.plan import LEFT_OUT, Plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.data.used import RECORD, also_used
from skipit.train.reference.data import reference_dataset
from skipit.train.run import prepare, train
from skipit.train.start import start_from
from studies.architecture import build_processor

LAYERS, WIDTH = 2, 128
CONFIG = TrainConfig(budget=0.6, kv="evict", steps=3, batch_size=4, lora_rank=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base() -> Any:
    return shallow_reference(LAYERS)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("train", 12)


@pytest.fixture(scope="module")
def first(base: Any, rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "first"
    weight = 0.1 * torch.randn(LAYERS, 2, base.config.text_config.hidden_size)
    rates = torch.ones(LAYERS, 2)
    plan = Plan(weight, torch.zeros(LAYERS, 2), 0.6, "evict", "theory", fingerprint(base), rates, decide_at=(0,))
    held = reference_dataset("calibration", 4)
    return train(copy.deepcopy(base), build_processor(), rows, plan, CONFIG, out, calibration=held, base="tiny"), out


def test_it_begins_with_what_the_other_ended_with(base: Any, rows: Dataset, first: tuple[Any, Path]) -> None:
    tuned, out = first
    start = start_from(out)
    again = prepare(copy.deepcopy(base), start.plan, CONFIG, start).eval()
    for name, value in gate_state(again).items():
        assert torch.equal(value, gate_state(tuned)[name])
    batch = next(batches(rows, Collator(build_processor()), 4))
    batch.pop("labels")
    router, threshold = find_router(again)[1], load_router(out)[0].threshold
    assert router.config.decide_at == (0,)
    assert threshold != 0
    router.config = replace(router.config, threshold=threshold)
    with torch.no_grad(), running(mode="masked"):
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits)
        with again.disable_adapter():
            assert not torch.allclose(again(**batch).logits, tuned(**batch).logits)


def test_both_have_used_their_rows(base: Any, first: tuple[Any, Path], tmp_path: Path) -> None:
    _, out = first
    held, more = reference_dataset("calibration", 4), reference_dataset("train", 12, seed=5)
    config = replace(CONFIG, budget=0.8, more_budgets=(0.6,), steps=2)
    train(copy.deepcopy(base), build_processor(), more, start_from(out), config, tmp_path / "on", calibration=held)
    before, after = (json.loads((run / "run.json").read_text()) for run in (out, tmp_path / "on"))
    assert after["init"] == before["init"] == "theory"
    assert set(after["calibrated_shares"]) == {"0.8", "0.6"}
    assert after["held_out"]["used"] == {"profiled": None, "trained": 0}
    joined = also_used(before, "trained", after[RECORD]["trained"])["trained"]
    assert joined == after[RECORD]["trained"] != before[RECORD]["trained"]


def in_time(base: Any, out: int | None, **changed: Any) -> Plan:
    """A plan for a latency that leaves out a layer for all, or none."""
    rates, about = torch.ones(LAYERS, 2), {"latency": 0.7}
    if out is not None:
        rates[out] = 0
    plan = Plan(torch.zeros(LAYERS, 2, WIDTH), torch.zeros(LAYERS, 2), 0.6, "evict", "theory", fingerprint(base), rates)
    return replace(plan, **{"about": about, "decide_at": (0,), **changed})


def test_layers_that_a_plan_leaves_out_stay_out_and_the_other_gates_are_the_runs(
    base: Any, rows: Dataset, first: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tuned, out = first
    start = start_from(out).leaving_out(in_time(base, 1))
    assert (start.settings["latency"], start.settings["more_budgets"]) == (0.7, ())
    again = prepare(copy.deepcopy(base), start.plan, replace(CONFIG, latency=0.7), start)
    before, begun = gate_state(tuned), gate_state(again)
    for name, value in begun.items():
        assert torch.equal(value[0], before[name][0])
        assert not torch.equal(value[1], before[name][1])
    assert (begun["bias"][1] == LEFT_OUT).all()
    assert not begun["weight"][1].any()
    learn = [any(p.requires_grad for p in layer.layer_gate.parameters()) for layer in gated_layers(again)]
    assert learn == [True, False]
    # What one layer of a prompt takes, and no layer nothing: half of the time is the layer that is left.
    width, linear = WIDTH, CostModel.of(base).layers[0].linear
    table = (LayerTime(40, skipped, "evict", None, 1.0, 1 - skipped / 40) for skipped in (0, 40))
    steps = {40: StepTime(0.5, 1.0, 0.0)}
    times = LayerTimes("a machine", "float32", width, linear, "wall time", {40: 1.0}, tuple(table), steps)
    times.save(bench_file(torch.device("cpu"), torch.float32, width))
    config = replace(CONFIG, latency=0.45, steps=2)
    held = reference_dataset("calibration", 4)
    ended = train(copy.deepcopy(base), build_processor(), rows, start, config, tmp_path / "on", calibration=held)
    after = gate_state(ended)
    assert (after["bias"][1] == LEFT_OUT).all(), "it stays out"
    assert not torch.equal(after["weight"][0], before["weight"][0]), "the others learn"


def test_a_plan_that_does_not_fit_a_run_is_refused(base: Any, first: tuple[Any, Path]) -> None:
    start = start_from(first[1])
    for plan in (in_time(base, None), in_time(base, 1, about={})):
        with pytest.raises(InputError, match="expected one for a latency that leaves out layers for all tokens"):
            start.leaving_out(plan)
    for changed, wanted in (
        ({"kv": "retain"}, "K/V policy evict, the plan retain"),
        ({"decide_at": None}, "decision points layer 0, the plan each layer"),
        ({"model": "another"}, "the plan another"),
    ):
        with pytest.raises(CheckpointError, match=wanted):
            start.leaving_out(in_time(base, 1, **changed))


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"kv": "retain"}, "`kv` is 'evict' there, 'retain' here"),
        ({"lora_rank": 4, "lora_alpha": 8}, "`lora_rank` is 2 there, 4 here, `lora_alpha` is 16 there, 8 here"),
    ],
)
def test_other_settings_are_refused(base: Any, first: tuple[Any, Path], changed: dict[str, Any], wanted: str) -> None:
    start = start_from(first[1])
    with pytest.raises(CheckpointError, match=f"cannot be gone on from with other settings: {wanted}"):
        prepare(copy.deepcopy(base), start.plan, replace(CONFIG, **changed), start)


def test_what_is_damaged_is_named(base: Any, first: tuple[Any, Path], tmp_path: Path) -> None:
    _, out = first
    with pytest.raises(CheckpointError, match="is not a finished run"):
        start_from(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    path = damaged / "adapter" / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if "lora_B" in name)
    for values, wanted in (
        ({key: value for key, value in whole.items() if key != name}, f"lacks `{name}`"),
        ({**whole, name: whole[name][1:].contiguous()}, f"`{name}` has shape"),
        ({**whole, name: torch.full_like(whole[name], np.nan)}, name),
    ):
        save_file(values, path)
        start = start_from(damaged)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors") as error:
            prepare(copy.deepcopy(base), start.plan, CONFIG, start)
        assert wanted in str(error.value)


def test_of_another_model(base: Any, first: tuple[Any, Path]) -> None:
    start, other = start_from(first[1]), copy.deepcopy(base)
    with torch.no_grad():
        find_decoder(other)[2][0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(CheckpointError, match="fingerprint"):
        prepare(other, start.plan, CONFIG, start)
