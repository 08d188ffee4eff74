"""The real decoder inside the model, asked ten held-out questions; needs a package registry once."""

from typing import Any

import pytest
import torch

from skipit.router import CheckpointError
from skipit.train.data.collate import Collator
from skipit.train.reference.documents.data import documents_dataset
from skipit.train.reference.documents.decoder import load_decoder
from skipit.train.reference.documents.model import IMAGE_TOKENS, build_model, build_processor


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SKIPIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            decoder, tokenizer = load_decoder()
    except CheckpointError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    processor = build_processor(tokenizer)
    torch.manual_seed(0)
    return build_model(decoder, processor), processor


@pytest.mark.slow
def test_the_pretrained_decoder_is_inside_and_answers(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(139.5e6, rel=0.01)
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_ten_held_out_questions_cost_hundreds_of_tokens_and_have_an_answer_to_learn(parts: tuple[Any, Any]) -> None:
    """The tower here is untrained, so that nothing is asked of the answers: what is checked is their way in and out."""
    model, processor = parts
    rows = list(documents_dataset("test", 10))
    for row in rows:
        batch = Collator(processor)([row])
        assert (batch["input_ids"] == model.config.image_token_id).sum() == IMAGE_TOKENS
        with torch.no_grad():
            assert torch.isfinite(model(**batch).loss)
        labels = batch["labels"][batch["labels"] >= 0]
        assert processor.tokenizer.decode(labels, skip_special_tokens=True) == row["answer"]
