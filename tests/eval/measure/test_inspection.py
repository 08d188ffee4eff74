"""`skipit inspect`: what a configuration alone says about a model agrees with the model itself, for every family."""

import copy
import json
import re
from pathlib import Path

import pytest
from families import FAMILIES, IMAGE, LAYERS, build, config
from transformers import CLIPVisionConfig, LlamaConfig, Qwen3_5Config

from skipit.cli.main import main
from skipit.eval.measure.inspection import inspect_model
from skipit.router import RouterConfig, SkipItError, UnsupportedModelError, attach, gated_layers
from skipit.router.attention import SUPPORTED
from skipit.router.checkpoint import save_gated
from skipit.router.decoder import find_decoder
from skipit.theory.cost import CostModel


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    config(family).save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    model = build(family)
    path, _, layers = find_decoder(model)
    assert (found.name, found.decoder, len(found.layers)) == (type(model).__name__, path, LAYERS)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert [layer.parameters for layer in found.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers
    ]
    costs = CostModel.of(model).layers
    assert [layer.flops_per_token for layer in found.layers] == [cost.linear for cost in costs]
    assert [layer.kv_bytes for layer in found.layers] == [cost.kv_bytes for cost in costs]
    assert IMAGE in found.vision_tokens.values()
    assert bool(FAMILIES[family].video) == any("video" in name for name in found.vision_tokens) or family in (
        "internvl",
        "smolvlm",
    )
    assert found.refused is None
    assert {name for name, gated in found.attention.items() if gated} == set(SUPPORTED)
    attach(model)
    assert [layer.gate_parameters for layer in found.layers] == [
        sum(p.numel() for p in layer.layer_gate.parameters()) for layer in gated_layers(model)
    ]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llava", ["full_attention"] * 4),
        ("gemma3", ["sliding_attention", "full_attention"] * 2),
        ("mllama", ["full_attention", "cross_attention", "full_attention", "full_attention"]),
    ],
)
def test_kinds(family: str, kinds: list[str], tmp_path: Path) -> None:
    config(family).save_pretrained(tmp_path)
    assert [layer.kind for layer in inspect_model(str(tmp_path)).layers] == kinds


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "reference", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["supported"]
    assert (said["name"], len(said["layers"])) == ("LlavaForConditionalGeneration", 12)
    assert said["totals"]["gate_parameters"] == 12 * 2 * (128 + 1)
    assert main(["inspect", "reference"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"0-11 +│ full +│ LlamaDecoderLayer", said)
    config("mllama").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "supported   yes, by its structure" in said
    assert re.search(r"\n│ 1 +│ cross +│", said)
    assert "cross: keys and values are the images', once for all tokens: 2.05k FLOPs per image state." in said
    recurrent = copy.deepcopy(config("llava"))
    recurrent.text_config.layer_types = ["linear_attention", "full_attention"] * 2
    recurrent.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "no: `LlamaModel` has linear-attention layers" in capsys.readouterr().out


def test_a_gated_checkpoint_says_its_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llava")
    attach(model, RouterConfig(kv="evict", operating_points={"0.5": 0.1}, decide_at=(0, 2)))
    save_gated(model, None, tmp_path / "out")
    found = inspect_model(str(tmp_path / "out"))
    assert found.refused is None
    assert found.router is not None
    assert (found.router["kv"], found.router["operating_points"]) == ("evict", {"0.5": 0.1})
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "K/V policy evict, decides at layers 0, 2, operating points: 0.5" in capsys.readouterr().out


def test_what_the_columns_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config("llava").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    layer = inspect_model(str(tmp_path)).layers[0]
    assert (layer.flops_if_skipped, layer.flops_per_token) == (2 * 2 * 32 * 16, 2 * (2 * 32 * 48 + 3 * 32 * 48))
    assert "under `retain` for its keys and values, 13% of running it; under `evict` none." in said
    assert f"modalities  text; vision: image_token_id {IMAGE} " in said  # one name of two that mean the same
    assert "flash_attention_2 (not with gates)" in said
    assert "cross:" not in said


def test_layers_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config("llava").save_pretrained(tmp_path)
    path = "model.vision_tower.encoder.layers"
    assert main(["inspect", str(tmp_path), "--layers", path]) == 0
    assert f"decoder     {path}, 2 layers" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--layers", "model.nowhere"]) == 1
    assert "no decoder layers at `layers='model.nowhere'`" in capsys.readouterr().err


def test_an_attention_of_another_make_says_why_gates_cannot_be(tmp_path: Path) -> None:
    hybrid = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "hidden_size": 32}
    Qwen3_5Config(text_config=hybrid).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="`Qwen3_5TextModel` has linear-attention layers; a token can be"):
        inspect_model(str(tmp_path))


def test_no_weights_are_needed_and_bytes_follow_the_dtype(tmp_path: Path) -> None:
    values = json.loads(config("llava").to_json_string())
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    half = inspect_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": "float32"}))
    assert half.dtype == "bfloat16"
    assert 2 * half.layers[0].kv_bytes == inspect_model(str(tmp_path)).layers[0].kv_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no configuration that transformers can read"),
        ("{", "has no configuration that transformers can read"),
        ("{}", "has no configuration that transformers can read"),
        ('{"model_type": "next-year"}', "has no configuration that transformers can read"),
        (LlamaConfig().to_json_string(), "is no vision-language model: `llama` has no image-text-to-text class"),
        (CLIPVisionConfig().to_json_string(), "is no vision-language model: `clip_vision_model`"),
        ('{"model_type": "llava", "vision_config": {"hidden_size": "x"}}', "'hidden_size' expected int, got str"),
    ],
)
def test_refused(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SkipItError, match=message):
        inspect_model(str(tmp_path))
    assert main(["inspect", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
