"""The mistakes that everybody makes: each message says what to type instead. Those not here are with their verb."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import EVAL, TRAIN, refused, skipit

from skipit.train.reference.data import reference_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures and rows.jsonl, which names them as they are beside it."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, row in enumerate(reference_dataset("test", 8)):
        row["images"][0].save(folder / f"{number}.png")
        text = row["prompt"][0]["content"][1]["text"]
        lines.append({"images": [f"{number}.png"], "prompt": text, "completion": row["answer"]})
    write(folder / "rows.jsonl", lines)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def changed(data: Path, name: str, **columns: Any) -> Path:
    """The rows with other values in some columns; None leaves one out, a text with `>` gives it that name."""
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        for column, value in columns.items():
            old = row.pop(column, None)
            if value is not None:
                named = isinstance(value, str) and value.startswith(">")
                row |= {value[1:]: old} if named else {column: value}
    return write(data / f"{name}.jsonl", rows)


def lines(chain: Path, data: Path, file: Path) -> dict[str, tuple[Any, ...]]:
    """Every verb that reads rows of one's own."""
    train = ("--calibration-data", data / "rows.jsonl", "--plan", chain / "plan", *TRAIN)
    return {
        "profile": ("profile", "reference", file),
        "train": ("train", "reference", file, *train),
        "eval": ("eval", chain / "checkpoint", file),
        "calibrate": ("calibrate", chain / "checkpoint", file, "--budget", 0.7),
    }


def out(verb: str, folder: Path) -> tuple[Any, ...]:
    return () if verb == "calibrate" else ("--out", folder / "x")


QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
VERBS = pytest.mark.parametrize("verb", ["profile", "train", "eval", "calibrate"])


@VERBS
def test_columns_by_other_names(verb: str, chain: Path, data: Path, tmp_path: Path) -> None:
    file = changed(data, "named", images=">photo", prompt=">question", completion=">reply")
    said = refused(*lines(chain, data, file)[verb], *out(verb, tmp_path))
    assert said.startswith("skipit: row 0: no column images, prompt")
    assert said.endswith(" If they have other names: --columns images=photo,prompt=question,completion=reply\n")


def test_columns_are_read_by_their_names(chain: Path, data: Path, tmp_path: Path) -> None:
    file = changed(data, "named", images=">photo", prompt=">question", completion=">reply")
    names = ("--columns", "images=photo,prompt=question,completion=reply")
    shutil.copytree(chain / "checkpoint", tmp_path / "copy")
    assert skipit("eval", tmp_path / "copy", file, *EVAL[:-1], 0, *names, "--out", tmp_path / "x").code == 0
    assert skipit("calibrate", tmp_path / "copy", file, "--budget", 0.7, *names).code == 0


@VERBS
def test_a_picture_that_is_not_there(verb: str, chain: Path, data: Path, tmp_path: Path) -> None:
    file = changed(data, "missing", images=["33.png"])
    said = refused(*lines(chain, data, file)[verb], *out(verb, tmp_path)).replace("\n", " ")
    assert (
        f"row 0: image 0 cannot be read: No such file: neither 33.png nor {data}/33.png. Did you mean {data}/" in said
    )


def test_a_budget_in_percent(chain: Path) -> None:
    for verb in (("plan", "p"), ("train", "m", "d"), ("demo",)):
        said = refused(*verb, "--budget", 50, "--out", "x", code=2)
        assert "got '50', expected a number in (0, 1]" in said
        assert "FLOPs to spend; 50 % is 0.5\n" in said


def test_a_path_with_a_typo(chain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is said first, with what is there instead, and nothing is looked for on the Hub."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    rows, checkpoint, adapter = data / "rows.jsonl", chain / "checkpoint", ("--adapter",)
    typed = {
        chain / "chekpoint": [
            ("generate", chain / "chekpoint", "--image", data / "1.png", "--prompt", "?"),
            ("eval", chain / "chekpoint", rows, "--out", "x"),
            ("calibrate", chain / "chekpoint", rows, "--budget", 0.7),
            ("profile", chain / "chekpoint", rows, "--out", "x"),
            ("profile", chain / "chekpoint", rows, "--part", "vision", "--out", "x"),
            ("inspect", chain / "chekpoint"),
            ("eval", checkpoint, rows, "--base", chain / "chekpoint", "--out", "x"),
            ("eval", checkpoint, rows, "--also", f"other={chain}/chekpoint", "--out", "x"),
        ],
        chain / "rum": [("export", chain / "rum", *more, "--out", "x") for more in ((), adapter)],
        chain / "profle": [
            ("plan", chain / "profle", "--out", "x"),
            ("theory", chain / "profle"),
            ("eval", checkpoint, rows, "--profile", chain / "profle", "--out", "x"),
            ("train", "reference", rows, "--profile", chain / "profle", "--calibration-data", rows, "--out", "x"),
        ],
        chain / "plam": [
            ("train", "reference", rows, "--plan", chain / "plam", "--out", "x"),
            ("export", chain / "plam", "--model", "reference", "--out", "x"),
        ],
        data / "row.jsonl": [
            *(("profile", "reference", data / "row.jsonl", *more, "--out", "x") for more in ((), ("--streaming",))),
            ("train", "reference", rows, "--calibration-data", data / "row.jsonl", "--budget", 0.6, "--out", "x"),
        ],
    }
    meant = {"chekpoint": "checkpoint", "rum": "run", "profle": "profile", "plam": "plan", "row.jsonl": "rows.jsonl"}
    monkeypatch.chdir(tmp_path)
    for path, wrong in typed.items():
        for line in wrong:
            said = refused(*line)
            head, _, rest = said.partition("no such file or folder. Did you mean ")
            assert str(path) in head, (line, said)
            assert rest.split("?")[0] == str(path.parent / meant[path.name]), (line, said)


def test_no_answer(chain: Path, data: Path, tmp_path: Path) -> None:
    file = changed(data, "unanswered", completion=None)
    said = refused("eval", chain / "checkpoint", file, "--out", tmp_path / "x")
    assert said.startswith("skipit: row 0: no column completion; found: images, prompt. Rows need")
    assert "to be evaluated a row may have answer for completion." in said


def test_a_prompt_without_a_picture(chain: Path, data: Path, tmp_path: Path) -> None:
    asked = refused("generate", chain / "checkpoint", "--prompt", "?", code=2)
    assert "the following arguments are required: --image" in asked
    said = refused("profile", "reference", changed(data, "blind", images=None), "--out", tmp_path / "x")
    assert "row 0: no column images; found: prompt, completion." in said
    assert "For text alone images are an empty list" in said
    said = refused("profile", "reference", changed(data, "empty", images=[], prompt=QUESTION), "--out", tmp_path / "x")
    assert 'row 0: its prompt has 1 image parts, its `images` 0. Each image needs one part {"type": "image"}.' in said


def test_several_pictures(chain: Path, data: Path, tmp_path: Path) -> None:
    """Are what the question is about, in their order, however they are given."""
    two = ("--image", data / "1.png", "--image", data / "2.png")
    said = skipit("generate", chain / "checkpoint", *two, "--prompt", "read the top row .")
    assert said.code == 0, said.err
    file = changed(data, "pairs", images=["1.png", "2.png"], prompt="read the top row .", completion=said.out.strip())
    line = ("eval", chain / "checkpoint", file, *EVAL[:-1], 0, "--out", tmp_path / "x")
    assert skipit(*line).code == 0
    assert json.loads((tmp_path / "x" / "eval.json").read_text())["gated"]["accuracy"] == 1
    said = refused("profile", "reference", changed(data, "mixed", images=["1.png"] * 2, prompt=QUESTION), "--out", "x")
    assert "row 0: its prompt has 1 image parts, its `images` 2. Each image needs one part" in said


def test_rows_that_were_trained_on_are_not_called_held_out(chain: Path, data: Path, tmp_path: Path) -> None:
    rows, run, checkpoint = data / "rows.jsonl", tmp_path / "run", tmp_path / "checkpoint"
    plan = ("--plan", chain / "plan", *TRAIN)
    said = skipit("train", "reference", rows, "--calibration-data", rows, *plan, "--out", run)
    assert "Not held out: 8 of 8 rows were trained on." in said.out, said.err
    assert skipit("export", run, "--out", checkpoint).code == 0
    said = skipit("eval", checkpoint, rows, *EVAL[:-1], 0, "--out", tmp_path / "eval")
    assert said.out.startswith("8 rows\n"), said.err
    assert "\nNot held out: 8 of 8 rows were trained on, 8 of 8 rows were calibrated with.\n" in said.out
    said = skipit("calibrate", checkpoint, rows, "--budget", 0.7)
    assert "Not held out: 8 of 8 rows were trained on" in said.out, said.err
