"""`skipit theory`: the tightness table of a profile, and of a model's tensors."""

from pathlib import Path

import pytest

from skipit.cli.main import main


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theory") / "profile"
    assert main(["profile", "reference", "reference", "--samples", "4", "--draws", "1", "--out", str(out)]) == 0
    return out


def _statements(said: str) -> list[int]:
    return [int(line.split()[0]) for line in said.splitlines() if line[:3].strip().isdigit()]


def test_a_profile_shows_what_its_tables_can(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", str(profile)]) == 0
    said = capsys.readouterr().out
    assert set(_statements(said)) == {1}
    assert "1 is exact, above 1 would be false" in said


def test_a_model_and_data_show_the_rest_in_order(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", str(profile), "--model", "reference", "--data", "reference", "--samples", "1"]) == 0
    numbers = _statements(capsys.readouterr().out)
    assert numbers == sorted(numbers)
    assert {2, 3, 7, 9} <= set(numbers)


def test_a_model_without_data_is_refused(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", str(profile), "--model", "reference"]) == 1
    assert "--model and --data go together" in capsys.readouterr().err
