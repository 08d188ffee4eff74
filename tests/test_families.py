"""Every family goes through the whole data flow with its own processor; docs/families.md says what is tested."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_laws
import test_video
import torch
from command_line import skipit
from families import FAMILIES, IMAGE, LAYERS, build, processor
from families.family import picture

from skipit.router import InputError, Trace, find_router, running
from skipit.router.checkpoint import load, save_gated
from skipit.router.folders import load_json
from skipit.theory.artefact import save_profile
from skipit.theory.plan import make_plan
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator
from skipit.train.export import export
from skipit.train.gating import gate_by_plan
from skipit.train.profiling import profile_model
from skipit.train.run import train

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def row(number: int, images: int) -> dict[str, Any]:
    """A row in TRL's conversational vision format."""
    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "what is it"}]
    answer = [{"type": "text", "text": f"a cat t{number + 5}"}]
    return {
        "images": [picture(number + place, 0) for place in range(images)],
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def rows(family: str) -> list[dict[str, Any]]:
    """One and two images, and none where the family's processor allows it."""
    every = [row(number, images) for number, images in enumerate((1, 2, 0, 1))]
    if FAMILIES[family].prefix_lm:
        return every[::3]
    return [one for one in every if one["images"]] if FAMILIES[family].mixes_rows else every


@pytest.mark.parametrize("family", FAMILIES)
def test_collate(family: str) -> None:
    data = rows(family)
    batch = Collator(processor(family))(data)
    words = processor(family).tokenizer
    for number, labels in enumerate(batch["labels"]):
        assert words.decode(labels[labels >= 0]).split() == [
            *data[number]["completion"][0]["content"][0]["text"].split(),
            "</s>",
        ]
    prompts = Collator(processor(family), with_completion=False)(data)
    assert "labels" not in prompts
    for number, ids in enumerate(prompts["input_ids"]):
        assert words.decode(ids[prompts["attention_mask"][number] > 0]).split()[-2:] == ["ASSISTANT", ":"]
    seen = (batch["input_ids"] == IMAGE).sum(-1)
    assert torch.equal(seen, (prompts["input_ids"] == IMAGE).sum(-1))
    assert all((count > 0) == bool(one["images"]) for count, one in zip(seen, data, strict=True))


def test_a_prefix_lm_is_told_where_the_answer_is() -> None:
    batch = Collator(processor("paligemma"))(rows("paligemma"))
    assert torch.equal(batch["token_type_ids"] == 1, batch["labels"] != -100)
    with pytest.raises(InputError, match="row 0 of the batch: the processor cannot take it: `images` are expected"):
        Collator(processor("paligemma"))([row(0, 0)])


@EVERY_FAMILY
def test_data_flow(family: str, tmp_path: Path) -> None:
    """Profile, plan, train, export, reload, generate: a run that leaves nothing out."""
    model, data = build(family), rows(family)
    model.save_pretrained(tmp_path / "base")
    processor(family).save_pretrained(tmp_path / "base")
    profile = profile_model(model, processor(family), data, batch_size=4)
    assert profile.geometric.shape == (LAYERS, 2)
    damages = [damage.unit for damage in profile.damage.values()]
    assert all(table.isfinite().all() for table in (profile.geometric, *damages, profile.var_text))
    settings = TrainConfig(budget=0.6, steps=2, batch_size=2, accumulation=1, lora_rank=2)
    plan = make_plan(profile, budget=0.6)
    train(
        model, processor(family), data, plan, settings, tmp_path / "run", calibration=data, base=str(tmp_path / "base")
    )
    export(tmp_path / "run", tmp_path / "out")
    model, reloaded = load(tmp_path / "out")
    assert type(reloaded) is type(processor(family))
    batch = Collator(reloaded, with_completion=False)(data)
    trace = Trace()
    with running(trace=trace):
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (len(data), batch["input_ids"].shape[1] + 3)
    assert find_router(model)[1].config.operating_points
    shares = torch.stack([step.run.sum((1, 2)) / step.real.sum() for step in trace.steps])
    assert 0 < shares.mean() < 1


@pytest.mark.slow
@EVERY_FAMILY
def test_eval(family: str, tmp_path: Path) -> None:
    """`skipit eval` on rows of one's own, pictures by file name, to its end: with experiments and a report."""
    model, lines = build(family), []
    for number, one in enumerate(rows(family)):
        names = [f"{tmp_path}/{number}-{place}.png" for place in range(len(one["images"]))]
        for image, name in zip(one["images"], names, strict=True):
            image.save(name)
        lines.append({**one, "images": names})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    profile = profile_model(model, processor(family), rows(family), batch_size=4)
    save_profile(profile, tmp_path / "profile")
    gate_by_plan(model, processor(family), make_plan(profile, 0.7), rows(family))
    save_gated(model, processor(family), tmp_path / "ck")
    line = (
        "eval",
        tmp_path / "ck",
        tmp_path / "rows.jsonl",
        "--profile",
        tmp_path / "profile",
        "--repeats",
        1,
        "--no-compiled",
    )
    result = skipit(*line, "--controlled-samples", 2, "--out", tmp_path / "eval")
    assert result.code == 0, result.err
    figures = load_json(tmp_path / "eval" / "eval.json")
    assert figures["gated"]["latency"]["decode_ms"] > 0
    assert {"units", "growing", "adaptivity", "calibration"} <= set(figures)
    assert (tmp_path / "eval" / "report.html").is_file()


def cases(test: Any) -> set[str]:
    """The families a test is run with."""
    return {case for mark in test.pytestmark if mark.args[:1] == ("family",) for case in mark.args[1]}


def test_the_page_claims_what_is_tested() -> None:
    table = re.findall(r"^\| [^|]+\(`([\w.-]+)`\) \|(.+)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [name for name, _ in table] == list(FAMILIES)
    laws = [
        cases(getattr(group, name))
        for group in (test_laws.TestAllRun, test_laws.TestMaskedIsGathered, test_laws.TestAloneIsPadded)
        for name in ("test_forward", "test_generate")
    ]
    tested = [set.intersection(*laws), *[cases(test_data_flow)] * 3, cases(test_eval)]
    groups = (test_video.test_masked_is_gathered, test_video.test_alone_is_padded, test_video.test_data_flow)
    with_video = set.intersection(*map(cases, groups))
    for name, cells in table:
        *claims, notes = (cell.strip() for cell in cells.split("|"))
        assert claims == ["yes" if name in families else "no" for families in tested], name
        assert ("video" in notes) == (name in with_video) == bool(FAMILIES[name].video), name
