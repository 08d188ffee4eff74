"""Videos: the laws, and the whole data flow, for every family that has them.

Rows have one or two videos, of different length where the processor takes that, an image beside one, or text alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, build, inputs, processor
from families.family import film, picture
from test_laws import gated, in_parts
from tiny_models import logits, same

from skipit.router import InputError, Trace, attach, running
from skipit.router.checkpoint import load
from skipit.theory.plan import make_plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator
from skipit.train.export import export
from skipit.train.profiling import profile_model
from skipit.train.run import train

VIDEO = [name for name in FAMILIES if FAMILIES[name].video]
# SmolVLM's processor keeps the pixels of images or of videos, not of both.
MIXED = [name for name in VIDEO if name != "smolvlm"]
EVERY_FAMILY = pytest.mark.parametrize("family", VIDEO)
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
EVERY_PATTERN = pytest.mark.parametrize("pattern", ["tokens", "gates"])
EVERY_PADDING = pytest.mark.parametrize("padding", ["left", "right"])
NEW_TOKENS = {"max_new_tokens": 4, "do_sample": False}


def rows(family: str) -> list[list[int | str]]:
    """Every row ends with at least four text tokens, which can be decoded one by one."""
    with_image: list[int | str] = [23, "image", 24, "video", 25, 26, 27, 28]
    return [
        [5, "video", 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
        [15, "video", 16, "video", 17, 18, 19, 20, 21, 22],
        *([with_image] if family in MIXED else []),
    ]


def test_lengths_differ() -> None:
    lengths = inputs("qwen2.5-vl", rows("qwen2.5-vl"))["video_grid_thw"][:, 0]
    assert len(lengths.unique()) > 1


@EVERY_FAMILY
@EVERY_PADDING
def test_all_run_is_the_base(family: str, padding: str) -> None:
    model, batch = build(family), inputs(family, rows(family), padding)
    base = logits(model, batch)
    generated = model.generate(**batch, **NEW_TOKENS) if padding == "left" else None
    attach(model)
    trace = Trace()
    assert torch.equal(logits(model, batch, trace=trace), base)
    if generated is not None:
        assert torch.equal(model.generate(**batch, **NEW_TOKENS), generated)
    vision = (trace.steps[0].modality * trace.steps[0].real).sum(-1)
    assert vision[1] == 0 < vision[0] < vision[2]


@EVERY_FAMILY
@EVERY_POLICY
@EVERY_PATTERN
@EVERY_PADDING
def test_masked_is_gathered(family: str, kv: str, pattern: str, padding: str) -> None:
    model, policy = gated(family, pattern, kv)
    batch = inputs(family, rows(family), padding)
    real = batch["attention_mask"].bool()
    masked = logits(model, batch, policy=policy, mode="masked")
    assert same(logits(model, batch, policy=policy)[real], masked[real])
    assert not torch.equal(masked[real], logits(model, batch, mode="dense")[real])


@EVERY_FAMILY
@EVERY_POLICY
@EVERY_PATTERN
def test_cached_is_uncached(family: str, kv: str, pattern: str) -> None:
    model, policy = gated(family, pattern, kv)
    batch = inputs(family, rows(family))
    length = batch["input_ids"].shape[1]
    real = batch["attention_mask"].bool()
    with running(policy=policy):
        got, _ = in_parts(model, batch, [length - 3, length - 2, length - 1])
    assert same(got[real], logits(model, batch, policy=policy)[real])


@EVERY_FAMILY
@EVERY_POLICY
@EVERY_PATTERN
@EVERY_PADDING
def test_alone_is_padded(family: str, kv: str, pattern: str, padding: str) -> None:
    model, policy = gated(family, pattern, kv)
    every = rows(family)
    batch = inputs(family, every, padding)
    together = logits(model, batch, policy=policy)
    with running(policy=policy):
        answers = model.generate(**batch, **NEW_TOKENS) if padding == "left" else None
        for number, row in enumerate(every):
            one = inputs(family, [row])
            real = batch["attention_mask"][number].bool()
            assert same(together[number][real], logits(model, one, policy=policy)[0])
            if answers is not None:
                alone = model.generate(**one, **NEW_TOKENS)[0, one["input_ids"].shape[1] :]
                assert torch.equal(answers[number, batch["input_ids"].shape[1] :], alone)


def data(family: str) -> list[dict[str, Any]]:
    """Rows in the conversational vision format, with a column of videos."""
    made = []
    for number, (videos, images) in enumerate(((1, 0), (2, 0), (0, 0), (1, family in MIXED))):
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": "what is it"}]
        answer = [{"type": "text", "text": f"a cat t{number + 5}"}]
        made.append(
            {
                "images": [picture(number, 0)] * images,
                "videos": [film(number + place, 0, FAMILIES[family].longer) for place in range(videos)],
                "prompt": [{"role": "user", "content": parts}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return made


@EVERY_FAMILY
def test_data_flow(family: str, tmp_path: Path) -> None:
    """Profile, plan, train, export, reload, generate."""
    model, every = build(family), data(family)
    model.save_pretrained(tmp_path / "base")
    processor(family).save_pretrained(tmp_path / "base")
    profile = profile_model(model, processor(family), every, batch_size=4)
    assert all(t.isfinite().all() for t in (profile.geometric, profile.damage["retain"].unit, profile.var_text))
    settings = TrainConfig(budget=0.6, steps=2, batch_size=2, accumulation=1, lora_rank=2)
    plan, base = make_plan(profile, budget=0.6), str(tmp_path / "base")
    train(model, processor(family), every, plan, settings, tmp_path / "run", calibration=every, base=base)
    export(tmp_path / "run", tmp_path / "out")
    model, reloaded = load(tmp_path / "out")
    batch = Collator(reloaded, with_completion=False)(every)
    trace = Trace()
    with running(trace=trace):
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (len(every), batch["input_ids"].shape[1] + 3)
    vision = (trace.steps[0].modality * trace.steps[0].real).sum(-1)
    assert vision[2] == 0 < vision[0] < vision[1]
    assert 0 < trace.steps[0].run.sum() < LAYERS * trace.steps[0].real.sum()


def test_videos_of_a_row() -> None:
    collate = Collator(processor("qwen2.5-vl"))
    (row,) = data("qwen2.5-vl")[:1]
    expected = collate([row])
    # A list of pictures, and a row that has no column of images.
    frames = [picture(0, 0).resize((16, 16))] * 4
    as_list = {**row, "videos": [frames]}
    as_array = {**row, "videos": [np.stack([np.asarray(frame) for frame in frames])]}
    for first, second in ((as_list, as_array), ({k: v for k, v in row.items() if k != "images"}, row)):
        one, other = collate([first]), collate([second])
        assert all(torch.equal(one[name], other[name]) for name in other)
    # Text in front of which the placeholder is put.
    plain = {**row, "prompt": "what is it"}
    assert torch.equal(collate([plain])["input_ids"], expected["input_ids"])
    with pytest.raises(InputError, match=r"its prompt has 1 video parts, its `videos` 0. Each video needs one part"):
        collate([{**row, "videos": []}])
    with pytest.raises(InputError, match=r"row 0 of the batch: a frame of video 0 cannot be read: .*No such file"):
        collate([{**row, "videos": [["nowhere.png"]]}])
    with pytest.raises(InputError, match=r"no column images; found: prompt, completion. Rows need images or videos"):
        collate([{k: v for k, v in row.items() if k not in ("images", "videos")}])
