"""The real decoder, and the real documents model asked ten held-out questions; needs a package registry once."""

from pathlib import Path
from typing import Any

import pytest

from skipit.eval.measure.runner import answer_batches, right_answers
from skipit.eval.metrics import anls
from skipit.router import CheckpointError, find_router
from skipit.theory.calibrate import measured_share
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data, load_model
from skipit.train.export import merge_run
from skipit.train.reference.documents.decoder import load_decoder
from skipit.train.reference.documents.folder import RUN
from skipit.train.reference.documents.model import IMAGE_TOKENS, build_model, build_processor


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the decoder."""
    folder = tmp_path_factory.mktemp("cache")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SKIPIT_CACHE", str(folder))
            load_decoder()
    except CheckpointError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    return folder


@pytest.mark.slow
def test_the_pretrained_decoder_is_inside_and_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(cache))
    decoder, tokenizer = load_decoder()
    processor = build_processor(tokenizer)
    model = build_model(decoder, processor)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(139.0e6, rel=0.01)
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_ten_held_out_questions_are_answered_from_the_page(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than from another page, by far; docs/documents.md says how well it reads."""
    monkeypatch.setenv("SKIPIT_CACHE", str(cache))
    model, processor = load_model("documents")
    rows: Any = list(load_data("documents", "test", 10))
    collate = Collator(processor, with_completion=False)
    assert (collate(rows[:1])["input_ids"] == model.config.image_token_id).sum() == IMAGE_TOKENS
    others = [{**row, "images": other["images"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    right = [right_answers(row, number) for number, row in enumerate(rows)]
    read = []
    for asked in (rows, others):
        (batch,) = answer_batches(model, asked, collate, batch_size=10, max_new_tokens=48)
        read.append(anls(processor.batch_decode(batch.new, skip_special_tokens=True), right))
    assert read[0] > 0.4
    assert read[1] < read[0] - 0.15


@pytest.mark.slow
def test_the_shipped_run_is_of_the_shipped_model_and_spends_its_budgets(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(cache))
    model, processor = merge_run(RUN)  # refuses another base
    config, costs = find_router(model)[1].config, CostModel.of(model)
    rows = list(batches(load_data("documents", "test", 8), Collator(processor), 4))
    for name, threshold in config.operating_points.items():
        share = measured_share(model, rows, costs, config.kv, threshold)
        assert share == pytest.approx(float(name), abs=0.04)
