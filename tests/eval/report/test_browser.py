"""The report in a real browser, without network, on a phone and on a desktop."""

from pathlib import Path

import pytest
from browser import Page, find_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found on PATH: install one to run this")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_report(made: Path, tmp_path: Path, width: int, scheme: str) -> None:
    assert BROWSER is not None
    with Page(BROWSER, tmp_path / "profile", width) as page:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open((made / "report.html").as_uri())
        assert page.complaints == []
        assert not [url for url in page.requests if not url.startswith(("file:", "data:"))]
        assert len([url for url in page.requests if url.startswith("file:")]) == 1
        assert page.value("innerWidth") == width
        assert page.value("document.documentElement.scrollWidth") <= width
        # Whatever is wider than the screen is inside a box that scrolls.
        outside = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && "
        outside += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        assert page.value(outside) == []
        if width < 600:  # no cell of a table is beyond the edge of its box, and each says what it is of
            tables = "[...document.querySelectorAll('.scroll:not(.picture)')]"
            assert page.value(f"{tables}.length") > 10
            cut = f"{tables}.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText.slice(0, 80))"
            assert page.value(cut) == []
            shift = "getComputedStyle(document.querySelector('td[data-head=\"p_shift\"]'), '::before').content"
            assert page.value(shift) == '"p_shift"'
        pictures = page.value("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
        assert len(pictures) >= 8
        assert all(complete and wide > 0 and high > 0 for complete, wide, high in pictures)
        assert page.value("[...document.links].filter(a => !document.querySelector(a.hash)).length") == 0
        assert page.value("document.links.length") > 20
        # Following a link moves the page.
        page.value("document.querySelector('a[href=\"#made-eval\"]').click()")
        assert page.value("document.querySelector('#made-eval').getBoundingClientRect().top") < 800
        assert page.value("scrollY") > 0


def test_a_page_that_asks_for_something_is_noticed(tmp_path: Path) -> None:
    assert BROWSER is not None
    bad = tmp_path / "bad.html"
    bad.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>")
    with Page(BROWSER, tmp_path / "profile", 390) as page:
        page.open(bad.as_uri())
        assert "http://127.0.0.1:9/x.png" in page.requests
        assert page.complaints
        assert page.value("document.images[0].naturalWidth") == 0
