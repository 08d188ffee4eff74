"""Two claims of the paper as tested in a report: the 2x2 experiment, and late entry and early exit of vision tokens."""

from collections.abc import Mapping
from typing import Any

from .controlled import misread, missing
from .page import Content, Html, heading, joined, paragraph, table
from .part import NOTHING, Missing, Part, Values, between, number, p_value, percent, plural, verdict

BOTH = "redundant, unattended"


def quadrants(values: Values) -> Part | Missing:
    """Skip sets with high or low redundancy and high or low cross-attention, at equal FLOPs."""
    title = "Redundant and little looked at: the 2x2 experiment"
    if "quadrants" not in values:
        return missing(values, title)
    body: list[Html] = []
    verdicts = misread(values)
    for notion, experiment in values["quadrants"].items():
        verdicts.append(_verdict(notion, experiment))
        body += _quadrants(notion, experiment)
    return Part("quadrants", title, verdicts, body, ("eval", "profile"))


def _verdict(notion: str, experiment: Mapping[str, Any]) -> Html:
    both, alone = experiment["verdict"], experiment["conditions"]
    right = between(experiment["cells"][BOTH]["accuracy"], ".1f", 100)
    return joined(
        [
            f"With {notion} as redundancy: that skipping vision is cheapest where it is redundant and little looked "
            "at is ",
            verdict(both["accuracy"]),
            " by accuracy and ",
            verdict(both["kl"]),
            f" by divergence ({right}% right there, {between(experiment['dense'], '.1f', 100)}% without skipping). "
            "Alone, by divergence: that redundancy protects is ",
            verdict(alone["redundancy"]["kl"]),
            ", that little attention does is ",
            verdict(alone["attention"]["kl"]),
            ".",
        ]
    )


def _quadrants(notion: str, experiment: Mapping[str, Any]) -> list[Html]:
    rows: list[list[Content]] = []
    for name, cell in experiment["cells"].items():
        layers = ", ".join(map(str, cell["layers"])) or "none"
        rows.append(
            [
                name,
                layers,
                percent(cell["compute"]),
                between(cell["accuracy"], ".1f", 100),
                between(cell["kl"], ".2g"),
                plural(len(cell["sets"]), "set"),
            ]
        )
    effects = [
        [title, between(experiment[key]["accuracy"], "+.1f", 100), between(experiment[key]["kl"], "+.2g")]
        for key, title in (
            ("redundancy_effect", "redundant instead of not"),
            ("attention_effect", "little looked at instead of much"),
            ("interaction", "both together, beyond their sum"),
            ("margin", "redundant and little looked at, against the best of the others"),
        )
        if key in experiment
    ]
    head = ["vision layers that are", "layers", "FLOPs", "accuracy, % [95%]", "KL, nats [95%]", "measured"]
    note = [paragraph(experiment["note"], class_="soft")] if experiment.get("note") else []
    return [
        heading(f"Redundancy: {notion}"),
        paragraph(
            f"Layers are split at the median of {notion} and at that of cross-attention (their rank correlation "
            f"over layers: {number(experiment['correlation'], '+.2f')}); in each quadrant, vision tokens skip sets of "
            f"layers that save equal FLOPs, on {plural(experiment['rows'], 'row')} (K/V policy {experiment['kv']})."
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
    measured = values["pattern"]
    learned = {"late entry": measured["learned_entry"], "early exit": measured["learned_exit"]}
    lengths = {"late entry": measured["entry"], "early exit": measured["exit"]}
    rows: list[list[Content]] = []
    for name in ("late entry", "early exit", "both"):
        row: list[Content] = [name, measured["theory"][name], NOTHING, measured["learned"][name], NOTHING, NOTHING]
        if name in lengths:
            row[2], row[4] = str(lengths[name]), between(learned[name]["length"], ".0f")
            row[5] = p_value(learned[name]["p"])
        rows.append(row)
    thirds = [[f"{name} third of the layers", between(v, ".1f", 100)] for name, v in measured["thirds"].items()]
    differences = [
        [
            f"{end} third minus middle",
            measured["outer"][f"{end} third"],
            between(measured[key]["difference"], "+.1f", 100),
        ]
        + [p_value(measured[key][p]) for p in ("p", "p_shift")]
        for key, end in (("early", "first"), ("late", "last"))
    ]
    body = [
        paragraph(
            "The paper reports that vision tokens are redundant early and late and that fusion happens in the "
            "middle. That is a hypothesis about each model. Theory: the longest first (late entry) or last (early "
            f"exit) stretch of layers with geometric redundancy of at most {measured['eps']:.3g} and cross-attention "
            f"of at most {measured['nu']:.3g}. Learned: the longest such stretch that at least {measured['most']:.0%} "
            "of the vision tokens skip; p is the chance of one as long if as many skipped layers lay anywhere."
        ),
        table("Is the pattern there?", ["", "theory", "layers", "learned", "layers [95%]", "p"], rows),
        table("Share of vision tokens that skip", ["", "% [95%]"], thirds),
        table("Is an outer third skipped more than the middle?", ["", "", "points [95%]", "p", "p_shift"], differences),
    ]
    words: list[Content] = []
    for name, stretch in learned.items():
        word = measured["learned"][name]
        words += [f"{name.capitalize()} of vision tokens: ", verdict(word), " in what was learned"]
        if word == "found":
            words.append(f" ({between(stretch['length'], '.0f')} of {len(measured['rates'])} layers)")
        words.append(f", {measured['theory'][name]} in the theory's tables. ")
    return Part("pattern", title, [joined(words)], body, ("eval", "profile"))
