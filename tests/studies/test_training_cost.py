"""Training is timed beside plain LoRA of the same size, on the same batch, one step of each in turn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipit.train.config import TrainConfig
from skipit.train.launch import training_arguments
from studies.shapes import SHAPES, bench_small
from studies.training_cost import OURS, PLAIN, batch_for, main, measure, measure_runs, our_trainer, plain_trainer, table


def make() -> Any:
    return bench_small(hidden=64, layers=2, image_tokens=4)


def batch(model: Any) -> dict[str, torch.Tensor]:
    return batch_for(model, rows=2, image_tokens=4, text_tokens=24)


def test_both_train_the_same_lora(tmp_path: Any) -> None:
    config, trained = TrainConfig(), []
    for build in (plain_trainer, our_trainer):
        model = make()
        made = build(model, batch(model), config, args=training_arguments(config, tmp_path))
        named = made.model.named_parameters()
        trained.append({name: p.shape for name, p in named if p.requires_grad and "layer_gate" not in name})
    assert trained[0] == trained[1]
    assert len(trained[0]) == 2 * 7 * 2


def test_measure() -> None:
    base = make()
    before = [p.clone() for p in base.parameters()]
    found = measure(base, batch(base), repeats=2)
    assert list(found) == [PLAIN, *OURS]
    assert found[PLAIN]["time_ratio"] == 1
    for row in found.values():
        assert row["tokens_per_second"] == pytest.approx(2 * 28 / row["seconds"])
        assert row["peak_mb"] > 0
    assert all(map(torch.equal, before, base.parameters())), "copies were trained"
    # Without a teacher there is nothing of a second forward pass.
    assert found["skipit, no distillation"]["peak_mb"] <= found["skipit"]["peak_mb"]


def test_table() -> None:
    plain = {"seconds": 2.0, "time_ratio": 1.0, "tokens_per_second": 50.0, "peak_mb": 100.0}
    ours = {"seconds": 2.5, "time_ratio": 1.25, "tokens_per_second": 40.0, "peak_mb": 110.0}
    assert table({PLAIN: plain, "skipit": ours}).splitlines()[-1] == "| skipit | 2.50 | 40 | 1.25x | 110 | 1.10x |"
    del plain["peak_mb"], ours["peak_mb"]
    assert table({PLAIN: plain, "skipit": ours}).splitlines()[-1] == "| skipit | 2.50 | 40 | 1.25x | - | - |"


@pytest.mark.slow
def test_runs_under_deepspeed() -> None:
    settings = {"batch_size": 2, "deepspeed": "zero2", "precision": "bf16", "gradient_checkpointing": True}
    found = measure_runs(make, batch, settings, repeats=2)
    assert list(found) == [PLAIN, *OURS]
    assert all(row["seconds"] > 0 for row in found.values())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", lambda **given: bench_small(hidden=64, **given))
    out = tmp_path / "cost.json"
    sizes = ["--layers", "2", "--image-tokens", "4", "--text-tokens", "24", "--repeats", "1", "--out", str(out)]
    main(sizes)
    assert capsys.readouterr().out.splitlines()[2].startswith("| plain LoRA | ")
    written = json.loads(out.read_text())
    assert list(written["results"]) == [PLAIN, *OURS]
    assert written["arguments"]["layers"] == 2
