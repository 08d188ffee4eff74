"""`skipit profile`: killed and resumed, from a stream, rows left out by name, and of a vision tower alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, skipit
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny_models import build
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from skipit.cli.units import layers_in_words
from skipit.router import InputError
from skipit.router.folders import load_json, load_tensors
from skipit.theory.artefact import load_backbone, load_plan, load_profile
from skipit.theory.plan import skip_set
from skipit.train.data.sources import load_data, load_model
from skipit.train.reference.data import reference_dataset
from studies.architecture import build_processor

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)


def measured(*argv: Any) -> str:
    code, out, err = skipit("profile", *argv)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows in a file of lines, their pictures beside it."""
    at = tmp_path_factory.mktemp("data")
    with (at / "rows.jsonl").open("w") as file:
        for number, row in enumerate(reference_dataset("test", 10, 0)):
            row["images"][0].save(at / f"{number}.png")
            text = row["prompt"][0]["content"][1]["text"]
            line = {"images": [str(at / f"{number}.png")], "prompt": text, "completion": row["answer"]}
            file.write(json.dumps(line) + "\n")
    return at / "rows.jsonl"


def same_profile(one: Path, other: Path) -> None:
    assert (one / "profile.safetensors").read_bytes() == (other / "profile.safetensors").read_bytes()
    ours, theirs = (load_json(path / "profile.json") for path in (one, other))
    for values in (ours, theirs):
        values.pop("made_by")
        values["about"].pop("data")  # how the same rows were read
    assert ours == theirs


def test_what_is_printed(chain: Path) -> None:
    assert (chain / "profile.out").read_text().startswith(f"{chain}/profile: 12 rows measured, 0 not finite.")
    assert re.fullmatch(r"profile +12/12  \d+ s\n", (chain / "profile.err").read_text())


def test_decision_points(tmp_path: Path) -> None:
    line = ("reference", "reference", "--samples", 2, "--draws", 1)
    for typed, points in (("0,3", (0, 3)), ("each", None)):
        measured(*line, "--decide-at", typed, "--out", tmp_path / typed)
        assert load_profile(tmp_path / typed).decide_at == points
        assert skipit("plan", tmp_path / typed, "--mode", "both", "--budget", 0.9, "--out", tmp_path / "plan").code == 0
        assert load_plan(tmp_path / "plan").decide_at == points
        shutil.rmtree(tmp_path / "plan")
    for typed in ("1,2", "0,2,1", "all", ""):
        said = refused("profile", *line, "--decide-at", typed, "--out", tmp_path / "x", code=2)
        assert f"--decide-at: got '{typed}', expected ascending layers that begin with 0, such as 0,1,2, or" in said
    said = refused("profile", *line, "--decide-at", "0,12", "--out", tmp_path / "x")
    assert said.endswith("`decide_at`: got (0, 12), the model has layers 0 to 11.\n")


def test_it_ends_in_a_table_a_picture_and_a_finding(chain: Path) -> None:
    profile, out = load_profile(chain / "profile"), (chain / "profile.out").read_text()
    for layer in range(12):
        shown = f"{profile.damage['retain'].unit[layer, 1]:.2g}"
        assert re.search(rf"^│ +{layer} │.* {re.escape(shown)} │", out, re.MULTILINE)
    skips = (~skip_set(profile, 0.5)).nonzero().tolist()
    told = re.search(r"skipping text in (.*), vision in (.*) \(retain\)\.", out).groups()
    for at, words in enumerate(told):
        assert words == layers_in_words([layer for layer, modality in skips if modality == at])
    with Image.open(chain / "profile" / "units.png") as picture:
        picture.verify()


class TestResume:
    LINE = ("reference", "reference", "--samples", 16, "--batch-size", 2, "--draws", 1, "--save-every", 1)

    def test_a_killed_process_goes_on_to_the_same_bits(self, tmp_path: Path) -> None:
        out, partial = tmp_path / "p", tmp_path / "p.partial"
        command = [sys.executable, "-m", "skipit.cli", "profile", *map(str, self.LINE), "--out", str(out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while not (partial / "sums.safetensors").exists() and process.poll() is None:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        assert 1 <= int(load_tensors(partial / "sums.safetensors")["batches"]) < 8
        code, _, err = skipit("profile", *self.LINE, "--out", out)
        assert code == 1
        assert "p.partial holds an unfinished profile. Go on with --resume" in err
        code, _, err = skipit("profile", *self.LINE, "--samples", 12, "--seed", 1, "--resume", "--out", out)
        assert code == 1
        assert "what is measured differs: samples was 16, is 12; seed was 0, is 1." in err
        assert "16 rows measured" in measured(*self.LINE, "--resume", "--out", out)
        assert not partial.exists()
        measured(*self.LINE, "--out", tmp_path / "whole")
        same_profile(out, tmp_path / "whole")

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        code, _, err = skipit("profile", *self.LINE, "--resume", "--out", tmp_path / "p")
        assert code == 1
        assert "p.partial does not hold an unfinished profile. Start without --resume." in err

    def test_interrupted_after_a_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            (tmp_path / "p.partial").mkdir()
            raise KeyboardInterrupt

        monkeypatch.setattr("skipit.train.profiling.profile", interrupt)
        code, _, err = skipit("profile", *self.LINE, "--out", tmp_path / "p")
        assert code == 130
        assert "interrupted. The same command with --resume goes on from the last save." in err


class TestStreaming:
    def test_the_profile_is_that_of_the_rows_in_memory(self, lines: Path, tmp_path: Path) -> None:
        line = ("reference", lines, "--samples", 5, "--batch-size", 2, "--draws", 1)
        assert "5 rows measured" in measured(*line, "--out", tmp_path / "memory")
        assert "5 rows measured" in measured(*line, "--streaming", "--out", tmp_path / "stream")
        same_profile(tmp_path / "memory", tmp_path / "stream")

    @pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "reference"])
    def test_every_source_streams_its_first_rows(self, lines: Path, tmp_path: Path, kind: str) -> None:
        rows = reference_dataset("test", 10, 0)
        rows.to_parquet(tmp_path / "rows.parquet")
        rows.save_to_disk(tmp_path / "folder")
        places = {"jsonl": lines, "parquet": tmp_path / "rows.parquet", "folder": tmp_path / "folder"}
        source = str(places.get(kind, kind))
        stream = load_data(source, "test", 4, streaming=True)
        assert isinstance(stream, IterableDataset)
        assert (
            list(stream) == load_data(source, "test", 4).to_list()
            or [r["answer"] for r in stream] == rows[:4]["answer"]
        )

    def test_a_shuffle_is_seeded_and_of_all_rows(self, lines: Path) -> None:
        def names(seed: int, samples: int | None = None) -> list[str]:
            rows = load_data(str(lines), "train", samples, seed, streaming=True, shuffle_buffer=10)
            return [row["images"][0] for row in rows]

        assert names(0) == names(0) != names(1)
        assert len(set(names(0))) == 10
        assert names(0, 3) == names(0)[:3]
        with pytest.raises(InputError, match="a shuffle buffer of 5 rows is of a stream: add --streaming"):
            load_data(str(lines), "train", shuffle_buffer=5)

    def test_rows_are_read_as_they_are_needed(self, tmp_path: Path) -> None:
        """A broken line behind the first megabytes is never reached."""
        with (tmp_path / "rows.jsonl").open("w") as file:
            for number in range(200):
                file.write(json.dumps({"number": number, "filler": "x" * 200_000}) + "\n")
            file.write("not json\n")
        stream = load_data(str(tmp_path / "rows.jsonl"), "train", 3, streaming=True)
        assert [row["number"] for row in stream] == [0, 1, 2]
        with pytest.raises(InputError, match="cannot be read"):
            load_data(str(tmp_path / "rows.jsonl"), "train", 3)

    def test_what_is_broken_is_named_when_it_is_reached(self, lines: Path, tmp_path: Path) -> None:
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        rows[3]["images"] = [str(tmp_path / "missing.png")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = skipit("profile", "reference", tmp_path / "rows.jsonl", "--streaming", "--out", tmp_path / "x")
        assert code == 1
        assert "row 3: image 0 cannot be read" in err


def test_rows_with_nan_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skipit.train.data.collate import Collator

    def collate(self: Collator, rows: Any) -> dict[str, torch.Tensor]:
        batch = original(self, rows)
        for index, row in enumerate(rows):
            if row.where in ("row 1", "row 6"):
                batch["pixel_values"][index] = torch.nan
        return batch

    original = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", collate)
    code, out, err = skipit(
        "profile", "reference", "reference", "--samples", 8, "--batch-size", 4, "--draws", 1, "--out", tmp_path / "p"
    )
    assert code == 0
    assert "6 rows measured, 2 not finite." in out
    assert err.endswith("left out, their states are not finite: row 1, 6\n")
    about = load_json(tmp_path / "p" / "profile.json")["about"]
    assert (about["rows"], about["skipped_rows"], about["skipped_row_numbers"]) == (6, 2, [1, 6])


class TestPart:
    def test_the_reference_models_tower(self, tmp_path: Path) -> None:
        line = ("reference", "reference", "--split", "test", "--part", "vision", "--samples", 6, "--batch-size", 4)
        out = measured(*line, "--out", tmp_path / "v")
        head, *rows, last = out.splitlines()
        assert head.split() == ["layer", "geometric", "prox(0.01)", "prox(0.1)", "update", "tokens"]
        found = load_backbone(tmp_path / "v")
        assert len(rows) == len(found.table("geometric")) == 4
        assert [float(row.split()[1]) for row in rows] == pytest.approx(found.table("geometric").tolist(), abs=1e-4)
        assert last.endswith("v: model.vision_tower.encoder.layers of 6 images.")
        for verb in (("plan", tmp_path / "v"), ("eval", tmp_path, "reference", "--profile", tmp_path / "v")):
            said = refused(*verb, "--out", tmp_path / "x")
            assert "is the profile of a vision stack" in said
            assert "damage is measured on answer tokens" in said
        assert "keeps nothing to --resume" in refused("profile", *line, "--resume", "--out", tmp_path / "x")
        measured(*line, "--streaming", "--overwrite", "--out", tmp_path / "v")
        assert torch.equal(load_backbone(tmp_path / "v").table("geometric"), found.table("geometric"))

    def test_a_random_llava(self, lines: Path, tmp_path: Path) -> None:
        build("llava").save_pretrained(tmp_path / "llava")
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
            tmp_path / "llava"
        )
        build_processor().tokenizer.save_pretrained(tmp_path / "llava")
        out = measured(tmp_path / "llava", lines, "--part", "vision", "--out", tmp_path / "v")
        assert out.splitlines()[-1].endswith("model.vision_tower.encoder.layers of 10 images.")

    def test_a_bare_siglip(self, lines: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **SMALL)).save_pretrained(tmp_path / "siglip")
        line = ("profile", tmp_path / "siglip", lines, "--part", "vision", "--out", tmp_path / "v")
        assert "has no image processor (preprocessor_config.json) that can be loaded" in refused(*line)
        SiglipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "siglip")
        out = measured(*line[1:])
        assert re.search(r"encoder\.layers of 10 images\.$", out.strip())
        assert load_backbone(tmp_path / "v").table("count").tolist() == [40] * 3

    def test_a_pickle_is_not_read_by_the_back_door(self, lines: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        folder = tmp_path / "siglip"
        encoder = SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **SMALL))
        encoder.config.save_pretrained(folder)
        torch.save(encoder.state_dict(), folder / "pytorch_model.bin")
        SiglipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        said = refused("profile", folder, lines, "--part", "vision", "--out", tmp_path / "v")
        assert "has pytorch_model.bin, which skipit does not read" in said

    def test_a_text_encoder(self, lines: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tokenizer = build_processor().tokenizer
        BertModel(BertConfig(**SMALL, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        out = measured(tmp_path / "bert", lines, "--part", "text", "--batch-size", 3, "--out", tmp_path / "t")
        assert out.strip().endswith("encoder.layer of 10 texts.")
        row = json.loads(lines.read_text().splitlines()[0])
        assert load_backbone(tmp_path / "t").table("count")[0] > 10 * len(tokenizer(row["completion"])["input_ids"])

    def test_errors(self, lines: Path, tmp_path: Path) -> None:
        Dataset.from_list([{"images": [], "prompt": "a", "completion": "b"}]).to_parquet(tmp_path / "blind.parquet")
        line = ("--part", "vision", "--out", tmp_path / "x")
        assert "the profile got no image" in refused("profile", "reference", tmp_path / "blind.parquet", *line)
        Dataset.from_list([{"prompt": "a"}]).to_parquet(tmp_path / "bare.parquet")
        said = refused("profile", "reference", tmp_path / "bare.parquet", *line)
        assert "row 0: no column images; found: prompt" in said
        said = refused("profile", "reference", lines, *line, "--layers", "model.tower")
        assert "no layers at `layers='model.tower'`" in said
        assert f"{tmp_path}/none: no such file or folder." in refused("profile", tmp_path / "none", lines, *line)
        said = refused("profile", "reference", lines, "--part", "text", "--out", tmp_path / "x")
        assert "not exactly one stack of layers" in said


def test_a_streamed_profile_needs_no_length() -> None:
    model, processor = load_model("reference")
    from skipit.train.profiling import profile_model

    rows = load_data("reference", "test", 2, streaming=True)
    assert profile_model(model, processor, rows, draws=1).about["rows"] == 2
