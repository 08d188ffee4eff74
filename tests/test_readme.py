"""What the README, CONTRIBUTING.md and the pages in docs/ say about the repository is true."""

import re
import shlex
import subprocess
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from skipit.cli.main import build_parser
from studies.__main__ import main as run_study

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
FOLDERS = ("router", "theory", "train", "eval", "src/skipit", "scripts", "scripts/studies", "tests", "docs")
FENCED = re.compile(r"^```\w*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$`.*?`\$", flags=re.DOTALL)
ROOTS = "|".join(sorted({folder.split("/")[0] for folder in FOLDERS}))
# A folder, a file with a suffix, or a script: `train/loss` is none of them.
FILE = re.compile(rf"(?:(?:{ROOTS})/[\w./-]*(?:\.\w+|/)|(?:scripts|\.ci)/\w+)(?![\w/])")
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def code(text: str) -> list[str]:
    """The lines of a page that are typed: those of fenced blocks, and indented ones."""
    blocks = FENCED.findall(text)
    return [line for block in blocks for line in block.splitlines()] + re.findall(
        r"^ {4}(\S.*)", FENCED.sub("", text), flags=re.MULTILINE
    )


def quoted(text: str) -> list[str]:
    """What a page has in backticks, outside of fenced blocks and formulas."""
    return re.findall(r"`([^`\n]+)`", FORMULA.sub("", FENCED.sub("", text)))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links have them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def found(pattern: str) -> list[str]:
    """Everything on all pages that is typed and matches, once."""
    return sorted({hit.strip() for text in PAGES.values() for line in code(text) for hit in re.findall(pattern, line)})


def module_of(name: str) -> tuple[Path, list[str]]:
    """The file of a dotted name's module, and what is left of the name; nothing is imported."""
    top, *parts = name.split(".")
    path = ROOT / ("scripts/studies" if top == "studies" else "src/skipit")
    if top == "skipit" and parts[0] in FOLDERS:
        path = ROOT / parts.pop(0)
    while parts and ((path / parts[0]).is_dir() or (path / f"{parts[0]}.py").is_file()):
        path /= parts.pop(0)
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")), parts


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_folder_has_its_line() -> None:
    lines = README.split("## Folders", 1)[1].split("```", 2)[1].strip("\n").splitlines()
    assert [line.split()[0] for line in lines] == [f"{folder}/" for folder in FOLDERS]
    assert all(len(line.split()) > 4 for line in lines)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    roots = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert roots <= set(ROOTS.split("|"))


@pytest.mark.parametrize("command", found(r"^(skipit [^#]+)"))
def test_commands_parse(command: str) -> None:
    build_parser().parse_args(shlex.split(command.replace("SEED", "0"))[1:])


@pytest.mark.parametrize("script", found(r"^(?:scripts|\.ci)/\w+(?![\w/])"))
def test_scripts_exist_and_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@EVERY_PAGE
def test_studies_exist(page: str) -> None:
    for study in re.findall(r"scripts/study ([a-z][a-z-]*)", PAGES[page]):
        path = ROOT / "scripts" / "studies" / study.replace("-", "_")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), study


@EVERY_PAGE
def test_links_lead_somewhere(page: str) -> None:
    text = FORMULA.sub("", FENCED.sub("", PAGES[page]))  # formulas have brackets, too
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@EVERY_PAGE
def test_files_exist(page: str) -> None:
    for name in quoted(PAGES[page]):
        if path := FILE.match(name):
            assert (ROOT / path[0]).exists(), name
        elif bare := re.match(r"\w+\.py(?!\w)", name):
            assert any(any((ROOT / folder).rglob(bare[0])) for folder in FOLDERS), name
        if function := re.fullmatch(r"(\S+\.py): (\w+)", name):
            assert f"def {function[2]}(" in (ROOT / function[1]).read_text(encoding="utf-8"), name


@EVERY_PAGE
def test_python_names_exist(page: str) -> None:
    for text in (*quoted(PAGES[page]), *code(PAGES[page])):
        for name in re.findall(r"(?<![\w./-])(?:skipit|studies)(?:\.[A-Za-z_]\w*)+", text):
            source, rest = module_of(name)
            assert not rest or re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")), name


def test_the_families_are_those_of_their_page() -> None:
    names = re.findall(r"^\| ([^|,\s]+)[^|]*\(`[\w.-]+`\) \|", PAGES["docs/families.md"], flags=re.MULTILINE)
    assert len(names) == 15
    assert "Fifteen families" in README
    assert all(name in README for name in names)


def test_the_theory_names_its_code() -> None:
    files = (path for folder in ("theory", "eval", "tests/theory") for path in (ROOT / folder).rglob("*.py"))
    defined = set(
        re.findall(r"^ *(?:def|class) (\w+)", "\n".join(path.read_text(encoding="utf-8") for path in files), re.M)
    )
    names = {name for name in quoted(PAGES["docs/theory.md"]) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", name)}
    assert len(names) > 20
    assert names <= defined


def typed_studies() -> list[str]:
    """Every study on the pages as it is typed, with its options: on a line of its own, or in a sentence."""
    texts = [FENCED.sub("", text) for text in PAGES.values()]
    inline = [" ".join(hit.split()) for text in texts for hit in re.findall(r"`(scripts/study [a-z][^`]*)`", text)]
    return sorted({*found(r"^scripts/study [a-z][^#]*"), *inline})


@pytest.mark.parametrize("command", typed_studies())
def test_studies_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = ArgumentParser.parse_args

    def parse_only(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise InterruptedError

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr("sys.argv", ["study"])
    with pytest.raises(InterruptedError):
        run_study(shlex.split(command)[1:])
