"""A gated checkpoint without skipit: gated where its own code is trusted, dense and silent where it is not."""

import ast
import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import bare_python, bare_variables
from families import config, processor
from safetensors.torch import load_file, save_file
from tiny_models import build, inputs
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    LlavaConfig,
)

import skipit
from skipit.router import CheckpointError, RouterConfig, Trace, attach, find_router, gate_state, running, set_gates
from skipit.router.checkpoint import GATES_FILE, attach_from, load, load_dense, save_gated
from skipit.router.standalone import CODE, code_files

ROW = [[5, 6, "image", 7, 8, 9]]


def make(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, *, with_processor: bool = False, **options: Any
) -> Any:
    """Write a gated checkpoint whose gates run about half of the tokens, and its inputs; gives the model."""
    model = build(family).to(dtype)
    attach(model, RouterConfig(kv="evict", operating_points={"none": 100.0}))
    set_gates(model, **{name: torch.randn_like(value) for name, value in gate_state(model).items()})
    save_gated(model, processor(family) if with_processor else None, folder, **options)
    batch = inputs(family, ROW)
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}, folder / "inputs.safetensors")
    return model


def generate(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """What the worker prints about a checkpoint."""
    trace = Trace()
    batch = load_file(folder / "inputs.safetensors")
    with running(trace=trace):
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False, **options)
    return {"tokens": tokens.tolist(), "ran": [int(step.run.sum()) for step in trace.steps]}


def run_without_skipit(folders: list[Path], tmp_path: Path) -> list[dict[str, Any]]:
    """Run the worker in a virtual environment that has no skipit."""
    worker = Path(__file__).with_name("standalone_worker.py")
    done = subprocess.run(
        [bare_python(tmp_path / "venv"), "-P", worker, *folders],  # -P: tests/skipit is none
        env=bare_variables(HF_MODULES_CACHE=str(tmp_path / "modules")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_code_inside_runs_the_gated_model_where_skipit_is_not_installed(tmp_path: Path) -> None:
    plain, shards = tmp_path / "plain", tmp_path / "v1.2-shards"
    make("llava", plain, with_processor=True)
    # Gemma 3 ties its output to its embeddings.
    tied = make("gemma3", shards, torch.bfloat16, with_processor=True, max_shard_size="20KB")
    assert tied.config.get_text_config().tie_word_embeddings
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    results = run_without_skipit([plain, shards], tmp_path)
    for folder, result in zip((plain, shards), results, strict=True):
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        assert result["class"] == f"{type(loaded).__module__}.{type(loaded).__name__}"
        assert result["code"].startswith("transformers_modules.")
        expected = generate(load(folder)[0], folder)
        assert {name: result[name] for name in expected} == expected
        at_none = generate(load(folder)[0], folder, budget="none")
        assert result["by_budget"] == result["by_config"] == result["at_load"] == at_none != expected
        assert len(result["ran"]) == 5
        assert 0 < sum(result["ran"]) < 4 * (len(result["tokens"][0]) - 1)  # something ran, something was skipped
    assert [result["dtype"] for result in results] == ["torch.float32", "torch.bfloat16"]


@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("kind", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_without_trust_it_is_the_dense_model_and_nothing_is_asked_or_said(
    kind: Any, trust: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = make("llava", tmp_path / "out")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        options = {} if trust is None else {"trust_remote_code": trust}
        dense, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    finally:
        logger.removeHandler(handler)
    assert not said
    assert not any(info.values()), info
    assert not dense._forward_pre_hooks
    assert not any("layer_gate" in name for name in dense.state_dict())
    with running(mode="dense"):
        expected = generate(gated, tmp_path / "out")["tokens"]
    assert generate(dense, tmp_path / "out")["tokens"] == expected


@pytest.mark.parametrize("kind", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_with_trust_both_auto_classes_give_the_gated_model(kind: Any, tmp_path: Path) -> None:
    gated = make("qwen2.5-vl", tmp_path / "out")
    model, info = kind.from_pretrained(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is type(gated)
    assert model._forward_pre_hooks
    assert generate(model, tmp_path / "out")["tokens"] == generate(gated, tmp_path / "out")["tokens"]
    fresh = kind.from_config(AutoConfig.from_pretrained(tmp_path / "out"), trust_remote_code=True)
    assert type(fresh) is type(gated)
    assert fresh._forward_pre_hooks


def test_where_skipit_is_installed_it_reaches_the_trusted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = make("llava", tmp_path / "out")
    with running(mode="dense"):
        dense = generate(gated, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch = load_file(tmp_path / "out" / "inputs.safetensors")
    _, trace = skipit.generate(model, return_trace=True, max_new_tokens=2, **batch)
    assert 0 < trace.share < 1
    with running(mode="dense"):
        assert generate(model, tmp_path / "out") == dense
    # One that reads an older format alone is left alone.
    monkeypatch.setattr("skipit.router.config.FORMAT_VERSION", 1)
    copied = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = generate(gated, tmp_path / "out")["tokens"]
    with running(mode="dense"):
        assert generate(copied, tmp_path / "out")["tokens"] == expected != dense["tokens"]
    (router,) = [hook for hook in copied._forward_pre_hooks.values() if hasattr(hook, "config")]
    assert type(router).__module__.startswith("transformers_modules.")


def test_a_dense_copy_can_be_saved_and_gated_again(tmp_path: Path) -> None:
    make("llava", tmp_path / "out")
    dense, _ = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    assert not again._forward_pre_hooks
    attach(again)
    save_gated(again, None, tmp_path / "again")
    gated = attach_from(AutoModelForImageTextToText.from_pretrained(tmp_path / "again"), tmp_path / "again")
    assert find_router(gated)[1].config == RouterConfig()


def test_trusted_code_refuses_damaged_gates(tmp_path: Path) -> None:
    make("llava", tmp_path / "out")
    (tmp_path / "out" / GATES_FILE).write_bytes(b"xx")
    with pytest.raises(Exception, match="is not a readable safetensors file") as caught:
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(caught.value).__name__ == "CheckpointError"


def test_the_code_is_the_routers_own_and_needs_only_torch_and_transformers(tmp_path: Path) -> None:
    make("llava", tmp_path / "out")
    code = tmp_path / "out" / CODE
    assert sorted(path.name for path in code.iterdir()) == [path.name for path in code_files()]
    for file in code_files():
        copied, own = (code / file.name).read_text(), file.read_text()
        assert copied == own.replace("from jaxtyping import", "from .shapes import")
        for node in ast.walk(ast.parse(copied)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1  # what transformers does not follow it would not copy
                names = [str(node.module)] if node.level == 0 else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("torch", "transformers", "safetensors"), (file, name)


def test_what_is_neither_a_folder_nor_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder\."):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no/where: no such file or folder\. router_config\.json cannot be had"):
        load("no/where")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_dense(tmp_path)


def wide() -> Any:
    """The tiny LLaVA with widths that 64 divides, as the 4-bit kernels of bitsandbytes want them."""
    values = config("llava").to_dict()
    values["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    values["vision_config"] |= {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    return AutoModelForImageTextToText.from_config(LlavaConfig.from_dict(values)).eval()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_or_a_clear_error(bits: str, tmp_path: Path) -> None:
    model = wide()
    attach(model, RouterConfig(kv="evict"))
    set_gates(model, **{name: torch.randn_like(value) for name, value in gate_state(model).items()})
    save_gated(model, processor("llava"), tmp_path / "out")
    save_file(inputs("llava", ROW), tmp_path / "out" / "inputs.safetensors")
    options = {"quantization_config": BitsAndBytesConfig(**{bits: True})}
    if find_spec("bitsandbytes") is None:
        with pytest.raises(CheckpointError, match="bitsandbytes"):
            load(tmp_path / "out", **options)
        return
    model, _ = load(tmp_path / "out", **options)
    save_gated(model, processor("llava"), tmp_path / "again")  # before it runs: bitsandbytes then packs weights anew
    expected = generate(model, tmp_path / "out")
    assert 0 < sum(expected["ran"]) < 4 * (len(expected["tokens"][0]) - 1)
    assert generate(load(tmp_path / "again")[0], tmp_path / "out") == expected
