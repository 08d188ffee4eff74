"""Tiny random models of real transformers classes, and inputs for them: no download, milliseconds per call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from skipit.router import Decision, FixedUnits, Gated, Policy, set_gates
from skipit.router.call import Call
from skipit.router.gates import TokenGate

VOCABULARY, WIDTH, LAYERS = 50, 32, 4
PAD, IMAGE = 0, 40


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and the inputs of one image."""

    build: Callable[[], Any]
    image_tokens: int
    pixels: Callable[[int], dict[str, Tensor]]
    prefix: tuple[int, ...] = ()  # tokens that must come before an image
    suffix: tuple[int, ...] = ()


def _text(**changes: Any) -> dict[str, Any]:
    return (
        dict(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        )
        | changes
    )


def _llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_text()), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    config = Qwen2_5_VLConfig(
        text_config=_text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            num_heads=2,
            intermediate_size=16,
            out_hidden_size=WIDTH,
            patch_size=4,
            spatial_merge_size=2,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE,
        video_token_id=41,
        vision_start_token_id=42,
        vision_end_token_id=43,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _gemma() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Gemma3TextConfig(
        **_text(head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=42,
        eoi_token_index=43,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros, until it is loaded
    return model


def _square(images: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 8, 8)}


def _qwen_pixels(images: int) -> dict[str, Tensor]:
    # 16 x 16 pixels: 4 x 4 patches of 4 x 4 pixels, two frames, merged 2 x 2 into 4 tokens.
    return {
        "pixel_values": torch.randn(images * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
    }


FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, 4, _square),
    "qwen2.5-vl": Family(_qwen, 4, _qwen_pixels, (42,), (43,)),
    "gemma3": Family(_gemma, 4, _square, (42,), (43,)),
}


# Text only, one image, two images; every row ends with at least four text tokens, which can be decoded one by one.
ROWS: list[list[int | str]] = [
    [5, "image", 6, 7, 8, 9],
    [10, 11, 12, 13, 14],
    [15, "image", 16, "image", 17, 18, 19, 20, 21, 22],
]


def build(family: str, seed: int = 0, attention: str = "sdpa") -> Any:
    """A tiny random model in eval mode."""
    torch.manual_seed(seed)
    model = FAMILIES[family].build().eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE, 41, 42, 43]  # no pixels come with what is generated
    return model


def inputs(family: str, rows: list[list[int | str]], padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A padded batch; in each row, integers are text tokens and "image" is one image."""
    torch.manual_seed(seed)
    shape = FAMILIES[family]
    sequences, images = [], 0
    for row in rows:
        ids: list[int] = []
        for item in row:
            if item == "image":
                ids += [*shape.prefix, *[IMAGE] * shape.image_tokens, *shape.suffix]
                images += 1
            else:
                ids.append(int(item))
        sequences.append(ids)
    longest = max(map(len, sequences))
    padded = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(padded)
    for i, ids in enumerate(sequences):
        place = slice(longest - len(ids), None) if padding == "left" else slice(len(ids))
        padded[i, place], mask[i, place] = torch.tensor(ids), 1
    batch = {"input_ids": padded, "attention_mask": mask}
    if images:
        batch |= shape.pixels(images)
    if family != "llava":
        batch["mm_token_type_ids"] = (padded == IMAGE).long()
        if family == "gemma3":
            batch["token_type_ids"] = batch.pop("mm_token_type_ids")
    return batch


@dataclass(frozen=True)
class TokenTable:
    """Whether a token runs depends on the layer, its place among the row's tokens and its modality; on no gate."""

    run: Tensor  # bool [layers, places, modalities]

    def decide(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        return Decision(self.run[layer, call.position.clamp(min=0) % self.run.shape[1], call.modality])


def _units(*run: tuple[int, int]) -> Callable[[Any], Policy]:
    """A fixed set of units: per layer, whether text and whether vision runs."""
    return lambda model: FixedUnits(torch.tensor(run, dtype=torch.bool))


def _random_table(model: Any) -> Policy:
    return TokenTable(torch.rand(LAYERS, 11, 2, generator=torch.Generator().manual_seed(3)) < 0.5)


def _random_gates(model: Any) -> Policy:
    """Real gates that run about half of the tokens, for reasons of the tokens' own."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(LAYERS, 2, WIDTH, generator=generator)
    set_gates(model, weight, torch.randn(LAYERS, 2, generator=generator))
    return Gated(0.0)


# What a gated model may be asked to skip; each makes a policy for a gated model.
PATTERNS: dict[str, Callable[[Any], Policy]] = {
    "first": _units((0, 0), (1, 1), (1, 1), (1, 1)),
    "last": _units((1, 1), (1, 1), (1, 1), (0, 0)),
    "all": _units((0, 0), (0, 0), (0, 0), (0, 0)),
    "units": _units((1, 0), (0, 1), (1, 1), (0, 0)),
    "tokens": _random_table,
    "gates": _random_gates,
}
