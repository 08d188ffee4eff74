"""`skipit bench`: how long a model's decoder layers take on this machine when tokens skip them."""

import argparse
import sys
from typing import TYPE_CHECKING

from .options import Parser, positive, positive_int

if TYPE_CHECKING:
    from rich.console import Group

    from skipit.theory.layer_times import LayerTimes

ABOUT = "measure what skipping saves on this machine, for the router and `plan --latency`"
EXAMPLE = "skipit bench reference"


def add_arguments(verb: Parser) -> None:
    """A model's configuration, and what to measure."""
    verb.add_argument(
        "model", nargs="?", default="reference", help="as for `inspect`; weights are not needed (default %(default)s)"
    )
    verb.add_argument("--layers", default=None, help="dotted path of the decoder layers, where they are not found")
    dtypes = ("float32", "bfloat16", "float16")
    verb.add_argument("--dtype", choices=dtypes, default=None, help="of the weights (default: the model's)")
    verb.add_argument("--device", choices=("cpu", "cuda"), default=None, help="(default: a GPU, if there is one)")
    verb.add_argument(
        "--tokens", type=positive_int, nargs="+", default=[64, 640], help="of the prompts (default 64 640)"
    )
    verb.add_argument("--seconds", type=positive, default=45.0, help="to measure, about (default %(default)g)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, keep what was found, and print it."""
    import torch
    from rich.console import Console

    from skipit.eval.measure.bench import measure_layers
    from skipit.eval.measure.inspection import without_weights
    from skipit.router.errors import InputError
    from skipit.router.measured import bench_file
    from skipit.train.data.sources import resolve_model
    from skipit.train.display import loading

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: got cuda, but PyTorch finds no GPU. Leave it out, or give cpu.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = without_weights(arguments.model, resolve_model(arguments.model))
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else model.dtype
    with loading("measuring"):
        times = measure_layers(
            model,
            arguments.layers,
            dtype=dtype,
            device=device,
            tokens=sorted(set(arguments.tokens)),
            seconds=arguments.seconds,
        )
    path = bench_file(device, dtype, times.hidden)
    times.save(path)
    width = None if sys.stdout.isatty() else 160  # a file has none; a line of a table is not broken there
    Console(highlight=False, markup=False, width=width).print(times_table(times))
    print(f"{path}: the router reads from it that packing must save {times.packing_pays:.3g} FLOPs of a layer's.")


def times_table(times: "LayerTimes") -> "Group":
    """One line per prompt and number of tokens that skip, and what the columns mean."""
    from rich.console import Group
    from rich.table import Table

    from skipit.eval.measure.bench import WAYS

    table = Table("tokens", "skip", *(kv + (f"\n{route}" if route else "") for kv, route in WAYS))
    for column in table.columns:
        column.justify = "right"
    for tokens, dense in times.dense.items():
        table.add_row(str(tokens), "dense", *[f"{dense:.3f} ms"] * 3)
        found = {(row.skipped, row.kv, row.route): row for row in times.rows if row.tokens == tokens}
        for skipped in sorted({skipped for skipped, _, _ in found}):
            # Where all tokens run, or none, there is but one way under `retain`.
            cells = [found.get((skipped, kv, route)) or found[skipped, kv, None] for kv, route in WAYS]
            share = "all but 1" if skipped == tokens - 1 else f"{skipped / tokens:.0%}"
            table.add_row("", share, *(f"{row.ms:.3f} ms  {row.relative:.2f}" for row in cells))
        step = times.steps[tokens]
        table.add_row("+ 1", "dense", *[f"{step.ms:.3f} ms"] * 3)
        for share, relative in (("0%", step.entered), ("100%", step.left_out)):
            table.add_row("", share, *[f"{step.ms * relative:.3f} ms  {relative:.2f}"] * 3)
    about = f"One layer of width {times.hidden}, {times.dtype}, random weights; {times.device}; {times.clock}."
    legend = (
        "Beside the milliseconds: relative to the untouched layer (dense). 0 %: gates attached, every token runs; + 1: "
        "one token decoded after them."
    )
    return Group(about, table, legend)
