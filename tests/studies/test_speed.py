"""The speed benchmark times what it says: its FLOPs are counted, its memory adds up, its ratios are ratios."""

import json
from pathlib import Path

import pytest
import torch

from skipit.eval.measure import twin
from skipit.router.call import Call
from skipit.theory.cost import CostModel
from studies import speed as bench
from studies.shapes import bench_7b, prompt

TINY = {"layers": 4, "hidden": 64}


def test_efficiency() -> None:
    rows = bench.efficiency("small", [2], [0.5], repeats=1, **TINY)
    assert [row["name"] for row in rows] == [
        "untouched",
        "gates decide, all run",
        "budget 1, nothing is decided",
        "retain, 50% skipped",
        "evict, 50% skipped",
    ]
    untouched, attached, whole, retain, evict = rows
    assert untouched["prefill_speed_up"] == untouched["decode_speed_up"] == 1
    assert untouched["prefill_efficiency"] is attached["prefill_efficiency"] is None
    assert whole["prefill_flops_saved"] == whole["decode_flops_saved"] == 0
    assert 0.3 < retain["prefill_flops_saved"] < evict["prefill_flops_saved"] < 0.7
    for row in (retain, evict):
        for kind in ("prefill", "decode"):
            assert row[f"{kind}_saved"] == pytest.approx(1 - 1 / row[f"{kind}_speed_up"])
            assert row[f"{kind}_efficiency"] == pytest.approx(row[f"{kind}_saved"] / row[f"{kind}_flops_saved"])
    assert bench.table(rows).count("\n") == 6


def test_the_best_untouched_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "BACKEND", "eager")
    rows = {row["name"]: row for row in bench.efficiency("small", [1], [0.5], repeats=1, compiled=True, **TINY)}
    assert list(rows)[:2] == ["untouched", "untouched, compiled"]
    for name in ("gates decide, all run", "retain, 50% skipped", "evict, 50% skipped"):
        assert rows[f"{name}, compiled"]["prefill_flops_saved"] == rows[name]["prefill_flops_saved"]
    for kind in ("prefill", "decode"):
        best = max(rows[name][f"{kind}_speed_up"] for name in ("untouched", "untouched, compiled"))
        assert all(row[f"{kind}_over_best"] == row[f"{kind}_speed_up"] / best for row in rows.values())


def test_schemes_save_what_they_say() -> None:
    rows = {row["name"]: row for row in bench.schemes("small", [1], repeats=1, **TINY)}
    assert len(rows) == 11
    for name, row in rows.items():
        if name not in ("untouched", "gates decide, all run", "budget 1, nothing is decided"):
            assert 0.1 < row["prefill_flops_saved"] < 0.6, name
    assert rows["vision frozen in layers (ShortV)"]["decode_flops_saved"] == pytest.approx(0, abs=0.01)


def test_scaling_and_sizes() -> None:
    rows = bench.scaling("small", [16, 64], [2], repeats=1, **TINY)
    assert [(row["batch"], row["image_tokens"]) for row in rows[::5]] == [(1, 16), (1, 64), (2, 576)]
    with pytest.raises(ValueError, match="`image_tokens`: got 20, expected a square number"):
        prompt(20, 8, 1)


def test_memory_is_the_ideal() -> None:
    untouched, attached, *others = bench.memory("small", [0.5], **TINY)
    assert untouched["kv_bytes"] == attached["kv_bytes"] == 2 * 4 * 640 * 64 * 4
    for row in (attached, *others):
        assert row["kv_bytes"] == row["kv_ideal"]
        assert row["peak"] > row["kv_bytes"]
    retain, evict = others
    assert evict["kv_bytes"] < 0.55 * retain["kv_bytes"]
    assert evict["peak"] < untouched["peak"]
    assert "| evict, 50% skipped |" in bench.memory_table(others)


@pytest.mark.parametrize("by_row", [False, True])
def test_even_share(by_row: bool) -> None:
    batch, seq = 40, 60
    position = torch.arange(seq).expand(batch, seq)
    call = type("Call", (), {"position": position})()
    assert isinstance(Call, type)
    runs = torch.stack(
        [bench.EvenShare(0.3, by_row).decide_layer(i, torch.zeros(batch, seq, 1), call, None).run for i in range(12)]  # type: ignore[arg-type]
    )
    assert runs.float().mean() == pytest.approx(0.3, abs=0.05)
    assert (runs.float().mean((1, 2)) - 0.3).abs().max() < 0.1
    assert bool((runs == runs[:, :, :1]).all()) == by_row


def test_the_shape_of_llava_7b() -> None:
    """On the meta device: its parameters are those of the real model."""
    model = bench_7b(device="meta")
    assert model.dtype == torch.bfloat16
    assert 7.0e9 < sum(p.numel() for p in model.parameters()) < 7.1e9
    layers = CostModel.of(model).layers
    assert [layer.linear for layer in layers] == [2 * (4 * 4096**2 + 3 * 4096 * 11008)] * 32


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build = bench.SHAPES["small"]
    monkeypatch.setitem(bench.SHAPES, "small", lambda **given: build(**{**given, "hidden": 64}))
    out = tmp_path / "bench.json"
    arguments = [
        "--part",
        "efficiency",
        "memory",
        "--layers",
        "2",
        "--repeats",
        "1",
        "--shares",
        "0.5",
        "--no-compiled",
    ]
    bench.main([*arguments, "--out", str(out)])
    written = json.loads(out.read_text())
    assert len(written["efficiency"]) == 5
    assert len(written["memory"]) == 4
    assert "versions" in written["made_by"]
    assert "K/V MB" in capsys.readouterr().out
