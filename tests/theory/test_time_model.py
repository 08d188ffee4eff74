"""What a run takes by the table of `skipit bench`: rows are prompts by themselves, and gates learn from it."""

from pathlib import Path

import pytest
import torch
from families import build

from skipit.router import attach
from skipit.router.config import RouterConfig
from skipit.router.errors import InputError
from skipit.router.measured import bench_file
from skipit.theory.calibrate import LIMIT, measured_share, meet
from skipit.theory.cost import CostModel
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime
from skipit.theory.time_model import TimeModel

SHARES = {0: 1.1, 2: 0.8, 6: 0.4, 8: 0.1}  # time by how many of 8 tokens skip


def table(width: int, linear: float) -> LayerTimes:
    rows = (LayerTime(8, n, kv, None, time, time) for n, time in SHARES.items() for kv in ("retain", "evict"))
    step = StepTime(1.0, 1.1, 0.1)
    return LayerTimes("a machine", "float32", width, linear, "wall time", {8: 2.0}, tuple(rows), {8: step})


def test_rows_are_prompts_by_themselves() -> None:
    model, real = TimeModel(table(4, 1.0), 2), torch.ones(3, 8, dtype=torch.bool)
    real[1, :4] = False
    run = torch.ones(2, 3, 8)
    run[0, 0, :2] = run[1, 0, :6] = 0  # row 0 skips a quarter of layer 0, three quarters of layer 1
    run[:, 1, :6] = 0  # half of the four tokens that are none of padding
    run[1, 2] = 0
    executed, dense = model.spend(run, real, "retain")
    assert dense.sum(-1).flatten().tolist() == pytest.approx([2.0] * 6)
    assert not executed[:, ~real].any()
    assert (executed / dense)[0, :, -1].tolist() == pytest.approx([0.8, 0.6, 1.1])
    assert (executed / dense)[1, :, -1].tolist() == pytest.approx([0.4, 0.6, 0.1])


def test_gates_learn_how_much_a_token_more_takes() -> None:
    run = torch.ones(1, 1, 8)
    run[..., :4] = 0
    run.requires_grad_()
    TimeModel(table(4, 1.0), 1).spend(run, torch.ones(1, 8, dtype=torch.bool), "evict")[0].sum().backward()
    # Between 2 and 6 of 8 that skip the table falls by 0.4 of 2 ms.
    assert run.grad is not None
    assert run.grad.flatten().tolist() == pytest.approx([2.0 * 0.4 / 4] * 8)


def test_only_whole_layers_for_prompts_were_measured() -> None:
    model, real, run = TimeModel(table(4, 1.0), 1), torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 1, 8)
    with pytest.raises(InputError, match="`skipit bench` measures whole layers for prompts, got unit 'mlp'"):
        model.spend(run, real, "retain", unit="mlp")
    with pytest.raises(InputError, match="for prompts, got tokens after a prompt"):
        model.spend(run, real, "retain", seen=torch.ones(1))


def test_a_threshold_is_met_in_time_and_its_flops_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = build("llava")
    costs, width = CostModel.of(model), model.config.text_config.hidden_size
    with pytest.raises(InputError, match="nothing was measured of layers"):
        TimeModel.of(model)
    table(width, costs.layers[0].linear).save(bench_file(torch.device("cpu"), torch.float32, width))
    attach(model, RouterConfig(kv="evict"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "layer_gate" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    ids = torch.randint(10, 20, (4, 8))
    batches, times = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], TimeModel.of(model)
    met = meet(model, batches, costs, 0.6, "evict", times=times)
    assert met.took is not None
    assert met.took.share == measured_share(model, batches, times, "evict", met.threshold)
    assert met.took.share == pytest.approx(0.6, abs=0.05)
    assert met.flops == measured_share(model, batches, costs, "evict", met.threshold)
    assert met.flops != pytest.approx(met.took.share, abs=0.01)
    assert meet(model, batches, costs, 0.6, "evict").took is None
    assert measured_share(model, batches, times, "evict", LIMIT) == pytest.approx(0.1)
