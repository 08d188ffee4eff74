"""A row that cannot be read stops every verb by its number, or is named once, counted and left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import EVAL, TRAIN, refused, skipit

from skipit.train.reference.data import reference_dataset

Line = tuple[Any, ...]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good.jsonl, and of others whose second row is refused; names of pictures as they are beside it."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, row in enumerate(reference_dataset("train", 40, kinds=["compare"])):
        row["images"][0].save(folder / f"{number}.png")
        text = row["prompt"][0]["content"][1]["text"]
        lines.append({"images": f"{number}.png", "prompt": text, "completion": row["answer"]})
    (folder / "good.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = dict(lines[1])
    lines[1]["completion"] = "a </s> b"  # what only a tokenizer knows to be no answer
    (folder / "unlearnable.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines[1] = whole
    (folder / "empty.png").write_bytes(b"")
    lines[1]["images"] = "empty.png"
    (folder / "broken.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _train(train: str, held_out: str, *more: Any) -> Callable[[Path, Path, Path], Line]:
    def line(chain: Path, data: Path, out: Path) -> Line:
        files = (data / train, "--calibration-data", data / held_out)
        return ("train", "reference", *files, *TRAIN, "--budget", 0.6, "--samples", 12, "--out", out, *more)

    return line


def _calibrate(chain: Path, data: Path, out: Path) -> Line:
    shutil.copytree(chain / "checkpoint", out, dirs_exist_ok=True)
    return ("calibrate", out, data / "broken.jsonl", "--budget", 0.7, "--overwrite")


def _measure(*verb: Any) -> Callable[[Path, Path, Path], Line]:
    return lambda _, data, out: (verb[0], "reference", data / "broken.jsonl", *verb[1:], "--out", out, "--overwrite")


VERBS: dict[str, Callable[[Path, Path, Path], Line]] = {
    "profile": _measure("profile", "--draws", 1),
    "profile, stream": _measure("profile", "--draws", 1, "--streaming"),
    "profile of a part": _measure("profile", "--part", "vision"),
    "probe": _measure("probe", "--splits", 1),
    "theory": lambda chain, data, _: (
        ("theory", chain / "profile", "--model", "reference", "--data", data / "broken.jsonl")
    ),
    "calibrate": _calibrate,
    "eval": lambda chain, data, out: (
        ("eval", chain / "checkpoint", data / "broken.jsonl", *EVAL[:-1], 0, "--out", out, "--overwrite")
    ),
    "train, rows that are profiled": _train("broken.jsonl", "good.jsonl", "--profile-samples", 4, "--overwrite"),
    "train, held-out rows": _train("good.jsonl", "broken.jsonl", "--profile-samples", 4, "--overwrite"),
    "train, stream": _train("broken.jsonl", "good.jsonl", "--profile-samples", 4, "--streaming", "--overwrite"),
}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb.startswith(("train", "calibrate", "profile"))])
def test_a_row_that_only_the_processor_refuses_counts(chain: Path, data: Path, tmp_path: Path, verb: str) -> None:
    message = f"{'held-out row 1' if 'held-out' in verb else 'row 1'}: its answer goes on after '</s>'"

    def line(out: str) -> list[Any]:
        typed = VERBS[verb](chain, data, tmp_path / out)
        return [data / "unlearnable.jsonl" if part == data / "broken.jsonl" else part for part in typed]

    if "part" in verb:  # of which pictures alone are read
        assert skipit(*line("one")).code == 0
        return
    assert message in refused(*line("one"))
    found = skipit(*line("other"), "--max-broken-rows", 1)
    assert found.code == 0, found.err
    assert found.err.count(f"skipped: {message}") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_broken_row_counts(chain: Path, data: Path, tmp_path: Path, verb: str) -> None:
    row = "held-out row 1" if "held-out" in verb else "row 1"
    message = f"{row}: image 0 cannot be read: {data}/empty.png has 0 bytes."
    line = VERBS[verb](chain, data, tmp_path / "out")
    assert message in refused(*line).replace("\n", " ")
    assert not (tmp_path / "out" / "checkpoints").exists(), "nothing was trained"
    found = skipit(*VERBS[verb](chain, data, tmp_path / "out"), "--max-broken-rows", 1)
    assert found.code == 0, found.err
    assert found.err.replace("\n", " ").count(f"skipped: {message}") == 1
