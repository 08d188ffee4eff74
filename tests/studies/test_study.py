"""A cell is measured once for its settings, a profile once for a seed; every study has a command."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipit.theory.plan import make_plan
from studies import study
from studies.__main__ import main, studies
from studies.study import Study, command, markdown, once

SETTINGS = {"steps": 40, "kinds": ("cell", "row"), "learning_rate": 2e-3}


class Measure:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return {"figure": self.times}


def test_the_same_settings_are_measured_once_and_others_beside(tmp_path: Path) -> None:
    measure = Measure()
    first = once(tmp_path, "a", SETTINGS, measure)
    assert once(tmp_path, "a", SETTINGS, measure) == first
    assert first["figure"] == measure.times == 1
    assert (first["steps"], first["kinds"], first["file"][:2]) == (40, ["cell", "row"], "a_")
    other = once(tmp_path, "a", {**SETTINGS, "steps": 41}, measure)
    assert (other["figure"], other["steps"]) == (2, 41)
    assert once(tmp_path, "a", SETTINGS, measure) == first
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {first["file"], other["file"]}


def test_another_version_of_skipit_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measure()
    once(tmp_path, "a", SETTINGS, measure)
    monkeypatch.setattr(study, "__version__", "9.9")
    assert once(tmp_path, "a", SETTINGS, measure)["skipit"] == "9.9"
    assert measure.times == 2


@pytest.mark.parametrize("text", ["", '{"figure": 1', '{"figure": 7}', "[]", '{"steps": 39, "figure": 7}'])
def test_a_damaged_cell_is_measured_again(text: str, tmp_path: Path) -> None:
    measure = Measure()
    path = tmp_path / "cells" / once(tmp_path, "a", SETTINGS, measure)["file"]
    path.write_text(text)
    assert once(tmp_path, "a", SETTINGS, measure)["figure"] == 2
    assert json.loads(path.read_text())["steps"] == 40


def test_a_cell_without_what_is_needed_is_measured_again(tmp_path: Path) -> None:
    measure = Measure()
    once(tmp_path, "a", SETTINGS, measure)
    assert once(tmp_path, "a", SETTINGS, measure, needs=["figure"])["figure"] == 1
    assert once(tmp_path, "a", SETTINGS, measure, needs=["timed"])["figure"] == 2


def test_a_profile_is_measured_once_and_again_of_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = study.profile_model

    def measure(model: Any, processor: Any, rows: Any, **options: Any) -> Any:
        asked.append(len(rows))
        return real(model, processor, rows, **options)

    monkeypatch.setattr(study, "profile_model", measure)
    first = Study(profiled=8, out=tmp_path).profile
    again = Study(profiled=8, steps=3, out=tmp_path).profile
    assert asked == [8]
    plans = [make_plan(found, 0.5) for found in (first, again)]
    assert plans[0].weight.equal(plans[1].weight)
    assert Study(profiled=9, out=tmp_path).profile.model == first.model
    assert asked == [8, 9]
    assert [Study(profiled=9, decide_at=at, out=tmp_path).profile.decide_at for at in ((0,), None, None)] == [
        (0,),
        None,
        None,
    ]
    assert asked == [8, 9, 9]


def test_options_have_one_name_everywhere_and_the_old_ones() -> None:
    parser = command("studies.some_study", "What it asks.", samples=5, seeds=[0], steps=3, out=None)
    assert parser.prog == "scripts/study some-study"
    given = parser.parse_args(["--rows", "7", "--seeds", "1", "2"])
    assert Study.of(given, 2, calibration=4) == Study(seed=2, samples=7, steps=3, calibration=4)
    settings = Study.of(given, 2).settings()
    assert "out" not in settings
    assert settings["samples"] == 7


def test_markdown_puts_numbers_on_the_right() -> None:
    table = markdown(["", "ms", "why"], [["dense", "7.1", ""]], text=(0, 2))
    assert table.splitlines() == ["| | ms | why |", "|---|---:|---|", "| dense | 7.1 | |"]


def test_every_study_is_listed_and_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert {"peers", "profile-cost", "stability", "pretrain"} < set(studies())
    for name, what in studies().items():
        assert f"  {name:20}{what}\n" in listed  # two spaces after the longest
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        assert f"usage: scripts/study {name} [-h]" in capsys.readouterr().out


def test_a_name_that_is_none_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["abltion"]) == 2
    assert "got 'abltion', expected one of ablation, budget, counts, curve, " in (said := capsys.readouterr().err)
    assert said.endswith("Did you mean ablation?\n")


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stability", "--every", "0", "--calibration", "1", "--out", str(tmp_path)]) == 1
    assert "scripts/study stability: `batches` has 1 batches and `every` is 0; expected" in capsys.readouterr().err
