"""Does a router hold on kinds of question and images that it was not trained on?"""

from collections.abc import Mapping, Sequence
from typing import Any

from .page import Content, Html, joined, paragraph, strong, table
from .part import NOTHING, Missing, Part, Values, again, percent, points

PARTS = {"types": "Kind of question", "shifts": "Images"}
DENSE = "dense"
SMALL = 0.02  # a difference of this much in accuracy is called one


def transfer(values: Values) -> Part | Missing:
    """Figures of the folder that was given: systems by type of question and by shift of the image."""
    title = "Does it hold on what it was not trained on?"
    if "transfer" not in values:
        return Missing(title, again(values, "--transfer TRANSFER", "python -m skipit.transfer --out TRANSFER"))
    figures, kinds = values["transfer"]["figures"], values["transfer"]["kinds"]
    body = [_table(title, part, figures[part], kinds) for part, title in PARTS.items() if figures.get(part)]
    note = paragraph(
        "Routers are trained on the reference data: one on some kinds of question, one on all. New kinds are marked. "
        f"The summary has no intervals: differences of up to {100 * SMALL:.0f} points, on few rows also larger "
        "ones, are called none.",
        class_="soft",
    )
    return Part("transfer", title, _verdict(figures, kinds), [*body, note], ("transfer",))


def _systems(by_name: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys(s for by in by_name.values() for s in by) if name != DENSE]


def _table(title: str, part: str, by_name: Mapping[str, Any], kinds: Sequence[str]) -> Html:
    systems = _systems(by_name)
    head: list[Content] = [title, "untouched"]
    for name in systems:
        head += [f"{name}: accuracy", "same answer", "FLOPs"]
    rows = []
    for name, by in by_name.items():
        new = part == "types" and name not in kinds
        cells: list[Content] = [f"{name} (new)" if new else name, percent(by[DENSE]["accuracy"])]
        for system in systems:
            found = by.get(system)
            cells += [percent(found[k]) for k in ("accuracy", "same", "compute")] if found else [NOTHING] * 3
        rows.append(cells)
    return table(f"{title}: accuracy, same answer as the untouched model, executed FLOPs", head, rows)


def _verdict(figures: Mapping[str, Any], kinds: Sequence[str]) -> list[Html]:
    out = []
    types, shifts = figures.get("types", {}), figures.get("shifts", {})
    some = next((s for s in _systems(types) if s != "trained on all"), None)
    new = {name: by for name, by in types.items() if name not in kinds and some in by}
    if some is not None and new:
        losses = {name: by[some]["accuracy"] - by[DENSE]["accuracy"] for name, by in new.items()}
        worst = min(losses, key=lambda name: losses[name])
        word, mood = ("it holds", "good") if losses[worst] >= -SMALL else ("it loses accuracy", "bad")
        told = f"On kinds of question that a router was not trained on ({', '.join(new)}) "
        out.append(joined([told, strong(word, mood), f": at worst {points(losses[worst])} points, on {worst}."]))
    system = next(iter(reversed(_systems(shifts))), None)
    changed = {name: by for name, by in shifts.items() if name != "none" and system in by}
    if system is not None and changed:
        losses = {name: by[system]["accuracy"] - by[DENSE]["accuracy"] for name, by in changed.items()}
        worst = min(losses, key=lambda name: losses[name])
        word, mood = ("it loses no more than the untouched model", "good")
        if losses[worst] < -SMALL:
            word, mood = "it loses more than the untouched model", "bad"
        told = f"On shifted images the router {system} "
        out.append(
            joined(
                [
                    told.replace("router trained", "router that was trained"),
                    strong(word, mood),
                    f": at worst {points(losses[worst])} points, on {worst}.",
                ]
            )
        )
    return out or [joined(["The folder of transfer holds too little to say anything."])]
