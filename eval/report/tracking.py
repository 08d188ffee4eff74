"""Do learned skips follow high redundancy and low cross-attention? By table, beside routers that began neutral."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from skipit.eval.plots import draw_intervals
from skipit.eval.statistics import LEVEL, ROUNDING

from .groups import Group, groups, several
from .page import Content, Html, bullets, figure, heading, joined, paragraph, strong, table
from .part import NOTHING, SCOPES, Missing, Part, Values, again, between, label, number, p_value, plural

TABLES = {"geometric": "geometric redundancy", "cross-attention": "cross-attention (VAR)", "damage": "damage of a skip"}
GIVEN = {"depth": "depth", "depth_curve": "depth, also U-shaped", "depth_modality": "depth and modality"}
NEUTRAL = ("zero", "run")


def tracking(values: Values) -> Part | Missing:
    """The agreement of learned skip rates with every table of the profile."""
    title = "Do the learned skips follow the theory?"
    settings = values["settings"]
    if values["gated"]["tracking"] is None:
        first = f"skipit profile {settings['base']} {settings['data']} --out PROFILE"
        return Missing(title, again(values, "--profile PROFILE", first))
    compared = groups(values)
    body: list[Html] = [
        paragraph(
            "A unit is one layer and one modality. If skips follow the theory, units with ",
            strong("small"),
            " values (redundant, little looked at, little damage) are skipped ",
            strong("more"),
            ": the rank correlation is negative. Units are few and neighbouring layers alike, so each number comes "
            "with an interval, with p against random orders of the units, and with ",
            strong("p_shift"),
            " against the same profile shifted or turned along depth, which is the stricter one.",
        ),
        _intervals(compared),
    ]
    for group in compared:
        body += [heading(_title(group)), _correlations(group)]
    body += [heading("Does the router's skip set match the theory's?"), _sets(compared)]
    if alignment := values.get("alignment"):
        body.append(_decisions(alignment))
    layers = len(values["gated"]["skip_rate"])
    body.append(
        paragraph(
            f"p_shift can be no smaller than 1 / (2 layers) = {1 / (2 * layers):.3f} here. Overlap: Jaccard index "
            "of the most skipped and the most redundant units. AUROC: P(a unit that the theory skips at as many "
            "FLOPs is skipped more than one that it does not). Cross-attention belongs to vision units only.",
            class_="soft",
        )
    )
    made = ("eval", "profile", "checkpoint", *(router["made"] for router in values.get("also", ())))
    return Part("tracking", title, [_verdict(group, layers) for group in compared], body, made)


def _title(group: Group) -> str:
    began = f", gates began as {group.init!r}" if group.init else ""
    count = f" ({plural(len(group.routers), 'router')})" if len(group.routers) > 1 else ""
    return f"{group.name[:1].upper()}{group.name[1:]}{count}{began}"


def _estimate(router: Mapping[str, Any], name: str, scope: str) -> Mapping[str, Any]:
    return router["tracking"]["tables"][name][scope]["spearman"]


def _cells(estimates: Sequence[Mapping[str, Any]], style: str = "+.2f") -> list[str]:
    """Value, p and p_shift of one router; of several, mean ± standard deviation and the ranges of both."""
    if len(estimates) == 1:
        estimate = estimates[0]
        if estimate["value"] is None:
            return [NOTHING, NOTHING, NOTHING]
        return [between(estimate, style), p_value(estimate["p"]), p_value(estimate["p_shift"])]
    known = [estimate for estimate in estimates if estimate["value"] is not None]
    if not known:
        return [NOTHING, NOTHING, NOTHING]
    only = "" if len(known) == len(estimates) else f" ({len(known)} of {len(estimates)})"
    return [
        _spread([estimate["value"] for estimate in known], style) + only,
        *(_range(known, key) for key in ("p", "p_shift")),
    ]


def _spread(known: Sequence[float], style: str) -> str:
    mean = number(statistics.mean(known), style)
    return f"{mean} ± {statistics.stdev(known):.2f}" if len(known) > 1 else mean


def _range(known: Sequence[Mapping[str, Any]], key: str) -> str:
    values = sorted(estimate[key] for estimate in known if estimate[key] is not None)
    if not values:
        return NOTHING
    low, high = p_value(values[0]), p_value(values[-1])
    return low if low == high else f"{low} to {high}"


def _correlations(group: Group) -> Html:
    rows: list[list[Content]] = []
    for name, title in TABLES.items():
        for scope, units in SCOPES.items():
            if name == "cross-attention" and scope != "vision":
                continue
            rows.append([f"{title}, {units}", *_cells([_estimate(r, name, scope) for r in group.routers])])
            scopes = [router["tracking"]["tables"][name][scope] for router in group.routers]
            for given in scopes[0]["given"]:
                cells = _cells([of_scope["given"][given] for of_scope in scopes])
                rows.append([f"\N{EM SPACE}given {GIVEN.get(given, given)}", *cells])
            rows.append(
                ["\N{EM SPACE}overlap of the sets", *_cells([of_scope["overlap"] for of_scope in scopes], ".2f")]
            )
    several = len(group.routers) > 1
    value = "mean ± standard deviation" if several else "value [95%]"
    return table("Spearman correlation of skip rates with", ["", value, "p", "p_shift"], rows)


def _sets(compared: Sequence[Group]) -> Html:
    rows = [
        [f"{group.name}, {units}", *_cells([r["tracking"]["theory_set"][scope] for r in group.routers], ".2f")]
        for group in compared
        for scope, units in SCOPES.items()
    ]
    return table("AUROC of skip rates for the theory's skip set; 0.5 is chance", ["", "AUROC", "p", "p_shift"], rows)


def _decisions(alignment: Mapping[str, Any]) -> Html:
    rows: list[list[Content]] = [
        ["skipped, of decisions in the theory's set", between(alignment["inside"], ".1f", 100)],
        ["skipped, of those outside", between(alignment["outside"], ".1f", 100)],
        ["balanced agreement; 50 for a router that does not know the set", between(alignment["balanced"], ".1f", 100)],
    ]
    return table(f"Single decisions of this checkpoint, {plural(alignment['rows'], 'row')}", ["", "% [95%]"], rows)


def _intervals(compared: Sequence[Group]) -> Html:
    rows = []
    for name, title in TABLES.items():
        scopes = ("vision",) if name == "cross-attention" else tuple(SCOPES)
        for scope in scopes:
            line = f"{title.partition(' (')[0]}\n{SCOPES[scope]}"
            for group in compared:
                known = [e for r in group.routers if (e := _estimate(r, name, scope))["value"] is not None]
                if known:
                    rows.append((line, label(group.name), *_bar(known)))
    if not rows:
        reason = _estimate(compared[0].routers[0], "damage", "all")["reason"]
        return paragraph(f"No correlation can be computed: {reason}.")
    caption = "Left of the line: redundant units are skipped more. Bars: 95% bootstrap interval over units"
    caption += "; of several routers of one name, mean and range over routers." if several(compared) else "."
    drawn = draw_intervals(rows, "Do skips follow the theory?", "Spearman correlation with skip rates", 0.0)
    return figure(drawn, "Rank correlations of skip rates with each table of the theory, with intervals", caption)


def _bar(known: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    if len(known) == 1:
        return known[0]["value"], *(
            known[0][k] if known[0][k] is not None else known[0]["value"] for k in ("low", "high")
        )
    values = [estimate["value"] for estimate in known]
    return statistics.mean(values), min(values), max(values)


def _verdict(group: Group, layers: int) -> Html:
    built_in = ""
    if group.init.startswith("theory"):
        built_in = " Its gates began as the theory's, so some of this agreement is built in."
    elif group.init in NEUTRAL:
        built_in = " Its gates began neutral: nothing of this was built in."
    parts = [
        _question(group, "geometric", "all", "high redundancy", layers),
        _question(group, "cross-attention", "vision", "low cross-attention", layers),
        _question(group, "damage", "all", "low damage", layers),
    ]
    count = f" ({len(group.routers)} routers)" if len(group.routers) > 1 else ""
    return joined([f"Does {group.name}{count} follow the theory?{built_in} ", bullets(parts)])


def _question(group: Group, name: str, scope: str, what: str, layers: int) -> Html:
    estimates = [_estimate(router, name, scope) for router in group.routers]
    known = [estimate for estimate in estimates if estimate["value"] is not None]
    if not known:
        return joined([f"{what.capitalize()}: ", strong("cannot be said"), f" ({estimates[0]['reason']})."])
    word, mood = judge(known, layers)
    value, p, shift = _cells(estimates)
    told = f". Spearman {value}, p {p}, p_shift {shift}."
    if word.startswith("yes"):
        gone, given = _given([router["tracking"]["tables"][name][scope]["given"] for router in group.routers])
        told += f" {given}"
        if gone:
            word, mood = f"{word}, but no more than {gone} explain{'' if ' and ' in gone else 's'}", ""
    return joined([f"{what.capitalize()}: ", strong(word, mood), told])


def _given(routers: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The strictest confounder with which an agreement is gone, if there is one, and what is left given each."""
    gone, told = "", []
    for name in ("depth_curve", "depth_modality"):
        estimates = [router[name] for router in routers if name in router]
        known = [estimate for estimate in estimates if estimate["value"] is not None]
        if not known:
            continue
        stays = sum(_shown(one) and one["value"] < 0 for one in known)
        word = "it stays" if stays == len(known) else "not shown"
        if 0 < stays < len(known):
            word = f"it stays in {stays} of {len(known)} routers"
        elif not stays:
            gone = GIVEN[name].partition(",")[0]
        told.append(f"{GIVEN[name]}: {word} ({_cells(estimates)[0]})")
    return gone, f"Given {'; given '.join(told)}." if told else ""


def _shown(estimate: Mapping[str, Any]) -> bool:
    """Whether an estimate is on one side of zero, interval and all, beyond what random orders give."""
    end = estimate["high"] if estimate["value"] < 0 else estimate["low"]
    return bool(estimate["p"] < LEVEL and end * estimate["value"] > 0)


def judge(known: Sequence[Mapping[str, Any]], layers: int) -> tuple[str, str]:
    """The word for correlations of one router or several, and its mood.

    One router: the interval must leave out zero, p be below 0.05 and p_shift too, or as small as so few layers allow:
    on smooth tables p alone is that small by chance. Of several routers all must agree for a plain word.

    Example:
        >>> judge([{"value": -0.8, "low": -0.9, "high": -0.5, "p": 0.001, "p_shift": 0.04}], 12)
        ('yes', 'good')
        >>> judge([{"value": -0.3, "low": -0.7, "high": 0.2, "p": 0.2, "p_shift": 0.3}], 12)
        ('not shown', '')
    """
    shown = [e for e in known if _shown(e)]
    follows = [e for e in shown if e["value"] < 0]
    if len(follows) == len(known):
        least = 1 / (2 * layers)
        if any(e["p_shift"] is None or e["p_shift"] > max(LEVEL, least + ROUNDING) for e in follows):
            return "not shown beyond what a shifted profile gives", ""
        return ("yes" if least < LEVEL else f"yes, as far as {layers} layers can tell"), "good"
    if len(shown) - len(follows) == len(known):
        return "no, the opposite", "bad"
    if shown and len(known) > 1:
        return f"mixed: yes in {len(follows)} of {len(known)} routers", ""
    return "not shown", ""
