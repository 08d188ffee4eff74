"""The documents model put together around a tiny decoder of the same class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_decoder import tiny_decoder, tiny_documents_model
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from skipit.eval.measure.answer import answer
from skipit.router import CheckpointError, attach, running
from skipit.router.decoder import find_decoder
from skipit.theory.plan import make_plan
from skipit.train.data.collate import Collator
from skipit.train.gating import gate_by_plan
from skipit.train.profiling import profile_model
from skipit.train.reference.documents.data import documents_dataset, draw_document
from skipit.train.reference.documents.model import (
    HEIGHT,
    IMAGE_TOKENS,
    WIDTH,
    build_processor,
    tower_config,
)
from skipit.train.reference.documents.weights import RANK, add_lora, add_weights, our_weights


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny_documents_model()


def test_a_real_llava_that_keeps_the_decoder_as_it_was(parts: tuple[Any, Any]) -> None:
    model, _ = parts
    assert type(model) is LlavaForConditionalGeneration
    assert find_decoder(model)[0] == "model.language_model.layers"
    for name, value in tiny_decoder().model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], value), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_tower_of_the_real_one_is_small_and_a_page_costs_hundreds_of_tokens() -> None:
    from transformers import AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(tower_config())
    assert sum(p.numel() for p in tower.parameters()) <= 6_000_000
    assert 256 <= IMAGE_TOKENS <= 600


def test_rows_become_inputs_and_answers(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    rows = list(documents_dataset("train", 2))
    batch = Collator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, HEIGHT, WIDTH)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [IMAGE_TOKENS] * 2
    answer = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert answer == f"{rows[0]['answer']}<|im_end|>"
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)


def test_an_image_token_in_the_text_is_the_decoders_spare_one(parts: tuple[Any, Any]) -> None:
    _, processor = parts
    again = build_processor(processor.tokenizer)
    assert again.tokenizer.convert_tokens_to_ids("<image>") == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(again.tokenizer) == len(processor.tokenizer)


def test_saved_and_loaded_as_it_was(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    batch, same = (Collator(each)(list(documents_dataset("test", 1))) for each in (processor, reader))
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**same).logits, model(**batch).logits)


def test_gates_that_let_all_run_change_nothing() -> None:
    model, processor = tiny_documents_model()
    batch = Collator(processor)(list(documents_dataset("test", 1)))
    with torch.no_grad():
        dense = model(**batch).logits
        attach(model)
        with running(mode="gathered"):
            assert torch.equal(model(**batch).logits, dense)


def trained(seed: int) -> Any:
    model, _ = tiny_documents_model()
    add_lora(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name or "lora_" in name:
                parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    return model.eval()


def test_our_weights_and_the_decoder_are_the_trained_model(tmp_path: Path) -> None:
    ours = trained(1)
    save_file(our_weights(ours), tmp_path / "ours.safetensors")
    model, processor = tiny_documents_model(seed=0)
    add_weights(model, tmp_path / "ours.safetensors")
    batch = Collator(processor)(list(documents_dataset("test", 1)))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, ours(**batch).logits, atol=1e-3, rtol=1e-3)


def test_the_real_ones_weights_fit_in_25_megabytes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        decoder = LlamaForCausalLM(
            LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)
        )  # fmt: skip
    per_rank = sum(sum(m.weight.shape) for m in decoder.model.layers.modules() if isinstance(m, torch.nn.Linear))
    with torch.device("meta"):
        from transformers import AutoModel

        tower = AutoModel.from_config(tower_config())
    projector = (256 + 1) * 576 + (576 + 1) * 576
    assert 2 * (RANK * per_rank + projector + sum(p.numel() for p in tower.parameters())) <= 25_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.vision_tower.layernorm.weight"), "lacks `model.vision_tower.layernorm.weight`"),
        (lambda t: t.update(other=torch.zeros(1)), "has, without a place for it, `other`"),
        (
            lambda t: t.update({"model.multi_modal_projector.linear_1.bias": torch.zeros(3)}),
            r"linear_1.bias` has shape \[3\], expected \[64\]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    tensors = our_weights(trained(1))
    change(tensors)
    save_file(tensors, tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match=message):
        add_weights(tiny_documents_model()[0], tmp_path / "ours.safetensors")


def test_a_picture_of_any_size_is_a_page(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    page = draw_document("test", "sign", np.random.default_rng(0)).page.image.resize((700, 300))
    pixels = processor.image_processor(images=[page], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        (features,) = model.get_image_features(pixel_values=pixels).pooler_output
    assert features.shape == (IMAGE_TOKENS, model.config.text_config.hidden_size)


def test_a_model_in_bf16_is_profiled_calibrated_and_asked() -> None:
    """Its tower does not cast pixels to its own dtype, as those of most other models do."""
    model, processor = tiny_documents_model()
    model.to(torch.bfloat16)
    rows = documents_dataset("test", 4, kinds=["lookup"])
    profile = profile_model(model, processor, rows)
    gate_by_plan(model, processor, make_plan(profile, 0.5), rows)
    assert answer(model, processor, rows[0]["images"], "What is the title?").compute < 1
