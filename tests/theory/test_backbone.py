"""Redundancy of vision encoders, text encoders and sliding-window decoders."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, inputs
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    ModernBertConfig,
    ModernBertModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from skipit.router.checkpoint import load_dense
from skipit.router.errors import CheckpointError, DecoderNotFoundError, InputError
from skipit.theory.artefact import load_backbone, load_profile, save_backbone
from skipit.theory.backbone import find_stack, profile_backbone
from skipit.theory.profile import profile
from skipit.train.data.collate import Collator, batches
from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
TEXT = dict(**SMALL, vocab_size=30, pad_token_id=0)


def _vision(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(image_size=8, patch_size=4, **SMALL))


def _gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **TEXT,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config)


PIXELS = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
WORDS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (_vision(CLIPVisionModel, CLIPVisionConfig), 3 * 5),  # four patches and the class token
        (_vision(SiglipVisionModel, SiglipVisionConfig), 3 * 4),
    ],
    ids=["clip", "siglip"],
)
def test_vision_encoders_are_measured_by_patch(model: Any, tokens: int) -> None:
    found = profile_backbone(model, [PIXELS, PIXELS], "vision")
    assert found.rows == 6
    assert found.table("count").tolist() == [2 * tokens] * 3
    assert (found.table("geometric") > 0).all()
    assert found.redundancy.geometric[:, 0].isnan().all()


def test_the_figures_are_those_of_the_hidden_states() -> None:
    model = _vision(SiglipVisionModel, SiglipVisionConfig).eval()
    states = model(**PIXELS, output_hidden_states=True).hidden_states
    expected = [1 - torch.cosine_similarity(x, y, dim=-1).mean().item() for x, y in pairwise(states)]
    found = profile_backbone(model, [PIXELS], "vision").table("geometric")
    # The encoder's last hidden state may be taken after a norm; the layers before it are plain.
    assert found[:2].tolist() == pytest.approx(expected[:2], abs=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertModel(BertConfig(**TEXT)),
        lambda: ModernBertModel(ModernBertConfig(**TEXT, local_attention=4, global_attn_every_n_layers=2)),
        _gemma,
    ],
    ids=["bidirectional", "alternating windows", "sliding window"],
)
def test_text_models_are_measured_without_their_pads(build: Any) -> None:
    torch.manual_seed(0)
    model = build()
    found = profile_backbone(model, [WORDS], "text")
    assert found.table("count").tolist() == [8] * 3
    alone = {key: value[1:, :3] for key, value in WORDS.items()}
    first = {key: value[:1] for key, value in WORDS.items()}
    apart = profile_backbone(model, [first, alone], "text")
    assert apart.table("geometric").tolist() == pytest.approx(found.table("geometric").tolist(), abs=1e-5)


def test_the_reference_models_own_tower() -> None:
    model, processor = load_dense(str(WEIGHTS))
    rows = list(batches(reference_dataset("test", 4, 0), Collator(processor), 4))
    found = profile_backbone(model, rows, "vision")
    assert (found.layers, found.rows) == ("model.vision_tower.encoder.layers", 4)
    assert ((found.table("geometric") > 0) & (found.table("geometric") < 2)).all()
    named = profile_backbone(model, rows, "vision", layers=found.layers)
    assert torch.equal(named.table("geometric"), found.table("geometric"))
    with pytest.raises(DecoderNotFoundError, match=r"not exactly one stack of layers.*vision_tower.*language_model"):
        find_stack(model)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_the_tower_of_a_family_is_found_and_runs_alone(family: str) -> None:
    model = build(family)
    model.get_decoder().forward = None  # whatever runs the decoder fails
    pixels = {k: v for k, v in inputs(family, [[5, "image", 6], [7, "image", 8]]).items() if "ids" not in k}
    found = profile_backbone(model, [pixels], "vision")
    assert found.rows == 2
    assert "vis" in found.layers
    assert (found.table("count") > 0).all()
    assert ((found.table("geometric") > 0) & (found.table("geometric") < 2)).all()


def test_towers_and_text_encoders_of_a_pair() -> None:
    torch.manual_seed(0)
    vision, text = dict(image_size=8, patch_size=4, **SMALL), dict(**TEXT, max_position_embeddings=16)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    assert profile_backbone(model, [PIXELS], "vision").table("count").tolist() == [3 * 5] * 3
    with pytest.raises(DecoderNotFoundError, match=r"Stacks found: text_model.*vision_model"):
        profile_backbone(model, [WORDS], "text")
    found = profile_backbone(model, [WORDS], "text", layers="text_model.encoder.layers")
    assert found.table("count").tolist() == [8] * 3


def test_it_survives_the_disk_and_is_no_decoders_profile(tmp_path: Path) -> None:
    found = profile_backbone(_vision(SiglipVisionModel, SiglipVisionConfig), [PIXELS], "vision")
    save_backbone(found, tmp_path / "b")
    again = load_backbone(tmp_path / "b")
    assert (again.modality, again.layers, again.rows, again.model) == ("vision", found.layers, 3, found.model)
    for name in ("geometric", "angle", "update", "count", "histogram"):
        assert torch.equal(again.table(name), found.table(name)), name
    message = r"b is the profile of a vision stack, .*: damage is measured on answer tokens.*cross-attention needs"
    with pytest.raises(CheckpointError, match=message):
        load_profile(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"is not a backbone: it has no backbone\.json"):
        load_backbone(tmp_path)


def test_notions_that_do_not_exist_say_so() -> None:
    found = profile_backbone(_vision(CLIPVisionModel, CLIPVisionConfig), [PIXELS], "vision")
    with pytest.raises(InputError, match=r"`var_text` does not exist for the vision stack.*vision keys"):
        found.table("var_text")
    with pytest.raises(InputError, match=r"`damage_retain` does not exist.*answer tokens"):
        found.table("damage_retain")
    with pytest.raises(InputError, match="`name` is 'depth', expected one of geometric"):
        found.table("depth")


def test_errors() -> None:
    model = _vision(CLIPVisionModel, CLIPVisionConfig)
    with pytest.raises(InputError, match="`modality` is 'audio', expected one of text, vision"):
        profile_backbone(model, [PIXELS], "audio")
    with pytest.raises(InputError, match="the profile got no image"):
        profile_backbone(model, [{}], "vision")
    with pytest.raises(DecoderNotFoundError, match=r"no layers at `layers='h'` in .*Stacks found: .*3 x"):
        profile_backbone(model, [PIXELS], "vision", layers="h")


def test_the_whole_profile_of_a_sliding_window_decoder_leaves_vision_and_attention_undefined() -> None:
    labels = WORDS["input_ids"].masked_fill(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool(), -100)
    found = profile(_gemma(), [{**WORDS, "labels": labels}])
    assert found.var_text.isnan().all()
    assert found.var_last.isnan().all()
    assert found.damage["retain"].unit[:, 0].isfinite().all()
    assert found.damage["retain"].unit[:, 1].isnan().all()
