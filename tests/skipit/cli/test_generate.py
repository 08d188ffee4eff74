"""`skipit generate`: the answer, its depth map, and questions that cannot be asked."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, refused, skipit
from PIL import Image


def test_generate(chain: Path, tmp_path: Path) -> None:
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "read the top row .")
    result = skipit(*ask, "--depth-map", tmp_path / "depth.png")
    assert result.code == 0, result.err
    assert re.fullmatch(r"\d \d \d\n", result.out), "the answer alone is on standard output"
    assert re.search(r"^\(\d+\.\d% of the dense decoder's FLOPs\)$", result.err, re.MULTILINE)
    assert f"depth map: {tmp_path / 'depth.png'}" in result.err
    with Image.open(tmp_path / "depth.png") as picture:
        picture.verify()
    assert skipit(*ask, "--budget", 0.6) == Result(0, result.out, result.err.partition("depth map")[0])
    dense = skipit(*ask, "--dense")
    assert (dense.code, dense.err) == (0, "")


def test_a_budget_of_this_prompt(chain: Path) -> None:
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "read the top row .")
    half, most = (skipit(*ask, "--budget-per", "input", "--budget", budget) for budget in (0.5, 0.9))  # not calibrated
    assert (half.code, most.code) == (0, 0), half.err + most.err
    shares = [float(re.match(r"\((\d+\.\d)% of", said.err)[1]) for said in (half, most)]  # type: ignore[index]
    assert 49 < shares[0] < 65  # that of the prompt, and of what was generated
    assert 89 < shares[1] < 100
    default = skipit(*ask, "--budget-per", "input")  # 0.6 is the default point
    assert default == skipit(*ask, "--budget-per", "input", "--budget", 0.6)
    assert "expected more than 0." in refused(*ask, "--budget-per", "input", "--budget", 0.01)


def test_lossless(chain: Path) -> None:
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "read the top row .")
    dense = skipit(*ask, "--dense")
    for more in ((), ("--draft-budget", 0.6, "--draft-tokens", 2)):
        result = skipit(*ask, "--lossless", *more)
        assert (result.code, result.out) == (0, dense.out)
        assert re.fullmatch(
            r"\(\d+ of \d+ drafted tokens accepted in \d+ passes of the dense model: \d\.\d tokens a pass\)\n",
            result.err,
        )
    assert "`budget`: got '0.3', this router is calibrated for: 0.6." in refused(
        *ask, "--lossless", "--draft-budget", 0.3
    )
    for flag in (("--budget", 0.6), ("--budget-per", "input"), ("--depth-map", "d.png"), ("--dense",)):
        said = refused(*ask, "--lossless", *flag)
        assert said.startswith("skipit: a lossless run answers as the dense model: leave out --dense, --depth-map")
    for flag in (("--draft-budget", 0.6), ("--draft-tokens", 2)):
        assert refused(*ask, *flag).startswith("skipit: nothing is drafted without --lossless: add it, or leave out")


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_not_a_checkpoint(chain: Path, tmp_path: Path, verb: str) -> None:
    rest = {"generate": ("--image", chain / "grid.png", "--prompt", "?"), "eval": ("reference", "--out", "x")}[verb]
    said = refused(verb, tmp_path, *rest)
    assert said.startswith(f"skipit: {tmp_path} has no router_config.json: it is not a gated checkpoint")


@pytest.mark.parametrize("name", ["no.png", "text.png"])
def test_unreadable_image_file(chain: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    said = refused("generate", chain / "checkpoint", "--image", tmp_path / name, "--prompt", "?")
    assert said.startswith(f"skipit: image {tmp_path / name} cannot be read: ")


def test_no_such_operating_point(chain: Path) -> None:
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "?")
    assert "`budget`: got '0.3', this router is calibrated for: 0.6." in refused(*ask, "--budget", 0.3)


@pytest.mark.parametrize("flag", [("--budget", 0.6), ("--budget-per", "input"), ("--depth-map", "d.png")])
def test_a_dense_run_has_neither_budget_nor_depth(chain: Path, flag: tuple[Any, ...]) -> None:
    ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "?", "--dense", *flag)
    assert refused(*ask).startswith("skipit: a dense run executes every layer for every token: leave out")
