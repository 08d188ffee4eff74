"""Where a router skips: skip rates by layer, beside the theory's tables as heat maps."""

import statistics
from collections.abc import Sequence
from typing import Any

from skipit.eval.plots import draw_layer_modality_heatmaps, draw_skip_rates

from .groups import groups, several
from .page import Content, Html, figure, joined
from .part import Part, Values, label

# Titles say the unit, as a colour bar needs it.
HEAT = {
    "geometric": "geometric redundancy\n1 - cos, small: redundant",
    "cross-attention": "cross-attention (VAR)\nshare of text's attention",
    "damage": "damage of a skip\nKL, nats per answer token",
}


def heat_maps(values: Values) -> Part:
    """Tables of the theory beside learned skip rates."""
    compared = groups(values)
    tables: dict[str, Any] = {HEAT[name]: values["theory"][name] for name in HEAT if name in values.get("theory", {})}
    skips = {
        f"skip rate\n{label(group.name)}": _mean_table([r["skip_rate"] for r in group.routers]) for group in compared
    }
    body = [
        figure(
            draw_layer_modality_heatmaps({**tables, **skips}, dict.fromkeys(skips, (0.0, 1.0))),
            "Heat maps over decoder layers, for text and vision: "
            + ", ".join(" ".join(t.split()) for t in tables | skips),
            "Layer 0 on top. Hatched: no value. Theory's tables: small is redundant; skip rates: 1 is always skipped."
            if tables
            else "Layer 0 on top; 1 is always skipped. The theory's tables are missing: they need a profile.",
        ),
        figure(
            draw_skip_rates(
                {label(group.name): _mean_table([r["skip_rate"] for r in group.routers]) for group in compared}
            ),
            "Share of vision and text tokens that skip each layer, by router",
            "Share of tokens that skip each layer"
            + ("; several routers of one name: their mean." if several(compared) else "."),
        ),
    ]
    made = ["eval", "checkpoint", *(("profile",) if tables else ()), *(r["made"] for r in values.get("also", ()))]
    return Part("maps", "Where it skips", [_where(values)], body, made)


def _where(values: Values) -> Html:
    rates = values["gated"]["skip_rate"]
    parts: list[Content] = []
    for column, modality in ((1, "vision"), (0, "text")):
        known = [row[column] for row in rates if row[column] is not None]
        if not known:
            continue
        most = [str(layer) for layer, row in enumerate(rates) if row[column] is not None and row[column] >= 0.5]
        which = (
            f"by more than half of them in layers {', '.join(most)}"
            if most
            else "in no layer by more than half of them"
        )
        if len(most) == len(known):
            which = "in every layer by more than half of them"
        start = f"{modality.capitalize()} tokens skip {statistics.mean(known):.0%} of the layers, "
        parts.append(f"{start}{which}. ")
    return joined(parts)


def _mean_table(tables: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float]]:
    """The mean of tables [layers][2]; NaN where one has no value."""
    layers = zip(*tables, strict=True)
    return [
        [statistics.mean(float("nan") if v is None else v for v in units) for units in zip(*rows, strict=True)]
        for rows in layers
    ]
