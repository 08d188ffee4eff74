"""Would something simpler have done as well? Peers' schemes on the same engine, at equal measured FLOPs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import ttest_ind_from_stats

from skipit.eval.plots import draw_pareto
from skipit.eval.statistics import LEVEL, beyond_chance

from .page import Content, Html, figure, heading, joined, paragraph, strong, table
from .part import NOTHING, Missing, Part, Values, again, label, number, percent, plural

OURS = ("ours-retain", "ours-evict")
# As far as measured budgets of two methods may differ and still be called equal.
CLOSE = 0.02
SMALL = 0.005  # differences in accuracy up to this are none, also where one run has no error bar


def peers(values: Values) -> Part | Missing:
    """Accuracy against measured FLOPs of ours and of every baseline in the folder that was given."""
    title = "Would something simpler have done as well?"
    if "baselines" not in values:
        return Missing(title, again(values, "--baselines BASELINES", "scripts/study peers --latency --out BASELINES"))
    entries = values["baselines"]["entries"]
    verdicts, lines = _verdicts(entries)
    body: list[Html] = []
    checkpoint = _checkpoint_point(values)
    for trained, name in ((True, "with training"), (False, "without training")):
        chosen = [e for e in entries if e["runs"] and e["trained"] == trained and not _is_control(e)]
        if chosen:
            body += _figure(chosen, checkpoint if trained else [], name)
    body += [heading("At every budget"), *lines, _table(entries)]
    body.append(
        paragraph(
            "Accuracy is relative to the dense model of the same sweep, a mean over seeds and random draws ± their "
            "standard deviation. Peers' schemes are re-implemented from their formulas, with the same base, rows, "
            "LoRA rank, steps and executor. A baseline is compared with ours where it spends at most "
            f"{100 * CLOSE:.0f} points more FLOPs; it is better or worse where the difference is beyond half a point "
            "and Welch's test over seeds says so (p below 0.05; of all that are better together, Holm). Without a "
            "deviation there was one run, which shows nothing.",
            class_="soft",
        )
    )
    return Part("peers", title, verdicts, body, ("baselines",))


def _checkpoint_point(values: Values) -> list[tuple[str, float, float, float]]:
    dense, gated = values["dense"]["accuracy"], values["gated"]
    if not dense:
        return []
    return [("this checkpoint", gated["compute"], gated["accuracy"] / dense, math.nan)]


def _figure(
    chosen: Sequence[Mapping[str, Any]], checkpoint: Sequence[tuple[str, float, float, float]], name: str
) -> list[Html]:
    points = [
        (label(e["system"]), e["compute"], e["accuracy"], math.nan if e["spread"] is None else e["spread"])
        for e in chosen
    ]
    drawn = draw_pareto([("dense", 1.0, 1.0, math.nan), *checkpoint, *points], "standard deviation")
    drawn.axes[0].set_ylabel("accuracy (% of dense)", fontsize=9)
    # Below instead of beside: a narrow screen would cut it off.
    drawn.legends[0].remove()
    lines = -(-(len(chosen) + 3) // 3)
    drawn.set_size_inches(5.4, 3.6 + 0.2 * lines)
    drawn.legend(
        *drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    alt = f"Accuracy relative to dense against executed FLOPs, methods {name}"
    caption = f"Methods {name}. Up and left is better."
    if checkpoint:
        caption += " This checkpoint: on the rows of this report; all others on those of the sweep."
    return [figure(drawn, alt, caption)]


def _is_control(entry: Mapping[str, Any]) -> bool:
    """Whether it is a router of ours with its decisions moved to other tokens or layers: nothing simpler, a control."""
    return entry["system"].startswith(tuple(f"{name}:" for name in OURS))


def p_difference(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Welch's (1947) test of the mean accuracies of two methods over their seeds; None where one has no deviation.

    Example:
        >>> ours = {"accuracy": 0.99, "spread": 0.01, "seeds": 3}
        >>> round(p_difference(ours, {"accuracy": 0.90, "spread": 0.02, "seeds": 3}), 3)
        0.006
        >>> p_difference(ours, {"accuracy": 0.40, "spread": None, "seeds": 1})
    """
    sides = [(of["accuracy"], of["spread"], of["seeds"]) for of in (ours, other)]
    if any(spread is None or seeds < 2 for _, spread, seeds in sides) or not any(spread for _, spread, _ in sides):
        return None
    return float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)


def _compared(mine: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Which baselines are better than ours, which worse, which neither as far as is shown, and which spend more."""
    beside = {told: other for told, other in others.items() if other["compute"] <= mine["compute"] + CLOSE}
    more = {told: other["accuracy"] - mine["accuracy"] for told, other in beside.items()}
    p = {told: p_difference(mine, other) if abs(more[told]) > SMALL else None for told, other in beside.items()}
    better = [told for told in beyond_chance(p) if more[told] > 0]
    # To be above all of them ours must be above each, so that each counts by itself.
    worse = [told for told, value in p.items() if value is not None and value < LEVEL and more[told] < 0]
    return {
        "better": better,
        "alike": [told for told in beside if told not in (*better, *worse)],
        "worse": worse,
        "not comparable": [told for told in others if told not in beside],
    }


def _verdicts(entries: Sequence[Mapping[str, Any]]) -> tuple[list[Html], list[Html]]:
    """For every budget and variant of ours, who wins, ties and loses: the summary's sentences, and the lists."""
    short: list[Html] = []
    lines: list[Html] = []
    ours = [e for e in entries if e["system"] in OURS and e["runs"]]
    if not ours:
        lacks = "The folder of baselines holds no trained router of ours (methods ours-retain, ours-evict)"
        return [joined([f"{lacks}: whether something simpler does as well ", strong("cannot be said"), "."])], []
    for mine in ours:
        controls: list[str] = []
        others: dict[str, Mapping[str, Any]] = {}
        for other in entries:
            if not other["runs"] or other["budget"] != mine["budget"]:
                continue
            told = f"{other['system']} ({percent(other['accuracy'])} at {percent(other['compute'])})"
            if other["system"].startswith(f"{mine['system']}:"):
                controls.append(told.removeprefix(f"{mine['system']}: "))
            elif not other["system"].startswith((*OURS, "lora")):
                others[told] = other
        results = {**_compared(mine, others), "controls": controls}
        start = (
            f"{mine['system']}, budget {mine['budget']:g}: {percent(mine['accuracy'])} of dense accuracy at "
            f"{percent(mine['compute'])} of the FLOPs ({plural(mine['seeds'], 'seed')}). "
        )
        short.append(joined([start, *_word(results)]))
        rest = [f"{words}: {', '.join(results[key])}. " for key, words in _LISTS.items() if results[key]]
        lines.append(paragraph(strong(f"{mine['system']}, budget {mine['budget']:g}. "), *rest))
    return short, lines


_LISTS = {
    "better": "Better than ours",
    "alike": "Not shown to be better or worse",
    "worse": "Worse",
    "not comparable": "Spend more FLOPs",
    "controls": "Controls, which are the same router with its decisions moved",
}


def _word(results: Mapping[str, Sequence[str]]) -> list[Content]:
    compared_with = sum(len(results[key]) for key in ("better", "alike", "worse"))
    if not compared_with:
        return [strong("Nothing to compare with"), " at this budget."]
    if results["better"]:
        return [strong("Yes, something simpler did better", "bad"), f": {', '.join(results['better'])}."]
    if results["alike"]:
        return [strong("Something simpler is not shown to be worse"), f": {', '.join(results['alike'])}."]
    return [strong("No", "good"), f", it is above all of {plural(compared_with, 'baseline')} (each with p < {LEVEL})."]


def _table(entries: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[Content]] = []
    for e in entries:
        name = f"{e['system']}{' (tuned)' if e['trained'] else ''}, budget {e['budget']:g}"
        if not e["runs"]:
            why = "training failed" if e["floor"] is None else f"cannot: spends {percent(e['floor'])} at least"
            rows.append([name, why, NOTHING, NOTHING, NOTHING, "0"])
            continue
        spread = "" if e["spread"] is None else f" ± {100 * e['spread']:.1f}"
        time = NOTHING
        if e["prefill_ms"]:
            time = f"{number(e['prefill_ms'])} ({number(e['prefill_speed_up'])}x)"
        runs = f"{e['runs']} ({plural(e['seeds'], 'seed')}" + (f", {e['failed']} failed)" if e["failed"] else ")")
        rows.append(
            [name, f"{percent(e['accuracy'])}{spread}", percent(e["same_answer"]), percent(e["compute"]), time, runs]
        )
    head = ["method", "of dense accuracy", "same answer", "FLOPs", "prefill, ms (speed-up)", "runs"]
    return table("All methods, by budget", head, rows)
