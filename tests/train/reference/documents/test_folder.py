"""`documents` as a MODEL and as DATA, with a tiny decoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoder import tiny_decoder, tiny_documents_model, tiny_tokenizer

from skipit.router import CheckpointError
from skipit.router.checkpoint import load_router
from skipit.router.folders import load_json
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_data, load_model, name_model, resolve_model
from skipit.train.reference.documents import folder
from skipit.train.reference.documents.model import IMAGE_TOKENS
from skipit.train.reference.documents.weights import add_lora, our_weights
from skipit.train.run_folder import ADAPTER, RUN_FILE


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of ours for the tiny decoder, and an empty cache."""
    model, _ = tiny_documents_model()
    vision = model.config.vision_config
    add_lora(model)
    save_file(our_weights(model), tmp_path / "ours.safetensors")
    build = folder.build_model
    monkeypatch.setattr(folder, "OURS", tmp_path / "ours.safetensors")
    monkeypatch.setattr(folder, "load_decoder", lambda: (tiny_decoder(), tiny_tokenizer()))
    monkeypatch.setattr(folder, "build_model", lambda decoder, processor: build(decoder, processor, vision))
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_documents_model_and_its_pages_load_by_name(tiny: Path) -> None:
    model, processor = load_model("documents")
    batch = Collator(processor)(list(load_data("documents", "test", 2)))
    assert ((batch["input_ids"] == model.config.image_token_id).sum(-1) == IMAGE_TOKENS).all()
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
    assert name_model("documents") == "documents"


def test_it_is_made_once_and_offline_afterwards(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model("documents")
    monkeypatch.setattr(folder, "load_decoder", pytest.fail)
    assert resolve_model("documents") == first
    (tiny / "ours.safetensors").write_bytes((tiny / "ours.safetensors").read_bytes() + b" ")
    with pytest.raises(pytest.fail.Exception):  # other weights are another model
        resolve_model("documents")


def test_one_that_was_half_made_is_made_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(self: object, path: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(folder, "build_processor", lambda tokenizer: type("P", (), {"save_pretrained": stop})())
        patch.setattr(folder, "build_model", lambda decoder, processor: tiny_documents_model()[0])
        with pytest.raises(Stopped):
            resolve_model("documents")
    assert load_model("documents")


def test_without_our_weights_the_command_that_makes_them_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "OURS", Path("/nowhere/ours.safetensors"))
    with pytest.raises(CheckpointError, match=r"no /nowhere/ours.safetensors. Make it with `scripts/study pretrain-"):
        load_model("documents")


def test_a_run_ships_that_is_small_and_names_no_folder_of_the_machine_that_made_it() -> None:
    files = [path for path in folder.RUN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    record, config = load_json(folder.RUN / RUN_FILE), load_router(folder.RUN)[0]
    assert record["base"] == "documents"
    assert load_json(folder.RUN / ADAPTER / "adapter_config.json")["base_model_name_or_path"] == "documents"
    assert sorted(config.operating_points) == ["0.25", "0.5"]
