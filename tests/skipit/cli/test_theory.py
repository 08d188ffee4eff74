"""`skipit theory`: the tightness table of a profile, and of a model's tensors."""

from pathlib import Path

from command_line import refused, skipit


def _statements(said: str) -> list[int]:
    return [int(line.split()[0]) for line in said.splitlines() if line[:3].strip().isdigit()]


def test_a_profile_shows_what_its_tables_can(chain: Path) -> None:
    result = skipit("theory", chain / "profile")
    assert result.code == 0, result.err
    assert set(_statements(result.out)) == {1}
    assert "1 is exact, above 1 would be false" in result.out


def test_a_model_and_data_show_the_rest_in_order(chain: Path) -> None:
    result = skipit("theory", chain / "profile", "--model", "reference", "--data", "reference", "--samples", 1)
    assert result.code == 0, result.err
    numbers = _statements(result.out)
    assert numbers == sorted(numbers)
    assert {2, 3, 7, 9} <= set(numbers)


def test_a_model_without_data_is_refused(chain: Path) -> None:
    assert "--model and --data go together" in refused("theory", chain / "profile", "--model", "reference")
