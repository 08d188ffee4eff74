"""A model and data of one's own: what the README and the pages say to type runs to its end, and says what is so."""

import contextlib
import io
import json
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import skipit
from datasets import Dataset, DatasetDict, Image, List
from families import build, processor
from PIL import Image as Picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from skipit.router.checkpoint import load
from skipit.router.folders import load_json
from skipit.train.data.collate import Collator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8").split("## On your own model", 1)[1]
POINTS = (ROOT / "docs" / "operating-points.md").read_text(encoding="utf-8")
# Beside these pages' blocks, from the tables of docs/evaluation.md and from docs/evidence.md.
MORE = """
skipit theory runs/profile --model reference --data reference --samples 4
skipit probe reference reference --samples 600 --out runs/probes
skipit plan runs/profile --init zero --out runs/zero
skipit export runs/zero --model reference --out runs/neutral
skipit eval runs/gated reference --profile runs/profile --also neutral=runs/neutral --out runs/report
"""
SPLITS = {"train": "train", "held_out": "calibration", "test": "test"}
ROWS = {"train": 160, "held_out": 128, "test": 24}
OTHERS = ("qwen2.5-vl", "smolvlm", "gemma3")
# What a verb of the pages' reference model reads, of one's own.
READS = {"profile": "train", "probe": "train", "calibrate": "held_out", "eval": "test", "theory": "test"}


def typed(page: str, language: str = "sh") -> list[str]:
    """The lines of a page's blocks, as they stand."""
    return [line for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


def make_data(folder: Path) -> None:
    """Three files of rows as the README shows one: a bright picture is a cat, a dark one a dog; tests have errors."""
    shown, draw = json.loads(typed(README, "json")[0]), np.random.default_rng(0)
    folder.mkdir()
    for name, rows in ROWS.items():
        lines = []
        for number in range(rows):
            bright = int(draw.integers(2))
            pixels = draw.integers(96 * bright, 160 + 96 * bright, (16, (16, 24)[number % 2], 3))
            file = shown["images"][0] if name == "test" and number == 0 else f"{name}-{number}.png"
            Picture.fromarray(pixels.astype(np.uint8)).save(folder / file)
            wrong = name == "test" and number % 6 == 5
            lines.append({**shown, "images": [file], "completion": ("dog", "cat")[bright ^ wrong]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file, with names that are found from here."""
    rows = map(json.loads, Path(f"my_data/{name}.jsonl").read_text().splitlines())
    return [{**row, "images": [f"my_data/{row['images'][0]}"]} for row in rows]


def make_model(family: str, folder: Path) -> None:
    """A tiny model of the real class that has learned to tell cats from dogs."""
    model, rows, collate = build(family).train(), rows_of("train"), Collator(processor(family))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = [collate(rows[start : start + 16]) for start in range(0, len(rows), 16)]
    for step in range(150):
        optimizer.zero_grad()
        model(**batches[step % len(batches)], use_cache=False).loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = processor(family).tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)


def accuracy(model: Any, words: Any) -> float:
    """Of plain `generate()` on the rows to test on, one by one, as transformers' pages have it."""
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    right = []
    for row in rows_of("test"):
        content = [{"type": "image", "image": Picture.open(row["images"][0])}, {"type": "text", "text": row["prompt"]}]
        inputs = words.apply_chat_template([{"role": "user", "content": content}], **how)
        said = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        right.append(words.decode(said, skip_special_tokens=True).strip() == row["completion"])
    return sum(right) / len(right)


def run(line: str, names: dict[str, str]) -> None:
    """Run a line of a page with names of one's own in it."""
    for shown, own in names.items():
        line = line.replace(shown, own)
    result = skipit(*shlex.split(line, comments=True)[1:])
    assert result.code == 0, (line, result.out, result.err)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("llava", "files"), *product(OTHERS, ("files", "folder"))])
def test_every_line_runs(family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))  # where `skipit bench` writes
    make_data(Path("my_data"))
    make_model(family, tmp_path / "base")
    data = {f"my_data/{name}.jsonl": str(tmp_path / f"my_data/{name}.jsonl") for name in ROWS}
    if form == "folder":
        made = {SPLITS[name]: Dataset.from_list(rows_of(name)).cast_column("images", List(Image())) for name in ROWS}
        DatasetDict(made).save_to_disk("my_folder")
        data = dict.fromkeys(data, str(tmp_path / "my_folder"))

    for line in typed(README):
        run(line, {"llava-hf/llava-1.5-7b-hf": "base", **data})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec("\n".join(typed(README, "python")), {})
    assert re.search(r"cat|dog", said.getvalue())
    figures = load_json(Path("runs/eval/eval.json"))
    plain = AutoModelForImageTextToText.from_pretrained("runs/checkpoint"), AutoProcessor.from_pretrained("base")
    assert figures["dense"]["accuracy"] == accuracy(*plain) < 1
    assert figures["gated"]["accuracy"] == accuracy(*load(Path("runs/checkpoint")))
    assert figures["held_out"]["used"] == {"profiled": 0, "trained": 0, "calibrated": 0}
    assert f"{figures['gated']['accuracy']:.1%}" in Path("runs/published/README.md").read_text()
    assert Path("runs/eval/report.html").is_file()
    Picture.open("depth.png").verify()

    (tmp_path / "points").mkdir()
    monkeypatch.chdir(tmp_path / "points")
    Picture.open(tmp_path / "my_data" / "held_out-0.png").save("photo.jpg")
    for line in (*typed(POINTS), *MORE.strip().splitlines()):
        if "--eps" in line or "--max-damage" in line:
            continue  # what is little depends on the model, and a tiny one's images are few tokens:
        reads = data[f"my_data/{READS.get(line.split()[1], 'train')}.jsonl"]
        base = str(tmp_path / "base")
        names = {
            "reference reference": f"{base} {reads}",
            "--model reference": f"--model {base}",
            "bench reference": f"bench {base}",
        }
        # A tiny layer takes its time to be skipped, too.
        names |= {"--latency 0.6": "--latency 0.9", "--latency 0.8": "--latency 0.9"}
        run(line, {**names, " reference ": f" {reads} ", "both --budget 0.6": "both --budget 0.9"})
    certificate = load_json(Path("runs/early/certificates.json"))["certified"]
    assert certificate["risk"] == 0.05
