"""The GPU script: it runs from a checkout as it is, measures rows of every kind, and loses nothing when cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studies.rows import Report
from studies.shapes import bench_qwen

ROOT = Path(__file__).parents[2]


def test_the_script(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": path}
    options = ["--device", "cpu", "--tiny", "--minutes", "6", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(
        [ROOT / "scripts" / "bench_gpu", *options],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = found["rows"]
    assert [row for row in rows if "failed" in row] == []
    assert found["device"] == "cpu"
    laws = [row for row in rows if row["kind"] == "law"]
    assert len(laws) == 24
    assert all(row["holds"] for row in laws)
    assert {row["kind"] for row in rows} == {"law", "counts", "speed", "answer", "training step"}
    assert {row["shape"] for row in rows if row["kind"] == "speed"} == {"LLaVA-1.5-7B", "Qwen2.5-VL-7B"}
    dense, evict = (
        next(row for row in rows if row["kind"] == "speed" and row["model"] == name)
        for name in ("dense", "evict, 25% run")
    )
    assert evict["prefill_flops"] == pytest.approx(0.25, abs=0.03)
    assert dense["prefill_flops"] == 1
    assert evict["peak_mb"] < dense["peak_mb"]
    assert all(row["gates_learn"] for row in rows if row["kind"] == "training step")
    for shape in ("LLaVA-1.5-7B", "Qwen2.5-VL-7B"):
        reads = [row["reads"] for row in rows if row["kind"] == "counts" and row["shape"] == shape]
        assert [more - reads[i % 2] for i, more in enumerate(reads)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert "| evict, 25% run |" in done.stdout


def test_it_needs_torch_and_transformers_alone() -> None:
    others = ("peft", "datasets", "torchmetrics", "scipy", "accelerate", "jaxtyping", "sklearn", "matplotlib", "rich")
    code = (
        "import sys, importlib.util as u\n"
        f"for name in {others!r}: sys.modules[name] = None\n"
        f"spec = u.spec_from_file_location('jaxtyping', {str(ROOT / 'router' / 'shapes.py')!r})\n"
        "sys.modules['jaxtyping'] = stub = u.module_from_spec(spec); spec.loader.exec_module(stub)\n"
        "import studies.gpu"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_rows_are_kept_named_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    report = Report(file, minutes=10)

    def fails() -> dict[str, float]:
        raise RuntimeError("out of memory")

    report.add(lambda: {"ms": 1.0}, kind="a", model="dense")
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1.0]
    report.add(fails, kind="a", model="large")
    report.add(lambda: {"ms": 2.0}, by=0.0, kind="a", model="late")
    assert json.loads(file.read_text())["rows"][1:] == [
        {"kind": "a", "model": "large", "failed": "RuntimeError: out of memory"},
        {"kind": "a", "model": "late", "left_out": "no time"},
    ]
    assert report.tables().split("\n\n")[0] == "| model | ms |\n|---|---:|\n| dense | 1 |"
    late = Report(file, minutes=0)
    late.add(fails, kind="a", model="other")
    assert late.rows[1:] == [{"kind": "a", "model": "other", "left_out": "no time"}]


def test_another_run_goes_on_with_the_rows_that_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    before = Report(file, minutes=10, device="one")
    before.add(lambda: {"ms": 1.0}, kind="a", model="dense")
    before.add(lambda: {"ms": 2.0}, by=0.0, kind="a", model="late")
    after = Report(file, minutes=10, device="one")
    after.add(lambda: {"ms": 9.0}, kind="a", model="dense")
    after.add(lambda: {"ms": 3.0}, kind="a", model="late")
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1.0, 3.0]
    with pytest.raises(ValueError, match="`device` is 'one' there, here 'another'"):
        Report(file, minutes=10, device="another")


def test_the_shape_of_qwen_7b() -> None:
    """On the meta device: its parameters are those of the real model."""
    model = bench_qwen(device="meta")
    assert model.dtype == torch.bfloat16
    assert 8.28e9 < sum(p.numel() for p in model.parameters()) < 8.30e9
