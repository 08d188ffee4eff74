"""Tiny gated checkpoints that vLLM's CPU kernels can serve, questions to them, and what `skipit.generate` answers."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from transformers import AutoModelForImageTextToText

import skipit
from skipit.router import RouterConfig

FAMILIES = ("llava", "llava-next", "qwen2.5-vl", "gemma3")
BUDGETS: tuple[Any, ...] = (None, "0.5", 0.25, 0.75, "all")
POINTS = {"0.75": -0.7, "0.5": 0.0, "0.25": 0.7, "all": -1e6}
WIDTH, NEW = 128, 8
LONG = [5 + place % 30 for place in range(70)]  # of a length that fills several pages of keys and values
ROWS: list[families.Row] = [*families.ROWS, [*LONG, "image", *LONG[:50]], [*LONG, "image", 7, "image", 9]]
ROWS += [[23, 24, "image", 25], LONG[:40]]  # with five budgets more than 32 questions


def make(family: str, folder: Path, **settings: Any) -> Path:
    """A tiny model whose gates run about half of its tokens, for reasons of the tokens' own."""
    config = copy.deepcopy(families.config(family))
    text = config.get_text_config()
    # vLLM's attention on CPUs has heads of at least 32.
    text.hidden_size, text.head_dim, text.intermediate_size = WIDTH, 32, 96
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = WIDTH
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
        text.rope_parameters["mrope_section"] = [4, 4, 8]
    config.tie_word_embeddings = text.tie_word_embeddings = (
        False  # or a tiny Gemma 3 says the same token again and again
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    skipit.attach(model, RouterConfig(**{"operating_points": POINTS} | settings))
    generator = torch.Generator().manual_seed(4)
    shape = (families.LAYERS, 2, WIDTH)
    skipit.set_gates(model, torch.randn(shape, generator=generator) / 7, torch.randn(shape[:2], generator=generator))
    skipit.save_gated(model, families.processor(family), folder)
    return folder


@dataclass(frozen=True)
class Question:
    """A question, and what the gated model answers by itself.

    Attributes:
        prompt: as vLLM takes it.
        extra: arguments of skipit in the request.
        ids: of the prompt.
        answer: tokens.
        share: of FLOPs.
        token_layers: that were run.
    """

    prompt: dict[str, Any]
    extra: dict[str, Any]
    ids: list[int]
    answer: list[int]
    share: float
    token_layers: int


def forbidden(family: str) -> list[int]:
    """Tokens that no answer may have: ends, and those of images."""
    return [families.family.EOS, families.IMAGE, *range(families.FIRST_SPECIAL, vocabulary(family))]


def vocabulary(family: str) -> int:
    """Tokens of a family's tokenizer."""
    return len(families.processor(family).tokenizer)


def questions(family: str, folder: Path, extras: list[dict[str, Any]]) -> list[Question]:
    """Every row with every one of these arguments, answered by `skipit.generate`."""
    model, _ = skipit.load(folder)
    model.generation_config.suppress_tokens = forbidden(family)
    made = []
    for row in ROWS:
        first = sum(item for item in row if isinstance(item, int))
        images = [families.picture(first + place, 0) for place, item in enumerate(row) if item == "image"]
        inputs = families.inputs(family, [row])
        inputs.pop("token_type_ids", None)  # by which Gemma 3's image tokens see each other; on CPUs, vLLM's do not
        ids = inputs["input_ids"][0].tolist()
        prompt = {"prompt": families.text(family, row)} | ({"multi_modal_data": {"image": images}} if images else {})
        for extra in extras:
            how = {name.removeprefix("skipit_"): value for name, value in extra.items()}
            with skipit.running(budget_per=how.pop("budget_per", None)):
                out, trace = skipit.generate(
                    model, return_trace=True, **how, **inputs, max_new_tokens=NEW, do_sample=False
                )
            answer = out[0, len(ids) :].tolist()
            made.append(Question(prompt, extra, ids, answer, trace.share, int(trace.run.sum())))
    return made
