"""A checkpoint that is damaged or means harm is refused by file and key; nothing in it is run."""

import json
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build

from skipit.router import CheckpointError, RouterConfig, SkipItError, attach
from skipit.router.checkpoint import GATES_FILE, ROUTER_FILE, load, load_dense, save_gated

INDEX = "model.safetensors.index.json"


class Bomb:
    """A pickle of this writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def make(folder: Path, **options: Any) -> Path:
    model = build("llava")
    attach(model, RouterConfig())
    save_gated(model, processor("llava"), folder, **options)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make(tmp_path / "plain")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make(tmp_path / "shards", max_shard_size="40KB")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    return next(name for name in sorted(tensors) if name.endswith("q_proj.weight")), tensors


def refused(folder: Path, *parts: str) -> None:
    """Loading fails with one of our errors whose message has all of `parts`."""
    with pytest.raises(SkipItError) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_the_undamaged_ones_load(plain: Path, shards: Path) -> None:
    for folder in (plain, shards):
        model, loaded = load(folder)
        assert model._forward_pre_hooks
        assert type(loaded) is type(processor("llava"))
    assert len(list(shards.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, 0.999])
def test_truncated_weights(plain: Path, keep: float) -> None:
    for name in ("model.safetensors", GATES_FILE):
        whole = (plain / name).read_bytes()
        (plain / name).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        refused(plain, str(plain / name), "is not a readable safetensors file")
        (plain / name).write_bytes(whole)


def test_a_truncated_or_missing_shard(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(shards, str(shard), "is not a readable safetensors file")
    shard.unlink()
    refused(shards, str(shard), "does not exist")


def test_wrong_shapes(plain: Path) -> None:
    name, tensors = weight(plain)
    save_file(tensors | {name: torch.zeros(3, 5)}, plain / "model.safetensors", {"format": "pt"})
    refused(plain, str(plain), "layers.0.self_attn.q_proj.weight` has shape (3, 5), but config.json makes it (32, 32).")


def test_missing_and_unknown_weights(plain: Path) -> None:
    name, tensors = weight(plain)
    save_file({key: value for key, value in tensors.items() if key != name}, plain / "model.safetensors")
    refused(plain, "lacks `model.language_model.layers.0.self_attn.q_proj.weight` (1 such weights)")
    with pytest.raises(CheckpointError, match="lacks"):
        load_dense(plain)  # transformers alone would leave it random, and warn
    save_file(tensors | {"surplus": torch.zeros(2)}, plain / "model.safetensors")
    refused(plain, "has, without a place for it, `surplus` (1 such weights)")


@pytest.mark.parametrize(
    "place", ["../../x.safetensors", "/etc/passwd", "a/../b.safetensors", "..", "", "x.bin", "a\0.safetensors", 3, None]
)
def test_an_index_that_leaves_the_folder(shards: Path, place: Any) -> None:
    index = json.loads((shards / INDEX).read_text())
    key = sorted(index["weight_map"])[0]
    index["weight_map"][key] = place
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, str(shards / INDEX), f"`{key}`", f"got {place!r}, expected a .safetensors file of this folder.")


def test_an_index_that_does_not_match(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    key, place = sorted(index["weight_map"].items())[0]
    edit(shards / INDEX, weight_map=index["weight_map"] | {"surplus": place})
    refused(shards, str(shards / place), "has no `surplus`")
    edit(shards / INDEX, weight_map={k: v for k, v in index["weight_map"].items() if k != key})
    refused(shards, str(shards / place), f"has, without a line in the index, `{key}`")
    for broken in ({}, [], None, 3):
        edit(shards / INDEX, weight_map=broken)
        refused(shards, str(shards / INDEX), f"`weight_map`: got {broken!r}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(plain: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    (plain / "model.safetensors").unlink()
    (plain / name).write_bytes(pickle.dumps(Bomb(trace)))
    refused(plain, str(plain), f"It has {name}, which skipit does not read")
    (plain / "model.safetensors").write_bytes((plain / name).read_bytes())  # nor under another name
    refused(plain, str(plain / "model.safetensors"), "is not a readable safetensors file")
    (plain / GATES_FILE).write_bytes((plain / name).read_bytes())
    refused(plain, str(plain / GATES_FILE), "is not a readable safetensors file")
    assert not trace.exists()


def test_code_of_its_own_is_never_run(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    trace = tmp_path / "trace"
    (plain / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoModelForImageTextToText", "AutoImageProcessor")
    code = dict.fromkeys(names, "evil.Evil")
    for file in plain.glob("*config.json"):
        if file.name not in (ROUTER_FILE, "generation_config.json"):
            edit(file, auto_map=code)
    before = set(sys.modules)
    for options in ({}, {"trust_remote_code": True}):
        model, _ = load(plain, **options)
        assert type(model).__module__.startswith("transformers.models.llava")
    edit(plain / "config.json", model_type="evil")  # a family that only the code would know
    refused(plain, str(plain), "cannot be loaded")
    assert not trace.exists()
    assert not [name for name in set(sys.modules) - before if name.endswith("evil")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers_weights": "../x.safetensors"}, "`transformers_weights`: got '../x.safetensors'"),
        (
            {"_attn_implementation": "someone/kernel"},
            "`_attn_implementation`: got 'someone/kernel', code from elsewhere",
        ),
        ({"text_config": {"attn_implementation": "a/b@c"}}, "`text_config.attn_implementation`: got 'a/b@c'"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "`text_config.num_hidden_layers`: got 1000000000, expected at"),
    ],
)
def test_a_configuration_that_asks_for_too_much(plain: Path, changes: dict[str, Any], message: str) -> None:
    edit(plain / "config.json", **changes)
    refused(plain, str(plain / "config.json"), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "`format_version`: got 2, this skipit reads 1. Load the checkpoint with the skipit"),
        ({"format_version": True}, "`format_version`: got True"),
        ({"code": "evil"}, "unknown keys code"),
        ({"threshold": 10**400}, "threshold 'threshold': got 1000"),
        ({"operating_points": {"0.5": None}}, "threshold '0.5': got None, expected a finite number"),
        ({"layers": "model.nowhere"}, "no decoder layers at `layers='model.nowhere'`"),
        ({"layers": ""}, "no decoder layers"),
    ],
)
def test_router_settings(plain: Path, changes: dict[str, Any], message: str) -> None:
    edit(plain / ROUTER_FILE, **changes)
    refused(plain, message)


def test_settings_that_are_no_settings(plain: Path) -> None:
    for content in (
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"threshold": NaN}',
        b'{"threshold": ' + b"9" * 5000 + b"}",
    ):
        (plain / ROUTER_FILE).write_bytes(content)
        refused(plain, str(plain / ROUTER_FILE))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(shards: Path, name: str) -> None:
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a": ' + b"9" * 5000 + b"}"):
        (shards / name).write_bytes(content)
        refused(shards, str(shards / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["weight"].fill_(torch.nan), "`weight` has values that are not finite"),
        (lambda t: t["bias"].fill_(torch.inf), "`bias` has values that are not finite"),
        (lambda t: t.update(bias=t["bias"].long()), "`bias` has dtype torch.int64, expected a floating one"),
        (lambda t: t.update(bias=t["bias"].to(torch.float8_e4m3fn)), "`bias` has dtype torch.float8_e4m3fn"),
        (lambda t: t.update(weight=t["weight"][:, :, :3].clone()), "gates: got shapes (4, 2, 3) and (4, 2)"),
        (lambda t: t.update(more=t["bias"].clone()), "got tensors ['bias', 'more', 'weight']"),
    ],
)
def test_gates(plain: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    gates = load_file(plain / GATES_FILE)
    change(gates)
    save_file(gates, plain / GATES_FILE)
    refused(plain, str(plain / GATES_FILE), message)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"weight": 3}',
        b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}}',
        b'{"weight": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "F32", "shape": [9223372036854775807, 9223372036854775807], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    ],
)
def test_headers(plain: Path, header: bytes) -> None:
    for name in (GATES_FILE, "model.safetensors"):
        whole = (plain / name).read_bytes()
        for length in (len(header), 2**63, len(header) + 100):
            (plain / name).write_bytes(struct.pack("<Q", length) + header + bytes(8))
            refused(plain, str(plain / name))
        (plain / name).write_bytes(whole)


def test_our_reader_sees_what_safetensors_sees(plain: Path) -> None:
    from skipit.router.folders import read_header

    with safe_open(plain / "model.safetensors", "pt") as file:
        assert set(read_header(plain / "model.safetensors")) == set(file.keys())
    with pytest.raises(CheckpointError, match=re.escape(f"{plain / 'no'} does not exist.")):
        read_header(plain / "no")


def test_a_configuration_of_a_model_far_larger_than_its_weights(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    del config["text_config"]  # the family's default has 32 layers of 4,096
    (plain / "config.json").write_text(json.dumps(config))
    refused(plain, str(plain / "config.json"), "is of a model with", "weights, but its files hold")
