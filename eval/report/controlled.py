"""Controlled skipping in a report: every unit left out alone, and growing sets in the theory's order and against it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skipit.eval.plots import draw_growing_sets, draw_scatter
from skipit.eval.statistics import proportion

from .page import Content, Html, figure, heading, joined, paragraph, strong, table
from .part import SCOPES, Missing, Part, Values, again, between, number, percent, plural

TITLE = "What does skipping really do, and does the theory predict it?"
COMBINED = {"sum": "their sum", "aligned": "(sum of square roots)\N{SUPERSCRIPT TWO}, the bound"}
BEST, WORST = "least damage first", "most damage first"
KL = "KL (nats per answer token)"


def controlled(values: Values) -> Part | Missing:
    """Prediction against measurement for every unit, and curves of growing sets."""
    if "units" not in values or "growing" not in values:
        return missing(values, TITLE)
    units, growing = values["units"], values["growing"]
    body = [heading("Every unit left out alone"), *_units(units), heading("More and more units left out")]
    body += _growing(growing, values)
    verdicts = [*misread(values), _units_verdict(units), _growing_verdict(growing, values)]
    return Part("controlled", TITLE, verdicts, body, ("eval", "profile"))


def misread(values: Values) -> list[Html]:
    """What to say where answers that are teacher-forced are not those that the model generates, skipping nothing."""
    units = values["units"]
    forced = proportion(units["dense_accuracy"], units["rows"])
    generated = proportion(units.get("generated_accuracy", forced.value), units["rows"])
    if forced.low <= generated.high and generated.low <= forced.high:
        return []
    return [
        joined(
            [
                strong("Do not trust this part", "bad"),
                f": without skipping, {percent(forced.value)} of its {plural(units['rows'], 'row')} are right "
                f"teacher-forced, but {percent(generated.value)} generated. The completions of these rows are not what "
                "the model writes: compare one with its answer, token by token.",
            ]
        )
    ]


def missing(values: Values, title: str) -> Missing:
    """What to run for a part that needs a profile and controlled skipping."""
    settings = values["settings"]
    if "theory" in values and settings["controlled_samples"]:
        return Missing(title, "it needs rows with images and a model of enough layers, at least four.")
    if "theory" in values:
        return Missing(title, again(values, "--profile PROFILE --controlled-samples 48"))
    first = f"skipit profile {settings['base']} {settings['data']} --out PROFILE"
    return Missing(title, again(values, "--profile PROFILE", first))


def _units(units: Mapping[str, Any]) -> list[Html]:
    rows: list[list[Content]] = []
    for scope, title in SCOPES.items():
        correlation = units["correlation"][scope]
        rows.append([title, between(correlation), str(correlation["units"])])
    told = [
        paragraph(
            f"The dense model answers {plural(units['rows'], 'row')} while one unit at a time is left out "
            f"(K/V policy {units['kv']}), teacher-forced. The theory's prediction, its damage, was measured on "
            "other rows without skipping anything."
        )
    ]
    predicted, measured = (np.array(units[k], dtype=np.float64) for k in ("predicted", "measured"))
    known = np.isfinite(predicted) & np.isfinite(measured)
    if (known & (predicted > 0)).any() and (known & (measured > 0)).any():
        drawn = draw_scatter(predicted, measured, (f"predicted damage: {KL}", f"measured: {KL}"), diagonal=True)
        told.append(
            figure(
                drawn,
                "Predicted damage of every unit against the divergence that leaving it out causes",
                "One point per unit, numbered by layer. Rank correlation is what counts: the damage orders units, "
                "it is not the divergence itself.",
            )
        )
    told.append(table("Rank correlation of predicted damage with measured KL", ["", "Spearman [95%]", "units"], rows))
    return told


def _units_verdict(units: Mapping[str, Any]) -> Html:
    correlation = units["correlation"]["all"]
    words, mood = "is not shown to predict", ""
    if correlation["low"] is not None and correlation["low"] > 0:
        words, mood = "predicts", "good"
    elif correlation["high"] is not None and correlation["high"] < 0:
        words, mood = "predicts the reverse of", "bad"
    return joined(
        [
            "The theory's damage ",
            strong(words, mood),
            f" the order in which units matter: Spearman {between(correlation)} over "
            f"{plural(correlation['units'], 'unit')} with what leaving them out one by one does on "
            f"{plural(units['rows'], 'row')}.",
        ]
    )


def _growing(growing: Mapping[str, Any], values: Values) -> list[Html]:
    curves = {
        name: [(p["compute"], p["accuracy"]["value"], p["kl"]["value"]) for p in points]
        for name, points in growing["curves"].items()
    }
    checkpoint = ("this checkpoint", values["gated"]["compute"], values["gated"]["accuracy"])
    body = [
        figure(
            draw_growing_sets(curves, checkpoint),
            "Accuracy and divergence as more and more units are left out, by order",
            "Whole units left out of the dense model, for all inputs alike, in the order of damage per FLOP that is "
            "saved, in the reverse order, and by depth alone. "
            f"Curves: {plural(growing['rows'], 'row')}, teacher-forced; the star: this checkpoint on all rows of this "
            "report, generating.",
        )
    ]
    share = values["gated"]["compute"]
    rows = [
        [
            name,
            percent(point["compute"]),
            between(_right(point, growing), ".1f", 100),
            between(point["kl"], ".2g"),
            str(point["skipped"]),
        ]
        for name, points in growing["curves"].items()
        if (point := _at(points, share)) is not None
    ]
    head = ["order", "FLOPs", "accuracy, % [95%]", f"{KL} [95%]", "units left out"]
    body.append(table(f"Sets that spend about what the checkpoint does ({percent(share)})", head, rows))
    prediction = [
        [
            COMBINED.get(name, name),
            number(p["spearman"], "+.2f"),
            number(p["median_ratio"]),
            percent(p["below"]),
            str(p["sets"]),
        ]
        for name, p in growing["prediction"].items()
    ]
    head = ["damages of units combined as", "Spearman with KL", "median of measured / predicted", "at most it", "sets"]
    body.append(table("Does the theory predict the divergence of a set from that of its units?", head, prediction))
    return body


def _right(point: Mapping[str, Any], growing: Mapping[str, Any]) -> dict[str, Any]:
    """A set's accuracy with an interval that has a width also where all rows are right."""
    return proportion(point["accuracy"]["value"], growing["rows"]).to_json()


def _at(points: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any] | None:
    """The set nearest to a share of FLOPs; None for no sets."""
    return min(points, key=lambda point: abs(point["compute"] - share), default=None)


def _growing_verdict(growing: Mapping[str, Any], values: Values) -> Html:
    share = values["gated"]["compute"]
    best, worst = (_at(growing["curves"].get(name, ()), share) for name in (BEST, WORST))
    if best is None or worst is None:
        return joined(["Growing sets were not measured in both orders."])
    right, wrong = _right(best, growing), _right(worst, growing)
    if right["low"] > wrong["high"]:
        words, mood = "better than the reverse order", "good"
    elif right["high"] < wrong["low"]:
        words, mood = "worse than the reverse order", "bad"
    else:
        words, mood = "not shown to be better than the reverse order", ""
    parts: list[Content] = [
        "Leaving out whole units, least damage per FLOP first, is ",
        strong(words, mood),
        f": {between(right, '.1f', 100)}% right at {percent(best['compute'])} of the FLOPs, against "
        f"{between(wrong, '.1f', 100)}% at {percent(worst['compute'])}. ",
    ]
    own = proportion(values["gated"]["accuracy"], values["gated"]["rows"]).to_json()
    told = f"{between(own, '.1f', 100)}% at {percent(share)}"
    if own["low"] > max(right["high"], wrong["high"]):
        parts.append(f"The checkpoint is above both ({told}).")
    else:
        parts.append(f"The checkpoint ({told}) is not clearly above this, which needs no router.")
    return joined(parts)
