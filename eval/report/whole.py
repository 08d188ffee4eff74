"""The report of an evaluation: one page that a sceptic can read on a phone, made of the numbers in eval.json alone."""

from collections.abc import Sequence

from PIL.Image import Image

from skipit.train.data.used import HeldOut

from .claims import pattern, quadrants
from .controlled import controlled
from .cost import cost, saving
from .inputs import adaptivity, depth_maps
from .made import limits, made_links, made_section
from .maps import heat_maps
from .page import Content, Html, bullets, element, joined, link, page, paragraph, section
from .part import Missing, Part, Values
from .peers import peers
from .tracking import tracking
from .transfer import transfer


def report(values: Values, pictures: Sequence[Image] = ()) -> str:
    """Write the page.

    Args:
        values: what eval.json holds: see docs/evaluation.md. Numbers that could not be computed are None.
        pictures: images of `values["examples"]`, in their order.

    Returns:
        HTML that needs no other file.
    """
    every = [
        cost(values),
        saving(values),
        tracking(values),
        peers(values),
        heat_maps(values),
        controlled(values),
        quadrants(values),
        pattern(values),
        adaptivity(values),
        depth_maps(values, pictures),
        transfer(values),
    ]
    parts = [part for part in every if isinstance(part, Part)]
    absent = [part for part in every if isinstance(part, Missing)]
    settings = values["settings"]
    title = f"skipit: {settings['checkpoint']} on {settings['data']}"
    began = f", gates began as {settings['init']!r}" if settings.get("init") else ""
    content: list[Content] = [
        element("h1", "What do the learned skips cost, save, and follow?"),
        paragraph(
            f"Checkpoint {settings['checkpoint']}, made from {settings['base']}, at budget {settings['budget']}, "
            f"keys and values of skipped tokens: {settings['kv']}{began}. Rows {_known(values)}.",
            class_="soft",
        ),
        _summary(parts),
    ]
    if absent:
        content.append(_not_measured(absent))
    content += [section(part.name, part.title, *part.body, made_links(list(part.made), values)) for part in parts]
    content += [limits(values), made_section(values)]
    return page(title, *content)


def _known(values: Values) -> str:
    return HeldOut(**values.get("held_out") or {"rows": values["dense"]["rows"], "used": {}}).sentence()


def _summary(parts: Sequence[Part]) -> Html:
    lines = [joined([element("b", link(part.name, part.title)), bullets(list(part.verdict))]) for part in parts]
    return section("summary", "In short", element("div", bullets(lines), class_="verdicts"))


def _not_measured(absent: Sequence[Missing]) -> Html:
    told = paragraph("These parts are not in this report:")
    lines = [joined([part.title.rstrip("?.") + ": ", part.how]) for part in absent]
    return section("missing", "Not measured", told, bullets(lines))
