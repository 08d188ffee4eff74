"""Errors can be read whatever they quote: a data URL of 20 kB is not printed whole."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from command_line import skipit

from skipit.eval.measure.runner import right_answers
from skipit.eval.metrics import vqa_accuracy
from skipit.router.errors import InputError, RouterConfigError, SkipItError
from skipit.theory.plan import check_budget
from skipit.train.config import TrainConfig
from skipit.train.data.rows import turns_of

URL = "data:image/png;base64," + "A" * 20_001
CALLS: dict[str, Callable[[Any], Any]] = {
    "budget": check_budget,
    "setting": lambda value: TrainConfig(precision=value),
    "number": lambda value: TrainConfig(steps=value),
    "prompt": lambda value: turns_of(
        {"prompt": value if isinstance(value, list) else [value]}, "prompt", "user", "row 0"
    ),
    "answer": lambda value: right_answers({"answer": [{"other": value}]}, 0),
    "references": lambda value: vqa_accuracy(["yes"], [value if isinstance(value, str) else (*value[:2], URL)]),
}


@pytest.mark.parametrize("value", [URL, [0.5] * 9_000], ids=["a word", "a list"])
@pytest.mark.parametrize("call", CALLS)
def test_what_a_caller_gives_is_quoted_in_short(call: str, value: Any) -> None:
    with pytest.raises((ValueError, SkipItError)) as refused:
        CALLS[call](value)
    assert len(str(refused.value)) < 500


LINES = {
    "a source": ("profile", "reference", URL, "--out", "o"),
    "a model": ("inspect", URL),
    "a number": ("train", "reference", "reference", "--steps", URL, "--out", "o"),
    "an image": ("generate", "{checkpoint}", "--image", URL, "--prompt", "what"),
}


@pytest.mark.parametrize("line", LINES)
def test_what_is_typed_is_quoted_in_short(line: str, chain: Any) -> None:
    result = skipit(*(part.format(checkpoint=chain / "checkpoint") for part in LINES[line]))
    assert result.code in (1, 2)
    assert len(result.err) < 1500
    assert "data:image/png;base64,AAA" in result.err


def test_what_others_raise_is_made_readable_too() -> None:
    error = InputError(f"row 3 cannot be read: Incorrect image source, got {URL}")
    assert str(error).startswith("row 3 cannot be read: Incorrect image source, got data:image/png;base64,AAAA")
    assert str(error).endswith("AAAA (20,023 characters)")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    path = "/" + "/".join(["folder"] * 30)
    assert path in str(RouterConfigError(f"{path}: no such file")), "a path is whole"
