"""Models and rows that cannot be read, named by what is wrong with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import TRAIN, refused
from datasets import Dataset, DatasetDict
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from skipit.train.reference.data import reference_dataset
from studies.architecture import build_processor


def with_rows(folder: Path, change: Callable[[list[dict[str, Any]]], Any], rows: int = 8) -> Path:
    """The reference's rows with a change, as a data set on disk with two splits."""
    whole = reference_dataset("train", rows)
    values = whole.with_format("arrow")[:].to_pylist()
    changed = change(values) or values
    dataset = Dataset.from_list(changed, features=whole.features if changed[0].keys() == values[0].keys() else None)
    DatasetDict({"train": dataset, "calibration": dataset}).save_to_disk(folder)
    return folder


def break_image(number: int) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[number]["images"][0]["bytes"] = b"no picture"

    return change


def test_unknown_model(tmp_path: Path) -> None:
    said = refused("profile", "no/such-model", "reference", "--out", tmp_path / "x")
    assert said.startswith("skipit: model 'no/such-model' cannot be loaded: ")
    assert "Give a folder with config.json and safetensors weights, a Hub id, or `reference`" in said


def test_decoder_not_found(tmp_path: Path) -> None:
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=8, patch_size=4, **small),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=16, **small),
        text_config=OPTConfig(vocab_size=50, ffn_dim=16, word_embed_proj_dim=16, **small),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    build_processor().save_pretrained(tmp_path / "blip")
    said = refused("profile", tmp_path / "blip", "reference", "--out", tmp_path / "x")
    assert "no decoder layers in `Blip2ForConditionalGeneration`. Module lists found: " in said
    assert "language_model.model.decoder.layers (1 x OPTDecoderLayer)" in said


def test_unknown_data(tmp_path: Path) -> None:
    said = refused("profile", "reference", tmp_path / "no", "--out", tmp_path / "x")
    assert said.startswith(f"skipit: data '{tmp_path}/no', split 'train', cannot be read: ")
    said = refused("profile", "reference", "reference", "--split", "dev", "--out", tmp_path / "x")
    assert said == "skipit: `split`: got 'dev', expected one of train, calibration, test.\n"


def test_missing_columns(tmp_path: Path) -> None:
    data = with_rows(tmp_path / "data", lambda rows: [{"image": r["images"], "text": r["answer"]} for r in rows])
    said = refused("profile", "reference", data, "--out", tmp_path / "x")
    assert said.startswith("skipit: row 0: no column images, prompt, completion; found: image, text. Rows need images")


def test_unreadable_image_in_the_data(chain: Path, tmp_path: Path) -> None:
    data = with_rows(tmp_path / "data", break_image(5))
    said = refused("profile", "reference", data, "--batch-size", 2, "--out", tmp_path / "x")
    assert said.startswith("skipit: row 5 cannot be read: cannot identify image file")
    train = ("train", "reference", data, "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
    assert refused(*train).startswith("skipit: row 5 cannot be read: cannot identify image file")


def test_unreadable_image_met_while_training(chain: Path, tmp_path: Path) -> None:
    data = with_rows(tmp_path / "data", break_image(66), rows=67)
    line = (
        "--plan",
        chain / "plan",
        *TRAIN,
        "--steps",
        17,
        "--calibration-samples",
        4,
        "--out",
        tmp_path / "run",
    )
    assert "skipit: row 66 cannot be read: cannot identify image file" in refused("train", "reference", data, *line)


def test_images_and_placeholders_do_not_match(tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[3]["images"] *= 2

    data = with_rows(tmp_path / "data", change)
    said = refused("profile", "reference", data, "--out", tmp_path / "x")
    assert said.startswith("skipit: row 3: its prompt has 1 image parts, its `images` 2. Each image needs one part")


def test_image_token_in_the_text(chain: Path, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[2]["prompt"][0]["content"][1]["text"] = "what is <image> ?"

    data = with_rows(tmp_path / "data", change)
    said = refused("profile", "reference", data, "--out", tmp_path / "x")
    assert said.startswith("skipit: row 2: 2 image tokens, 1 images. Its text must not hold `<image>` itself.")
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "what is <image> ?")
    assert refused(*ask).startswith("skipit: the question: 2 image tokens, 1 images.")
