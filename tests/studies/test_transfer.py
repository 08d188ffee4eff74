import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipit.eval.report.sweeps import load_transfer
from skipit.train.reference.data import reference_dataset
from studies import study, transfer
from studies.transfer import SHIFTS, main, moved, noisy, shifted, summary, table

RNG = np.random.default_rng


def image() -> Any:
    return np.asarray(reference_dataset("test", 1)[0]["images"][0])


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_changes_pixels_and_nothing_else_and_is_the_same_again(name: str) -> None:
    rows = list(reference_dataset("test", 2))
    first, again, other = (shifted(rows, SHIFTS[name], seed) for seed in (0, 0, 1))
    for row, new, same in zip(rows, first, again, strict=True):
        pixels = np.asarray(new["images"][0])
        assert pixels.shape == (48, 48, 3)
        assert pixels.dtype == np.uint8
        assert not np.array_equal(pixels, np.asarray(row["images"][0]))
        assert np.array_equal(pixels, np.asarray(same["images"][0]))
        assert {k: v for k, v in new.items() if k != "images"} == {k: v for k, v in row.items() if k != "images"}
    random = name.startswith(("noise", "digits"))
    assert random != np.array_equal(np.asarray(first[0]["images"][0]), np.asarray(other[0]["images"][0]))


def test_a_shift_of_strength_zero_is_none() -> None:
    assert np.array_equal(noisy(0.0, image(), RNG(0)), image())
    assert np.array_equal(moved(0, image(), RNG(0)), image())
    assert np.array_equal(transfer.turned(0.0, image(), RNG(0)), image())
    assert np.array_equal(transfer.paler(1.0, image(), RNG(0)), image())


def test_digits_stay_in_their_cells() -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[16:32, 16:32] = 255
    out = moved(3, pixels, RNG(0))
    assert out.sum() <= pixels.sum()
    assert out[:16].sum() == out[32:].sum() == out[:, :16].sum() == 0


def test_a_study_trains_twice_is_done_once_and_ends_in_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: SHIFTS[name] for name in ("noise, sigma 80",)}
    monkeypatch.setattr(transfer, "SHIFTS", few)
    seen: list[set[str]] = []
    real = study.train

    def watched(model: Any, processor: Any, dataset: Any, *rest: Any, **more: Any) -> Any:
        seen.append(set(dataset["kind"]) | set(more["calibration"]["kind"]))
        return real(model, processor, dataset, *rest, **more)

    monkeypatch.setattr(study, "train", watched)
    arguments = ["--out", str(tmp_path), "--steps", "2", "--rows", "12", "--calibration", "6", "--profiled", "6"]
    arguments += ["--batch-size", "3"]
    main(arguments)
    assert seen == [{"cell", "grid", "sum"}, {"cell", "row", "grid", "compare", "sum", "count"}]
    main(arguments)
    assert len(seen) == 2
    written = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert set(written["types"]) == {"cell", "row", "grid", "compare", "sum", "count"}
    assert set(written["shifts"]) == {"none", "noise, sigma 80"}
    for by in (*written["types"].values(), *written["shifts"].values()):
        assert by["dense"] == {**by["dense"], "of_dense": 1.0, "same": 1.0, "compute": 1.0}
        for system in ("trained on cell, grid, sum", "trained on all"):
            assert by[system]["compute"] == pytest.approx(0.5, abs=0.1)
    shown = capsys.readouterr().out
    assert "| **row** (new) |" in shown
    assert "| cell |" in shown
    # A cell that is lost is made again from the finished run, without training.
    next((tmp_path / "cells").glob("cell-grid-sum_0_*.json")).unlink()
    main(arguments)
    assert len(seen) == 2
    # Other test rows are measured anew, of the same trainings; other steps are other trainings.
    main([*arguments, "--rows", "13"])
    assert len(seen) == 2
    assert len(list((tmp_path / "cells").iterdir())) == 6
    told = load_transfer(tmp_path)["figures"]["shifts"]["none"]["trained on all"]["difference"]
    assert told["rows"] == 13
    results = json.loads(next((tmp_path / "cells").glob("dense_*.json")).read_text())["results"]
    folders: list[Path] = []
    monkeypatch.setattr(transfer, "measure", lambda *given: folders.append(given[-1]) or results)
    main([*arguments, "--steps", "3"])
    assert len(folders) == 3
    assert not any(folder.exists() for folder in folders)


def _cell(system: str, seed: int, right: list[bool], answers: list[list[int]], compute: float) -> dict[str, Any]:
    found = {"right": right, "answers": answers, "compute": compute}
    return {"system": system, "seed": seed, "results": {"types": {"cell": found}, "shifts": {"none": found}}}


def test_the_summary_is_relative_to_the_dense_model_of_the_same_seed() -> None:
    cells = [
        _cell("dense", 0, [True, True], [[1], [2]], 1.0),
        _cell("dense", 1, [True, False], [[1], [2]], 1.0),
        _cell("gated", 0, [True, False], [[1], [3]], 0.4),
        _cell("gated", 1, [True, False], [[1], [2]], 0.6),
    ]
    found = summary(cells)["types"]["cell"]
    assert found["gated"] == {"accuracy": 0.5, "of_dense": 0.75, "same": 0.75, "compute": 0.5}
    assert "| cell | 75.0% | 50.0% | 75.0% | 50.0% |" in table(summary(cells), ["cell"])
