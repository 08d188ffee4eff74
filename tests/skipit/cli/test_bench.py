"""`skipit bench`: what it prints, and where the router finds it."""

from pathlib import Path

import pytest
import torch
from command_line import refused, skipit

from skipit.router.measured import bench_file, packing_pays
from skipit.theory.layer_times import load_times


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    done = skipit("bench", "reference", "--tokens", 12, "--seconds", 0.1)
    assert done.code == 0, done.err
    path = bench_file(torch.device("cpu"), torch.float32, 128)
    times = load_times(path)
    packing_pays.cache_clear()
    assert packing_pays(torch.device("cpu"), torch.float32, 128) == times.packing_pays
    packing_pays.cache_clear()
    assert f"{times.dense[12]:.3f} ms" in done.out
    assert all(f"{row.ms:.3f} ms  {row.relative:.2f}" in done.out for row in times.rows)
    step = times.steps[12]
    assert all(f"{step.ms * x:.3f} ms  {x:.2f}" in done.out for x in (step.entered, step.left_out))
    assert f"{path}: the router reads from it that packing must save" in done.out


def test_refused() -> None:
    assert "got '0', expected a whole number, at least 1" in refused("bench", "reference", "--tokens", 0, code=2)
    if not torch.cuda.is_available():
        assert "--device: got cuda, but PyTorch finds no GPU." in refused("bench", "--device", "cuda")
