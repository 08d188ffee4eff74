"""The reference VLM's architecture and processor: real classes, a closed vocabulary, the same model every time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from skipit.router.decoder import find_decoder
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.digits import IMAGE_SIZE
from skipit.train.reference.questions import KINDS, ask
from studies.architecture import IMAGE_TOKENS, SPECIAL_TOKENS, build_model, build_processor, vocabulary


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return build_model()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


def test_a_real_llava_with_a_deep_small_decoder(model: LlavaForConditionalGeneration) -> None:
    assert type(model) is LlavaForConditionalGeneration
    assert not model.training
    path, _, layers = find_decoder(model)
    assert path == "model.language_model.layers"
    assert len(layers) >= 12
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    config = model.config.text_config
    assert config.num_key_value_heads < config.num_attention_heads, "grouped-query attention is exercised"


def test_a_seed_gives_one_model() -> None:
    first, same, other = (build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_special_tokens_agree(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.text_config.vocab_size == len(vocabulary())
    assert vocabulary()[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert model.config.image_token_id == processor.image_token_id == vocabulary().index("<image>")
    for name in ("pad", "bos", "eos"):
        ids = {getattr(place, f"{name}_token_id") for place in (tokenizer, model.generation_config)}
        assert ids == {getattr(model.config.text_config, f"{name}_token_id")}


def test_every_question_and_answer_is_in_the_vocabulary(processor: LlavaProcessor) -> None:
    words = set(vocabulary())
    rng = np.random.default_rng(1)
    for kind in KINDS:
        for _ in range(100):
            question = ask(kind, tuple(rng.integers(10, size=9).tolist()), rng)
            assert words >= {*question.text.split(), *question.answer.split()}


def test_an_image_becomes_its_tokens(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "read the top row ."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.new("RGB", (3 * IMAGE_SIZE, IMAGE_SIZE))  # of any size and shape
    batch = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
    assert batch["input_ids"].eq(model.config.image_token_id).sum() == IMAGE_TOKENS == 36
    assert batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert model(**batch).logits.shape == (1, batch["input_ids"].shape[1], len(vocabulary()))
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("read the top row. ASSISTANT:")


def test_a_conversation_is_templated_turn_by_turn(processor: LlavaProcessor) -> None:
    row = reference_dataset("test", 1)[0]
    turns = [*row["prompt"], *row["completion"], {"role": "user", "content": "and now ?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    question, answer = row["prompt"][0]["content"][1]["text"], row["answer"]
    assert text == f"<s>USER: <image>\n{question} ASSISTANT: {answer}</s>USER: and now ? ASSISTANT:"


def test_model_and_processor_survive_storage(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = LlavaForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    row = reference_dataset("test", 1)[0]
    ours, theirs = (
        p(images=row["images"], text="USER: <image>\nread", return_tensors="pt", add_special_tokens=False)
        for p in (processor, read)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read.chat_template == processor.chat_template
