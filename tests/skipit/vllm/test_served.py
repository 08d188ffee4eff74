"""What is read of a checkpoint before vLLM runs it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModel

import skipit
from skipit.router import RouterConfig, RouterConfigError, UnsupportedModelError
from skipit.theory.cost import CostModel
from skipit.vllm.served import is_gated, served


def save(family: str, folder: Path, **settings: Any) -> str:
    model = families.build(family)
    skipit.attach(model, RouterConfig(**settings))
    skipit.save_gated(model, families.processor(family), folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_a_checkpoint_that_can_be_served(tmp_path: Path, family: str) -> None:
    folder = save(family, tmp_path / "checkpoint", unit="mlp")
    assert is_gated(folder)
    router = served(folder)
    assert router.config.unit == "mlp"
    assert router.gates["weight"].shape == (families.LAYERS, 2, families.WIDTH)
    assert router.costs == CostModel.of(families.build(family)).layers
    assert router.architectures == json.loads((tmp_path / "checkpoint" / "config.json").read_text())["architectures"]
    # vLLM's transformers backend makes the model without its head.
    with torch.device("meta"):
        layers = AutoModel.from_config(families.config(family)).get_submodule(router.layers)
    assert len(layers) == families.LAYERS
    assert router.parts == ("self_attn", "mlp")
    assert all(isinstance(layer.get_submodule(part), torch.nn.Module) for layer in layers for part in router.parts)


def test_what_has_no_router_is_served_as_ever(tmp_path: Path) -> None:
    families.build("llava").save_pretrained(tmp_path)
    assert not is_gated(str(tmp_path))
    assert not is_gated("someone/of-whom-nothing-is-cached")


def test_settings_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match="`kv`: got 'evict'"):
        served(save("llava", tmp_path / "checkpoint", kv="evict"))


def test_images_that_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"attends to images that are not among its tokens, in layers \[1\]"
    ):
        served(save("mllama", tmp_path / "checkpoint"))


def test_experts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has experts, with which gates were not tried under vLLM"):
        served(save("qwen3-vl-moe", tmp_path / "checkpoint"))
