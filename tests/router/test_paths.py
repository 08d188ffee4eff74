"""What is said of a path where nothing is."""

from pathlib import Path

import pytest

from skipit.router import CheckpointError
from skipit.router.lock import beside
from skipit.router.paths import check_there, is_path, missing


def test_the_nearest_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "checkpoint").mkdir(parents=True)
    assert missing(tmp_path / "runs") == ""
    assert missing(tmp_path / "runs" / "chekpoint").endswith(f" Did you mean {tmp_path}/runs/checkpoint?")
    assert missing(tmp_path / "rums" / "checkpoint").endswith(f" Did you mean {tmp_path}/runs?")
    for name in ("nothing like it", "a" * 5000, "a\0b", "a/" * 3000):
        assert missing(tmp_path / name) == "no such file or folder.", name[:20]


def test_what_a_killed_run_left_is_found(tmp_path: Path) -> None:
    """`--overwrite` ends in two renames; the next run with that `--out` puts it back, and a reader says how."""
    old = beside(tmp_path / "profile", "old")
    old.mkdir()
    with pytest.raises(CheckpointError, match=f"profile: no such file or folder. .* `mv {old} {tmp_path}/profile`"):
        check_there(tmp_path / "profile")
    old.rename(tmp_path / "profile")
    check_there(tmp_path / "profile")


def test_what_no_hub_has() -> None:
    assert all(map(is_path, ("./a", "/a/b", "~/a", "runs/one/checkpoint")))
    assert not any(map(is_path, ("reference", "someone/model")))
