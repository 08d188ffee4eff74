"""A page in HTML that needs nothing but itself: text is escaped, pictures lie inside, nothing is requested or executed.

Whatever is not `Html` already is escaped: answers, questions and names of files come from others.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from skipit.eval.plots.style import as_svg

STYLE = Path(__file__).with_name("page.css")
# What a browser may load: pictures inside the page, and its own style. Nothing else, and no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
POINTS_PER_PIXEL = 72 / 96


class Html(str):
    """Markup: what may stand in a page as it is. Only the functions of this file make it."""

    __slots__ = ()


Content = Html | str


def markup(content: Content) -> Html:
    """Content as markup: `Html` as it is, any other text escaped.

    Example:
        >>> markup("a < b"), markup(element("b", "a < b"))
        ('a &lt; b', '<b>a &lt; b</b>')
    """
    return content if isinstance(content, Html) else Html(escape(str(content), quote=True))


def joined(parts: Iterable[Content], between: str = "") -> Html:
    """Parts one after the other."""
    return Html(markup(between).join(markup(part) for part in parts))


def element(tag: str, *children: Content, **attributes: str) -> Html:
    """An element with its children; `_` in the name of an attribute is `-`, and one at its end is left out.

    Example:
        >>> element("td", "5 %", class_="number")
        '<td class="number">5 %</td>'
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    opened = " ".join([tag, *(f'{name}="{escape(value, quote=True)}"' for name, value in names.items())])
    if tag in ("img", "link", "meta"):
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{joined(children)}</{tag}>")


def paragraph(*parts: Content, **attributes: str) -> Html:
    """A paragraph."""
    return element("p", *parts, **attributes)


def strong(text: Content, mood: str = "") -> Html:
    """Words that carry a verdict; `mood` may be "good" or "bad"."""
    return element("strong", text, **({"class_": mood} if mood else {}))


def heading(text: Content) -> Html:
    """A heading inside a section."""
    return element("h3", text)


def code(text: str) -> Html:
    """A command, or a name as it is typed."""
    return element("code", text)


def link(target: str, text: Content) -> Html:
    """A link to an element of the same page, by its id."""
    return element("a", text, href=f"#{target}")


def bullets(parts: Sequence[Content]) -> Html:
    """A list."""
    return element("ul", *(element("li", part) for part in parts))


def table(caption: Content, head: Sequence[Content], rows: Sequence[Sequence[Content]]) -> Html:
    """A table in a box that scrolls by itself; the first column names the rows.

    Each cell knows the head of its column: a phone has no room for columns and shows cells below each other.

    Raises:
        ValueError: If a row is shorter or longer than the head.

    Example:
        >>> table("Accuracy", ["", "dense"], [["cell", "100.0%"]]).count("<tr>")
        2
    """
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"`rows` has one of {len(wrong[0])} cells, expected {len(head)} as in the head. Fill it up.")
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = []
    for name, *cells in rows:
        values = (element("td", cell, data_head=str(of)) for cell, of in zip(cells, head[1:], strict=True))
        body.append(element("tr", element("th", name, scope="row"), *values))
    drawn = element("table", element("caption", caption), element("thead", top), element("tbody", *body))
    # What scrolls can be reached with the keyboard.
    return element("div", drawn, class_="scroll", tabindex="0")


def figure(drawn: Figure, alt: str, caption: Content = "") -> Html:
    """A figure as a picture inside the page, in a box that scrolls where the screen is narrow.

    Args:
        drawn: with matplotlib.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
    """
    # A picture of its own, not elements of the page: the ids in it cannot meet those of another figure.
    source = "data:image/svg+xml;base64," + base64.b64encode(as_svg(drawn)).decode("ascii")
    wide, high = (round(inches * 72 / POINTS_PER_PIXEL) for inches in drawn.get_size_inches())
    picture = element("img", src=source, alt=alt, width=str(wide), height=str(high), style=f"--wide: {wide}px")
    boxed = element("div", picture, class_="scroll picture", tabindex="0")
    return element("figure", boxed, *([element("figcaption", caption)] if caption else []))


def section(name: str, title: Content, *content: Content) -> Html:
    """A part of the page that links can lead to."""
    return element("section", element("h2", title), *content, id=name)


def page(title: str, *content: Content) -> str:
    """The whole document."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
        # An empty icon inside the page: browsers ask the server for one otherwise.
        element("link", rel="icon", href="data:,"),
    )
    text = f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *content)), lang='en')}\n"
    # A file's name need not be text in any encoding, the page must be.
    return text.encode("utf-8", "replace").decode("utf-8")
