"""How the numbers of a report were made, to be linked to, and what they do not show."""

from collections.abc import Mapping
from typing import Any

from .groups import groups
from .page import Content, Html, bullets, code, element, joined, link, paragraph, section
from .part import Values, plural


def made_links(names: tuple[str, ...] | list[str], values: Values) -> Html:
    """Where a section's numbers come from: links to their entries."""
    known = [name for name in dict.fromkeys(names) if name in values["made"]]
    links = joined((link(f"made-{name}", values["made"][name]["title"]) for name in known), ", ")
    return paragraph("How these numbers were made: ", links, class_="made")


def made_section(values: Values) -> Html:
    """Commands, versions, seeds and hardware, one entry each with an anchor."""
    entries: list[Html] = []
    for name, made in values["made"].items():
        entries.append(element("dt", made["title"], id=f"made-{name}"))
        entries += [element("dd", line) for line in _lines(made)]
    told = paragraph(
        "Every section above links to what made its numbers. All numbers are in eval.json beside this page."
    )
    return section("made", "How this was made", told, element("dl", *entries))


def _lines(made: Mapping[str, Any]) -> list[Content]:
    lines: list[Content] = []
    if made.get("command"):
        lines.append(code(made["command"]))
    facts = [f"seed {made['seed']}"] if made.get("seed") is not None else []
    facts += [str(made[key]) for key in ("created", "hardware", "platform") if made.get(key)]
    if made.get("python"):
        facts.append(f"Python {made['python']}")
    facts += [f"{name} {version}" for name, version in (made.get("versions") or {}).items()]
    if facts:
        lines.append(", ".join(facts))
    if made.get("note"):
        lines.append(made["note"])
    return lines or ["no record of how it was made"]


def limits(values: Values) -> Html:
    """What the report does not show, from what was measured and what was not."""
    settings, rows = values["settings"], values["dense"]["rows"]
    scored = values["gated"].get("scored_by", "exact match")
    layers = len(values["gated"]["skip_rate"])
    told: list[Content] = [
        f"One data set ({settings['data']}, {plural(rows, 'row')}) and one base model ({settings['base']}): nothing "
        "here says how other models or other questions fare.",
        f"Accuracy is {scored} of greedy answers. With {plural(rows, 'row')} a change smaller than the width of its "
        "interval cannot be seen.",
        f"{plural(layers, 'layer')} and two modalities are {2 * layers} units: correlations over them have wide "
        "intervals, and their intervals count units, not rows or seeds, as what could have been otherwise.",
        "Several tests are reported. Those that answer the question were chosen beforehand: geometric redundancy "
        "over all units, cross-attention over vision units, damage over all units. Of the others, some fall below "
        "0.05 by chance.",
        "Milliseconds are of one row, batch 1, on the hardware named below. They change with the size of the model, "
        "the batch and the device.",
    ]
    names = [group for group in groups(values) if group.init in ("zero", "run")]
    if settings["dense"] != "untouched":
        told.insert(
            0,
            "The checkpoint is compared with its own weights without gates, which are fine-tuned: what fine-tuning "
            "changed does not show in the differences. Compare with the model before it with --base "
            f"{settings['base']}.",
        )
    if values["gated"]["tracking"] is not None and not names:
        told.append(
            "No router that began neutral is shown. One that began as the theory's gates agrees with the theory in "
            "part because of that: train some with `skipit plan --init zero`, and give each with --also "
            "neutral=CHECKPOINT."
        )
    if any(len(group.routers) == 1 for group in names):
        told.append(
            "One training seed per router says nothing about the next seed: give several by the same name to --also."
        )
    if values.get("baselines"):
        told.append(
            "Baselines are re-implemented from their formulas on the reference model; their authors' code was not run."
        )
    return section("limits", "Limits", bullets(told))
