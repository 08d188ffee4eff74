"""A gated checkpoint that is damaged is refused by the name of its file, and nothing stays half-loaded."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder\. Did you mean .*/somewhere\?"):
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
    with pytest.raises(CheckpointError, match="out cannot be written: disk full"):
        save_gated(model, None, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(CheckpointError, match=r"exists. Choose another --out"):
        save_gated(model, None, tmp_path / "out")


def test_saving_during_training_changes_nothing(tmp_path: Path) -> None:
    """An optimizer holds the gates, so they have to stay the very same parameters."""
    found = []
    for saves in (False, True):
        model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7]])
        attach(model, RouterConfig(kv="evict"))
        set_gates(model, **GOOD)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(2):
            before = dict(model.named_parameters())
            if saves:
                save_gated(model, None, tmp_path / "out", overwrite=True)
                assert all(parameter is before[name] for name, parameter in model.named_parameters())
                assert model.training
            optimizer.zero_grad()
            model(**batch).logits.square().mean().backward()
            optimizer.step()
        found.append(model.state_dict())
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_a_state_dict_is_loaded_strictly() -> None:
    models = [build("llava", seed=seed) for seed in (0, 1)]
    for model in models:
        attach(model)
    set_gates(models[0], **GOOD)
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    batch = inputs("llava", [[5, "image", 6, 7]])
    assert torch.equal(models[1](**batch).logits, models[0](**batch).logits)


@pytest.mark.parametrize("where", ["some", "all"])
def test_layers_that_are_offloaded(where: str, tmp_path: Path) -> None:
    from families import processor

    model, batch = build("llava"), inputs("llava", [[5, "image", 6, 7]])
    attach(model, RouterConfig(kv="evict"))
    set_gates(model, **GOOD)
    save_gated(model, processor("llava"), tmp_path / "one")
    on_disk = {"": "disk"}
    if where == "some":
        parts = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.norm")
        on_disk = {f"model.{part}": "cpu" for part in (*parts, "language_model.rotary_emb")} | {"lm_head": "cpu"}
        on_disk |= {f"model.language_model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    loaded, found = load(tmp_path / "one", device_map=on_disk, offload_folder=str(tmp_path / "offload"))
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, wanted)
        save_gated(loaded, found, tmp_path / "two")
        assert torch.equal(load(tmp_path / "two")[0](**batch).logits, wanted)
    path, damaged = tmp_path / "one" / "model.safetensors", "model.language_model.layers.3.mlp.up_proj.weight"
    weights = load_file(path)
    weights[next(name for name in weights if name.endswith("layers.3.mlp.up_proj.weight"))][0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"`{damaged}` has values that are not finite"):
        load(tmp_path / "one", device_map=on_disk, offload_folder=str(tmp_path / "offload"))


def test_offloaded_after_the_gates_were_attached(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    batch = inputs("llava", [[5, "image", 6, 7]])
    for name, offload in (
        ("cpu", lambda model: cpu_offload(model, torch.device("cpu"))),
        ("disk", lambda model: disk_offload(model, str(tmp_path / "disk"), torch.device("cpu"))),
        ("map", lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True)),
    ):
        model = build("llava")
        attach(model, RouterConfig(kv="evict"))
        set_gates(model, **GOOD)
        with torch.no_grad():
            wanted = model(**batch).logits
            offload(model)
            assert torch.equal(model(**batch).logits, wanted), name


def test_a_model_that_another_process_unpickles(tmp_path: Path) -> None:
    model, batch = build("llava"), inputs("llava", [[5, 6, 7, 8], [9, 10]])  # images fail without gates, too
    attach(model, RouterConfig(kv="evict"))
    set_gates(model, **GOOD)
    torch.save({"model": model, "batch": batch}, tmp_path / "model.pt")
    wanted = model(**batch).logits
    code = (
        "import sys, torch; held = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(held['model'](**held['batch']).logits.detach(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "model.pt"), wanted.detach(), rtol=1e-5, atol=1e-5)
