"""What an engine that is not transformers reads of a gated checkpoint: the dense model, whole, and nothing else.

vLLM 0.32 (`DefaultModelLoader._prepare_weights`) and SGLang, whose loader comes from it, take every *.safetensors at
the top of a folder, or those of them that an index names, and refuse a name that their model has no place for.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_standalone import ROW
from tiny_models import FAMILIES, build, inputs
from tiny_run import make_all
from torch import Tensor
from transformers import AutoConfig

from skipit.router import RouterConfig, attach, gate_state, set_gates
from skipit.router.checkpoint import GATES_FILE, ROUTER_FILE, save_gated
from skipit.router.files import INDEX
from skipit.router.standalone import CODE

FORMS = [(dtype, shards) for dtype in (torch.float32, torch.bfloat16) for shards in ("50GB", "20KB")]


def weights_read(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder as engines read them."""
    files = set(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        named = {folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
        assert named <= files, "vLLM: Weight files referenced in index but missing"
        files = named
    parts = [load_file(file) for file in sorted(files)]
    weights = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(weights) == sum(map(len, parts))
    return weights


def load_strictly(folder: Path, kind: Any) -> tuple[Any, dict[str, Any]]:
    """The model that an engine's own class makes of these weights, and which of them fit nowhere or are lacking."""
    config = AutoConfig.from_pretrained(folder)
    model, info = kind.from_pretrained(None, config=config, state_dict=weights_read(folder), output_loading_info=True)
    return model.eval(), {what: names for what, names in info.items() if names}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("dtype", "shards"), FORMS, ids=lambda value: str(value).removeprefix("torch."))
def test_an_engine_finds_what_the_untouched_class_writes(
    family: str, dtype: torch.dtype, shards: str, tmp_path: Path
) -> None:
    plain, gated = tmp_path / "plain", tmp_path / "gated"
    model = build(family).to(dtype)
    kind: Any = type(model)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(family, ROW).items()}
    model.save_pretrained(plain, max_shard_size=shards)
    attach(model, RouterConfig(kv="evict"))
    set_gates(model, **{name: torch.randn_like(value) for name, value in gate_state(model).items()})
    save_gated(model, None, gated, max_shard_size=shards)

    assert {path.name for path in gated.iterdir()} == {
        *(path.name for path in plain.iterdir()),
        *(ROUTER_FILE, CODE, Path(GATES_FILE).parts[0]),
    }
    assert (plain / INDEX).exists() == (shards == "20KB")
    for path in sorted(plain.iterdir()):
        if path.suffix == ".safetensors":
            ours, theirs = load_file(gated / path.name), load_file(path)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in theirs)
        else:
            ours = json.loads((gated / path.name).read_text())
            assert {name: value for name, value in ours.items() if name != "auto_map"} == json.loads(path.read_text())

    loaded, wrong = load_strictly(gated, kind)
    assert not wrong
    assert torch.equal(loaded(**batch).logits, kind.from_pretrained(plain)(**batch).logits)
    # What format version 2 did, no engine could load; an index hid it.
    shutil.copyfile(gated / GATES_FILE, gated / "gates.safetensors")
    _, wrong = load_strictly(gated, kind)
    assert wrong == ({} if shards == "20KB" else {"unexpected_keys": {"bias", "weight"}})


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = build("gemma3")
    assert model.config.get_text_config().tie_word_embeddings
    attach(model)
    save_gated(model, None, tmp_path / "gated")
    assert len(weights_read(tmp_path / "gated")) == len(dict(build("gemma3").named_parameters()))


def test_a_trained_checkpoint_has_the_names_of_its_base(tmp_path: Path) -> None:
    made = make_all(tmp_path)
    ours, theirs = weights_read(made.merged), weights_read(made.base)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not load_strictly(made.merged, type(build("llava")))[1]
    # PEFT's loaders, and those of engines, read these two files of an adapter.
    assert {path.name for path in made.adapter.glob("*.safetensors")} == {"adapter_model.safetensors"}
