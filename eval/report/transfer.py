"""Does a router hold on kinds of question and images that it was not trained on?"""

from collections.abc import Mapping, Sequence
from typing import Any

from skipit.eval.statistics import beyond_chance

from .page import Content, Html, joined, paragraph, strong, table
from .part import NOTHING, Missing, Part, Values, again, between, p_value, percent

PARTS = {"types": "Kind of question", "shifts": "Images"}
DENSE = "dense"


def transfer(values: Values) -> Part | Missing:
    """Figures of the folder that was given: systems by type of question and by shift of the image."""
    title = "Does it hold on what it was not trained on?"
    if "transfer" not in values:
        return Missing(title, again(values, "--transfer TRANSFER", "scripts/study transfer --out TRANSFER"))
    figures, kinds = values["transfer"]["figures"], values["transfer"]["kinds"]
    body = [_table(title, part, figures[part], kinds) for part, title in PARTS.items() if figures.get(part)]
    note = paragraph(
        "Routers are trained on the reference data: one on some kinds of question, one on all. New kinds are marked. "
        "Differences are paired, over the rows of all seeds, with intervals and p as above; of several kinds or "
        "shifts, one must be that much clearer to be called a loss. Where only means are known, nothing is.",
        class_="soft",
    )
    return Part("transfer", title, _verdict(figures, kinds), [*body, note], ("transfer",))


def _systems(by_name: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys(s for by in by_name.values() for s in by) if name != DENSE]


def _table(title: str, part: str, by_name: Mapping[str, Any], kinds: Sequence[str]) -> Html:
    systems = _systems(by_name)
    head: list[Content] = [title, "untouched"]
    for name in systems:
        head += [f"{name}: accuracy", "difference, points [95%]", "p", "same answer", "FLOPs"]
    rows = []
    for name, by in by_name.items():
        new = part == "types" and name not in kinds
        cells: list[Content] = [f"{name} (new)" if new else name, percent(by[DENSE]["accuracy"])]
        for system in systems:
            figures = by.get(system)
            if not figures:
                cells += [NOTHING] * 5
                continue
            told = _difference(by, system)
            cells += [percent(figures["accuracy"]), between(told, "+.1f", 100), p_value(told["p"])]
            cells += [percent(figures[key]) for key in ("same", "compute")]
        rows.append(cells)
    return table(f"{title}: accuracy against the untouched model, same answers, executed FLOPs", head, rows)


def _difference(by: Mapping[str, Any], system: str) -> Mapping[str, Any]:
    """Of a system from the untouched model; without interval and p where only means are known."""
    means = {"value": by[system]["accuracy"] - by[DENSE]["accuracy"], "low": None, "high": None, "p": None}
    return by[system].get("difference") or means


def _verdict(figures: Mapping[str, Any], kinds: Sequence[str]) -> list[Html]:
    out = []
    types, shifts = figures.get("types", {}), figures.get("shifts", {})
    some = next((s for s in _systems(types) if s != "trained on all"), None)
    new = {name: by for name, by in types.items() if name not in kinds and some in by}
    if some is not None and new:
        told = f"On kinds of question that a router was not trained on ({', '.join(new)}): "
        out.append(joined([told, *_judge({name: _difference(by, some) for name, by in new.items()})]))
    system = next(iter(reversed(_systems(shifts))), None)
    changed = {name: by for name, by in shifts.items() if name != "none" and system in by}
    if system is not None and changed:
        judged = _judge({name: _difference(by, system) for name, by in changed.items()})
        out.append(joined([f"On shifted images, the router {system}: ", *judged]))
    return out or [joined(["The folder of transfer holds too little to say anything."])]


def _judge(systems: Mapping[str, Mapping[str, Any]]) -> tuple[Html, str]:
    """Whether accuracy is lost against the untouched model on the same rows, and where most of what is clear."""
    if all(one["p"] is None for one in systems.values()):
        return strong("cannot be said"), ": the folder holds means alone, without the rows they are of."
    lost = [name for name in beyond_chance({n: one["p"] for n, one in systems.items()}) if systems[name]["value"] < 0]
    if not lost:
        return strong("no loss against the untouched model is shown"), "."
    worst = min(lost, key=lambda name: systems[name]["value"])
    most = systems[worst]
    return strong(
        "it loses accuracy", "bad"
    ), f": {between(most, '+.1f', 100)} points on {worst} (p = {p_value(most['p'])})."
