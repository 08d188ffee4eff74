"""`skipit inspect`: what a model is and whether it can have gates."""

import argparse
import sys
from itertools import groupby
from typing import TYPE_CHECKING

from .options import Parser

if TYPE_CHECKING:
    from rich.console import Group

    from skipit.eval.measure.inspection import Inspection

ABOUT = "say what a model is and whether it can have gates"
EXAMPLE = "skipit inspect reference"
_SUPPORTED = "yes, by its structure: a block, its attention or its MLP is skipped, keys and values retained or evicted"


def add_arguments(verb: Parser) -> None:
    """A model's configuration."""
    verb.add_argument(
        "model", help="`reference`, `documents`, a folder with a config.json, or a Hub id; weights not needed"
    )
    verb.add_argument("--layers", default=None, help="dotted path of the decoder layers, where they are not found")
    verb.add_flag("--json", "print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print a table, or JSON."""
    import json

    from rich.console import Console

    from skipit.eval.measure.inspection import inspect_model

    inspection = inspect_model(arguments.model, arguments.layers)
    if arguments.json:
        print(json.dumps(inspection.to_json(), indent=2))
    else:
        # A file or a pipe has no width; a line of a table is not broken there.
        width = None if sys.stdout.isatty() else 160
        Console(highlight=False, markup=False, width=width).print(inspection_table(inspection))


def inspection_table(inspection: "Inspection") -> "Group":
    """One line per stretch of equal layers, and what the columns mean."""
    from rich.console import Group
    from rich.table import Table

    about = Table.grid(padding=(0, 2))
    for name, text in _about(inspection).items():
        about.add_row(name, text)
    table = Table("layers", "kind", "class", "FLOPs/token", "FLOPs/key", "if skipped", "K/V bytes", "gate parameters")
    for column in table.columns[3:]:
        column.justify = "right"
    first = 0
    for layer, equal in groupby(inspection.layers):
        last = first + len(list(equal)) - 1
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            layer.kind.removesuffix("_attention"),
            layer.name,
            _short(layer.flops_per_token),
            _short(layer.flops_per_key),
            _short(layer.flops_if_skipped),
            f"{layer.kv_bytes:,}",
            f"{layer.gate_parameters:,}",
        )
        first = last + 1
    return Group(about, table, "\n".join(_legend(inspection)))


def _about(inspection: "Inspection") -> dict[str, str]:
    totals = inspection.to_json()["totals"]
    size = f"{inspection.parameters:,} parameters in {inspection.dtype}"
    ids = ", ".join(f"{name} {value}" for name, value in inspection.vision_tokens.items())
    attention = [name if gated else f"{name} (not with gates)" for name, gated in inspection.attention.items()]
    lines = {
        "model": f"{inspection.name} ({inspection.model_type}), {size}",
        "decoder": f"{inspection.decoder}, {len(inspection.layers)} layers",
        "modalities": f"text; vision: {ids or 'none in the configuration'}",
        "attention": ", ".join(attention),
        "gates": f"{totals['gate_parameters']:,} parameters, one gate per layer, in fp32",
        "per token": f"{_short(totals['flops_per_token'])} FLOPs in linear maps, {totals['kv_bytes']:,} bytes of K/V",
        "supported": _SUPPORTED if inspection.refused is None else f"no: {inspection.refused}",
    }
    if inspection.router is not None:
        from skipit.theory.plan import points_text

        router = inspection.router
        points = ", ".join(router["operating_points"]) or "none"
        where = points_text(router["decide_at"])
        lines["router"] = (
            f"a gated checkpoint: K/V policy {router['kv']}, decides at {where}, operating points: {points}"
        )
    return lines


def _legend(inspection: "Inspection") -> list[str]:
    lines = [
        "FLOPs/token: of one token, in the layer's linear maps; FLOPs/key: more for every key that it attends to.",
        "if skipped: FLOPs of a token that skips the layer: under `retain` for its keys and values, "
        f"{inspection.share_if_skipped:.0%} of running it; under `evict` none.",
        f"K/V bytes: of the cache, per token that has keys and values there, in {inspection.dtype}.",
    ]
    images = {layer.flops_per_image_state for layer in inspection.layers} - {0.0}
    if images:
        costs = ", ".join(map(_short, sorted(images)))
        lines.append(f"cross: keys and values are the images', once for all tokens: {costs} FLOPs per image state.")
    return lines


def _short(count: float) -> str:
    """A count with three digits and a unit: 405M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"
