"""A gated checkpoint that is damaged is refused by the name of its file, and nothing stays half-loaded."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build, inputs

from skipit.router import CheckpointError, RouterConfig, RouterConfigError, attach, find_router, gate_state, set_gates
from skipit.router.checkpoint import GATES_FILE, ROUTER_FILE, attach_from, load, load_dense, save_gated, save_router
from skipit.router.folders import save_tensors
from skipit.router.subclass import own_class

GOOD = {"weight": torch.randn(4, 2, 32), "bias": torch.randn(4, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "checkpoint"
    out.mkdir()
    save_router(out, RouterConfig(kv="evict", threshold=0.5), GOOD)
    return out


def test_round_trip(folder: Path) -> None:
    model = attach_from(build("llava"), folder)
    assert find_router(model)[1].config == RouterConfig(kv="evict", threshold=0.5)
    assert all(torch.equal(gate_state(model)[name], value) for name, value in GOOD.items())


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / ROUTER_FILE).read_text()) | changes
        (folder / ROUTER_FILE).write_text(json.dumps(values))

    return edit


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (
            lambda f: (f / ROUTER_FILE).unlink(),
            "",
            f"has no {ROUTER_FILE}: it is not a gated checkpoint. Make one with",
        ),
        (lambda f: (f / ROUTER_FILE).write_text("{"), ROUTER_FILE, ""),
        (_edit(kv="drop"), ROUTER_FILE, "`kv`: got 'drop'"),
        (_edit(speed=1), ROUTER_FILE, "unknown keys speed"),
        (lambda f: (f / GATES_FILE).unlink(), GATES_FILE, "does not exist"),
        (lambda f: (f / GATES_FILE).write_bytes(b"xx"), GATES_FILE, "is not a readable safetensors file"),
        (
            lambda f: save_tensors(f / GATES_FILE, {"weight": GOOD["weight"]}),
            GATES_FILE,
            "got tensors ['weight'], expected bias and weight.",
        ),
        (
            lambda f: save_tensors(f / GATES_FILE, GOOD | {"bias": torch.full((4, 2), torch.nan)}),
            GATES_FILE,
            "`bias` has values that are not finite.",
        ),
        (
            lambda f: save_tensors(f / GATES_FILE, GOOD | {"bias": torch.zeros(5, 2)}),
            GATES_FILE,
            "gates: got shapes (4, 2, 32) and (5, 2), this model needs (4, 2, 32) and (4, 2).",
        ),
    ],
)
def test_damage(damage: Callable[[Path], object], file: str, message: str, folder: Path) -> None:
    damage(folder)
    model = build("llava")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((CheckpointError, RouterConfigError)) as caught:
        attach_from(model, folder)
    assert str(folder / file) in str(caught.value)
    assert re.search(re.escape(message), str(caught.value))
    # The model is clean, and takes gates as if nothing had been tried.
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not model._forward_pre_hooks
    attach(model)


def test_a_broken_router_is_found_before_the_weights_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.router.checkpoint.load_dense", lambda *_, **__: pytest.fail("loaded the weights"))
    (folder / GATES_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{GATES_FILE} does not exist"):
        load(folder)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"model '.*nowhere' cannot be loaded: (.|\n)*Give a folder with config.json"
    ):
        load_dense(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        load_dense(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_dense(tmp_path)


def test_a_save_that_fails_leaves_the_model_gated_and_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7]])
    attach(model, RouterConfig(kv="evict"))
    set_gates(model, **GOOD)
    expected = model(**batch).logits
    save_gated(model, None, tmp_path / "out", card="first")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    # Of the family's own class: the one that a gated model has is taken off while it is saved.
    monkeypatch.setattr(own_class(type(model)), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_gated(model, None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(CheckpointError, match=r"exists. Choose another --out"):
        save_gated(model, None, tmp_path / "out")
