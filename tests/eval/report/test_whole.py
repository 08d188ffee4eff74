"""The report is one well-formed page that needs nothing else, escapes what others wrote, shows what was measured."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from skipit.eval.report.page import POLICY
from skipit.eval.report.whole import report
from skipit.router import RouterConfig
from skipit.theory.plan import points_text

PARTS = {"cost", "saving", "tracking", "peers", "maps", "controlled", "quadrants", "pattern", "adaptivity", "depth"}
PARTS |= {"transfer"}
# Keys of parts that need not be there.
MEASURED = ("theory", "units", "growing", "quadrants", "pattern", "adaptivity", "calibration", "baselines", "transfer")
MEASURED += ("examples",)
VOID = {"meta", "link", "img", "br", "hr", "input"}
LOADING = ("src", "href", "srcset", "data", "poster", "action", "background")


class Outline(HTMLParser):
    """What a page consists of; a tag that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)
        if name := dict(attrs).get("id"):
            self.ids.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


@pytest.fixture(scope="session")
def outline(page: str) -> Outline:
    return Outline(page)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not written, which takes most of a report's time."""
    monkeypatch.setattr("skipit.eval.report.page.as_svg", lambda figure: b"<svg/>")


def words(values: dict[str, Any]) -> str:
    """The text of a report without pictures of examples."""
    return " ".join("".join(Outline(report({**values, "examples": []})).text).split())


def test_the_page_is_well_formed(outline: Outline, page: str) -> None:
    assert outline.open == []
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(outline.ids) == len(set(outline.ids))


def test_links_lead_to_parts_of_the_page(outline: Outline) -> None:
    targets = [attributes["href"] for tag, attributes in outline.tags if tag == "a"]
    assert len(targets) > 20
    assert {str(target) for target in targets} <= {f"#{name}" for name in outline.ids}


def test_nothing_is_loaded_and_nothing_runs(outline: Outline, page: str) -> None:
    sources = [str(a[name]) for _, a in outline.tags for name in LOADING if name in a]
    assert not [source for source in sources if not source.startswith(("#", "data:"))]
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in outline.tags}
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")]
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in outline.tags


def test_it_fits_a_phone(outline: Outline) -> None:
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in outline.tags


def test_every_picture_says_what_it_shows(outline: Outline) -> None:
    pictures = [attributes for tag, attributes in outline.tags if tag == "img"]
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture["alt"]
        drawn = base64.b64decode(str(picture["src"]).partition(",")[2])
        assert b"<svg" in drawn


def test_every_section_links_to_what_made_it(page: str) -> None:
    sections = re.findall(r'<section id="([a-z]+)">(.*?)</section>', page, flags=re.DOTALL)
    names = [name for name, _ in sections]
    assert names[0] == "summary"
    assert {"cost", "saving", "tracking", "maps", "controlled", "quadrants", "peers", "depth", "transfer"} <= set(names)
    for name, body in sections:
        if name not in ("summary", "missing", "limits", "made"):
            assert 'href="#made-' in body, name
            assert f'href="#{name}"' in dict(sections)["summary"], f"{name} is not in the summary"


def test_what_others_wrote_is_text(page: str, outline: Outline) -> None:
    assert "<b>random</b>" not in page
    text = "".join(outline.text)
    assert "<b>random</b> $x$" in text
    assert "neutral <script>" in text


@pytest.mark.usefixtures("undrawn")
def test_answers_are_text(values: dict[str, Any]) -> None:
    values["settings"]["data"] = '"><img src=http://x onerror=alert(1)>'
    values["dense"]["by_kind"]["<i>k"] = values["gated"]["by_kind"]["<i>k"] = 0.5
    values["gated"]["difference"]["kinds"]["<i>k"] = values["gated"]["difference"]["all"]
    found = Outline(report({**values, "examples": []}))
    assert not [a for tag, a in found.tags if tag == "img" and "onerror" in a]
    assert "<i>k" in "".join(found.text)


def test_how_it_was_made(values: dict[str, Any], outline: Outline) -> None:
    text = "".join(outline.text)
    assert values["made"]["eval"]["command"] in text
    assert values["made"]["eval"]["hardware"] in text
    assert "scripts/study peers --seeds 0 1 2" in text
    assert "seed 0" in text
    assert f"they decide by the states that enter {points_text(RouterConfig.decide_at)}." in text
    for name in ("eval", "checkpoint", "profile", "baselines", "transfer", "also-1", "also-2", "also-3"):
        assert f"made-{name}" in outline.ids


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_is_absent_and_says_what_to_run(values: dict[str, Any]) -> None:
    for name in MEASURED:
        values.pop(name)
    values["gated"]["tracking"] = None
    for router in values["also"]:
        router["tracking"] = None
    found = Outline(report(values))
    assert PARTS & set(found.ids) == {"cost", "saving", "maps"}
    text = " ".join("".join(found.text).split())
    assert "missing" in found.ids
    for command in (
        "skipit profile reference reference --out PROFILE",
        "--profile PROFILE --out DIR",
        "scripts/study peers --latency --out BASELINES",
        "--baselines BASELINES --out DIR",
        "scripts/study transfer --out TRANSFER",
        "--transfer TRANSFER --out DIR",
    ):
        assert command in text, command


@pytest.mark.usefixtures("undrawn")
def test_commands_it_names_parse(values: dict[str, Any]) -> None:
    import shlex

    from skipit.cli.main import build_parser

    for name in MEASURED:
        values.pop(name)
    values["gated"]["tracking"] = None
    values["also"] = []
    commands = re.findall(r"<code>(skipit .*?)</code>", report(values))
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_made_of_its_numbers_alone(made: Path, values: dict[str, Any]) -> None:
    assert words(values) == words(values)
    changed = {**values, "gated": {**values["gated"], "accuracy": 0.123}}
    assert "12.3%" in words(changed)
    assert "12.3%" not in words(values)


@pytest.mark.usefixtures("undrawn")
def test_limits_depend_on_what_was_done(values: dict[str, Any]) -> None:
    assert "its own weights without gates, which are fine-tuned" in words(values)
    assert "No router that began neutral is shown" not in words(values)
    values["settings"]["dense"] = "untouched"
    values["also"] = []
    assert "its own weights without gates" not in words(values)
    assert "No router that began neutral is shown" in words(values)
