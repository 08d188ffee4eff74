"""Two claims of the paper as tested in a report: the 2x2 experiment, and late entry and early exit of vision tokens."""

from collections.abc import Mapping
from typing import Any

from .controlled import missing
from .page import Content, Html, heading, joined, paragraph, strong, table
from .part import Missing, Part, Values, between, number, p_value, percent, plural

BOTH = "redundant, unattended"
MOODS = {"found": "good", "not found": "bad"}


def quadrants(values: Values) -> Part | Missing:
    """Skip sets with high or low redundancy and high or low cross-attention, at equal FLOPs."""
    title = "Redundant and little looked at: the 2x2 experiment"
    if "quadrants" not in values:
        return missing(values, title)
    body: list[Html] = []
    verdicts: list[Html] = []
    for notion, found in values["quadrants"].items():
        cell = found["cells"][BOTH]
        accuracy, kl = found["verdict"]["accuracy"], found["verdict"]["kl"]
        verdicts.append(
            joined(
                [
                    f"With {notion} as redundancy, that skipping vision is cheapest where it is redundant and little "
                    "looked at is ",
                    strong(accuracy, MOODS.get(accuracy, "")),
                    " by accuracy, ",
                    strong(kl, MOODS.get(kl, "")),
                    f" by divergence ({between(cell['accuracy'], '.1f', 100)}% right there; without skipping "
                    f"{between(found['dense'], '.1f', 100)}%).",
                ]
            )
        )
        body += _quadrants(notion, found)
    return Part("quadrants", title, verdicts, body, ("eval", "profile"))


def _quadrants(notion: str, found: Mapping[str, Any]) -> list[Html]:
    rows: list[list[Content]] = []
    for name, cell in found["cells"].items():
        layers = ", ".join(map(str, cell["layers"])) or "none"
        rows.append(
            [
                name,
                layers,
                percent(cell["compute"]),
                between(cell["accuracy"], ".1f", 100),
                between(cell["kl"], ".3f"),
                plural(len(cell["sets"]), "set"),
            ]
        )
    effects = [
        [title, between(found[key]["accuracy"], "+.1f", 100), between(found[key]["kl"], "+.3f")]
        for key, title in (
            ("redundancy_effect", "redundant instead of not"),
            ("attention_effect", "little looked at instead of much"),
            ("interaction", "both together, beyond their sum"),
            ("margin", "redundant and little looked at, against the best of the others"),
        )
        if key in found
    ]
    head = ["vision layers that are", "layers", "FLOPs", "accuracy, % [95%]", "KL, nats [95%]", "measured"]
    note = [paragraph(found["note"], class_="soft")] if found.get("note") else []
    return [
        heading(f"Redundancy: {notion}"),
        paragraph(
            f"Layers are split at the median of {notion} and at that of cross-attention (their rank correlation "
            f"over layers: {number(found['correlation'], '+.2f')}); in each quadrant, vision tokens skip sets of "
            f"layers that save equal FLOPs, on {plural(found['rows'], 'row')} (K/V policy {found['kv']})."
        ),
        table("The four quadrants", head, rows),
        table("What redundancy and attention change", ["", "accuracy, points [95%]", "KL, nats [95%]"], effects),
        paragraph(
            "Intervals are over rows: one without width means that all rows agree, not that new rows would.",
            class_="soft",
        ),
        *note,
    ]


def pattern(values: Values) -> Part | Missing:
    """Do vision tokens enter late and leave early, in the theory's tables and in what was learned?"""
    title = "Late entry and early exit of vision tokens"
    if "pattern" not in values:
        return missing(values, title)
    found = values["pattern"]
    rows: list[list[Content]] = [
        [name, found["theory"][name], found["learned"][name]] for name in ("late entry", "early exit", "both")
    ]
    thirds = [[f"{name} third of the layers", between(v, ".1f", 100)] for name, v in found["thirds"].items()]
    stretches = [
        [f"{title} minus middle", between(found[key]["difference"], "+.1f", 100)]
        + [p_value(found[key][p]) for p in ("p", "p_shift")]
        for key, title in (("early", "first"), ("late", "last"))
    ]
    body = [
        paragraph(
            "The paper reports that vision tokens are redundant early and late and that fusion happens in the "
            "middle. That is a hypothesis about each model. Theory: a first (late entry) or last (early exit) "
            f"stretch of layers with geometric redundancy of at most {found['eps']:g} and cross-attention of at "
            f"most {found['nu']:g}. Learned: vision tokens skip the first or last layers more than those in the middle."
        ),
        table("Is the pattern there?", ["", "in the theory's tables", "in learned skips"], rows),
        table("Share of vision tokens that skip", ["", "% [95%]"], thirds),
        table("Differences of these, points", ["", "points [95%]", "p", "p_shift"], stretches),
    ]
    words: list[Content] = []
    for name in ("late entry", "early exit"):
        verdict = found["learned"][name]
        words += [f"{name.capitalize()} of vision tokens: ", strong(verdict, MOODS.get(verdict, ""))]
        words.append(f" in what was learned, {found['theory'][name]} in the theory's tables. ")
    return Part("pattern", title, [joined(words)], body, ("eval", "profile"))
