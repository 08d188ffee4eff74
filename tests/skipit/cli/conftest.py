"""The folders of one tiny data flow, each made by its verb, once for all tests of verbs."""

from pathlib import Path
from typing import Any

import pytest
from command_line import EVAL, TRAIN, skipit

from skipit.train.reference.data import reference_dataset


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of profile, plan, run and checkpoint, with what each verb printed."""
    at = tmp_path_factory.mktemp("chain")
    reference_dataset("test", 6)[1]["images"][0].save(at / "grid.png")
    make(at, "profile", "reference", "reference", "--samples", 12, "--draws", 1, "--out", at / "profile")
    make(at, "plan", at / "profile", "--budget", 0.6, "--out", at / "plan")
    make(at, "train", "reference", "reference", "--plan", at / "plan", *TRAIN, "--out", at / "run")
    make(at, "export", at / "run", "--out", at / "checkpoint")
    return at


@pytest.fixture(scope="session")
def evaluated(chain: Path) -> Path:
    """The same folder with the report of its checkpoint, which takes longer than all the rest."""
    make(
        chain, "eval", chain / "checkpoint", "reference", *EVAL, "--profile", chain / "profile", "--out", chain / "eval"
    )
    return chain


def make(at: Path, verb: str, *argv: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipit.train.display.EVERY", float("inf"))  # a slow machine would say more
        result = skipit(verb, *argv)
    assert result.code == 0, result.err
    (at / f"{verb}.out").write_text(result.out)
    (at / f"{verb}.err").write_text(result.err)
