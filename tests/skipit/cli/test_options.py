"""Arguments that are wrong, and defaults from a YAML file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import refused

from skipit.cli.main import parse

WRONG: list[tuple[str, str]] = [
    ("", "the following arguments are required: VERB"),
    ("prune", "invalid choice: 'prune'"),
    ("plan p", "the following arguments are required: --out"),
    ("plan p --out x --bud 0.5", "unrecognized arguments: --bud"),
    ("plan p --out x --kv drop", "argument --kv: invalid choice: 'drop'"),
    *(
        (f"plan p --out x --budget={budget}", f"argument --budget: got '{budget}', expected a number in (0, 1]")
        for budget in ("0", "1.5", "-0.5", "nan", "half")
    ),
    ("demo --budget 2", "argument --budget: got '2', expected a number in (0, 1]"),
    ("demo --steps 0", "argument --steps: got '0', expected a whole number, at least 1"),
    ("demo --samples few", "argument --samples: got 'few', expected a whole number, at least 1"),
    ("demo --seed -1", "argument --seed: got '-1', expected a whole number, at least 0"),
    ("train m d --plan p --out x --learning-rate fast", "argument --learning-rate: got 'fast', expected a number"),
    ("train m d --out x --columns image=photo", "got 'image=photo', expected such as images=photo,prompt=question"),
    (
        "train m d --plan p --out x --gate-learning-rate nan",
        "argument --gate-learning-rate: got 'nan', expected a number",
    ),
    ("eval c d --out x --also runs/neutral", "got 'runs/neutral', expected a name and a checkpoint, such as neutral="),
    ("eval c d --out x --also =runs/neutral", "got '=runs/neutral', expected a name and a checkpoint"),
    ("eval c d --out x --controlled-samples -1", "argument --controlled-samples: got '-1', expected a whole number"),
    ("generate c --image i --prompt p --depth-map d.jpg", "expected a name that ends in .png or .svg"),
    ("generate c --image i --prompt p --depth-map no/d.png", "got 'no/d.png', but there is no folder no"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_arguments(line: str, message: str) -> None:
    said = refused(*line.split(), code=2)
    assert message in said
    assert re.search(r"\nTry `skipit( \w+)? --help`\.\n$", said)


class TestConfig:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(text: str) -> Path:
            (tmp_path / "settings.yaml").write_text(text)
            return tmp_path / "settings.yaml"

        return write

    def test_defaults_come_from_the_file_and_the_command_line_wins(self, config: Any) -> None:
        file = config(
            "out: runs/x\nplan: runs/plan\nbatch-size: 4\nlora_rank: 2\nlearning-rate: 1e-3\noverwrite: true\n"
            "steps: 9\nresume: yes\nreport-to: null\n"
        )
        arguments = parse(["train", "m", "d", "--config", str(file), "--steps", "7", "--no-resume"])
        assert (arguments.out, arguments.plan) == (Path("runs/x"), Path("runs/plan"))
        assert (arguments.batch_size, arguments.lora_rank, arguments.learning_rate) == (4, 2, 1e-3)
        assert (arguments.steps, arguments.overwrite, arguments.resume) == (7, True, False)
        assert (arguments.report_to, arguments.distillation, arguments.split) == ("none", None, "train")

    def test_the_file_may_come_first_and_with_an_equals_sign(self, config: Any) -> None:
        file = config("budget: 0.25")
        assert parse(["plan", f"--config={file}", "p", "--out", "x"]).budget == 0.25
        assert parse(["plan", f"--config={file}", "p", "--out", "x", "--budget=0.75"]).budget == 0.75

    def test_columns(self) -> None:
        parsed = parse(["train", "m", "d", "--out", "x", "--columns", "images=photo,messages=chat"])
        assert parsed.columns == {"images": "photo", "messages": "chat"}

    def test_lists(self, config: Any) -> None:
        file = config("image: [a.png, b.png]\nprompt: what is it ?")
        line = ["generate", "c", "--config", str(file)]
        assert parse(line).image == [Path("a.png"), Path("b.png")]
        assert parse([*line, "--image", "c.png"]).image == [Path("c.png")]
        assert parse(["generate", "c", "--config", str(config("image: a.png\nprompt: 3"))]).image == [Path("a.png")]

    def test_an_empty_file_changes_nothing(self, config: Any) -> None:
        assert parse(["demo", "--config", str(config(""))]).budget == 0.5

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("buget: 0.5", "unknown keys buget; known: answer_tokens, budget, "),
            ("config: other.yaml", "unknown keys config"),
            ("budget: 1.5", "`budget`: got '1.5', expected a number in (0, 1]"),
            ("budget: half", "`budget`: got 'half', expected a number in (0, 1]"),
            ("budget: [0.5]", "`budget`: got [0.5], expected a single value"),
            ("budget: true", "`budget`: got True, expected a single value"),
            ("overwrite: 1", "`overwrite`: got 1, expected true or false"),
            ("kv: drop", "`kv`: got 'drop', expected one of retain, evict"),
            ("- budget", "got a list, expected a mapping of option names to values"),
            ("budget: [", "cannot be read: while parsing"),
        ],
    )
    def test_wrong_files(self, config: Any, text: str, message: str) -> None:
        file = config(text)
        said = refused("plan", "p", "--out", "x", "--config", file, code=2)
        assert said.startswith(f"skipit plan: --config {file}")
        assert message in said

    def test_no_file(self) -> None:
        assert "--config no.yaml cannot be read" in refused("plan", "p", "--out", "x", "--config", "no.yaml", code=2)
