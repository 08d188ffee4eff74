"""What the router reads of `skipit bench`: where it lies, and what it changes."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from tiny_models import ROWS

from skipit.router import attach, layer, running
from skipit.router.measured import PACKING_PAYS, bench_file, cache_folder, packing_pays
from skipit.router.policies import FixedUnits

CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path))
    packing_pays.cache_clear()
    yield tmp_path
    packing_pays.cache_clear()


def put(text: str, hidden: int = 64) -> None:
    path = bench_file(CPU, torch.float32, hidden)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("SKIPIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/skipit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/skipit")
    monkeypatch.setenv("SKIPIT_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_a_file_per_device_dtype_and_width(here: Path) -> None:
    files = {bench_file(CPU, dtype, hidden) for dtype in (torch.float32, torch.bfloat16) for hidden in (64, 128)}
    assert len(files) == 4
    assert all(path.parent == here / "bench" and "1-threads" in path.name for path in files)


@pytest.mark.parametrize(("pays", "whole"), [(0, 0), (1e18, 1)])
def test_a_measured_table_changes_the_route_and_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, pays: float, whole: int
) -> None:
    model, batch = build("llava"), inputs("llava", ROWS)
    attach(model)
    width = model.config.get_text_config().hidden_size
    run = torch.ones(model.config.get_text_config().num_hidden_layers, 2, dtype=torch.bool)
    run[1, 1] = False
    put(json.dumps({"packing_pays": pays}), width)
    calls: list[Any] = []
    original = layer.whole
    monkeypatch.setattr(layer, "whole", lambda *given: calls.append(given) or original(*given))

    def logits(**options: Any) -> torch.Tensor:
        with torch.no_grad(), running(policy=FixedUnits(run), kv="retain", **options):
            return model(**batch).logits

    found = logits()
    assert len(calls) == whole
    torch.testing.assert_close(found, logits(route="packed" if whole else "whole"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"packing_pays": "many"}', '{"packing_pays": -1}', '{"packing_pays": 1e999}', "\xff{"]
)
def test_a_damaged_file_is_warned_of_once_and_counts_as_none(here: Path, text: str) -> None:
    put(text)
    with pytest.warns(UserWarning, match=r"bench.*float32_64\.json.*A default is used; `skipit bench MODEL`"):
        assert packing_pays(CPU, torch.float32, 64) == PACKING_PAYS["cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packing_pays(CPU, torch.float32, 64) == PACKING_PAYS["cpu"]


def test_nothing_was_measured(here: Path) -> None:
    assert packing_pays(CPU, torch.float32, 64) == PACKING_PAYS["cpu"]
    assert packing_pays(torch.device("meta"), torch.float32, 64) == PACKING_PAYS["cuda"]
