"""The shipped weights: plain transformers loads them, they are small, and they answer what they promise to."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.questions import KINDS
from studies.architecture import build_processor
from studies.pretrain.training import exact_match

AIMS = {"cell": 0.96, "row": 0.96, "compare": 0.96, "grid": 0.92, "sum": 0.90, "count": 0.75}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, dict[str, Any]]:
    model, info = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, output_loading_info=True)
    return model.eval(), AutoProcessor.from_pretrained(WEIGHTS), info


def test_they_are_shipped_small_and_without_pickle() -> None:
    shipped = {Path(str(file)).name for file in files("skipit.train.reference").joinpath("weights").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= shipped
    assert {Path(name).suffix for name in shipped} <= {".json", ".safetensors", ".md", ".jinja"}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 10e6


def test_plain_transformers_loads_them(loaded: tuple[Any, Any, dict[str, Any]]) -> None:
    model, processor, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert len(model.get_decoder().layers) >= 12
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert processor.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert processor.chat_template == build_processor().chat_template


@torch.no_grad()
def test_it_answers_questions_about_held_out_scans(loaded: tuple[Any, Any, dict[str, Any]]) -> None:
    model, processor, _ = loaded
    rows = list(reference_dataset("test", 60))
    prompts = [processor.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    images = [row["images"] for row in rows]
    batch = processor(images=images, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**batch, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / len(rows) >= 0.9, dict(zip([row["kind"] for row in rows], right, strict=True))


def test_the_card_says_how_good_and_how_made() -> None:
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert all(kind in card for kind in KINDS)
    for said in ("layers dropped", "scripts/study pretrain", "CC BY 4.0", "license: apache-2.0"):
        assert said in card


@pytest.mark.slow
def test_accuracy_aims(loaded: tuple[Any, Any, dict[str, Any]]) -> None:
    accuracy = exact_match(loaded[0], "test", images=1000, seed=7)
    assert {kind: value for kind, value in accuracy.items() if value < AIMS[kind]} == {}
