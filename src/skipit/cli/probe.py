"""`skipit probe`: what linear probes read of the answer before and after each layer."""

import argparse
import io
from typing import TYPE_CHECKING

from .options import Parser, chosen, load_rows, positive, positive_int, readable_rows

if TYPE_CHECKING:
    from torch import Tensor

    from skipit.theory.probes import Probes

ABOUT = "measure what linear probes read of the answer before and after each layer"
EXAMPLE = "skipit probe reference reference --out runs/probes"


def add_arguments(verb: Parser) -> None:
    """A model, rows, and how probes are fitted."""
    verb.add_model_and_data()
    verb.add_out()
    verb.add_samples(600, "rows, half to fit on")
    verb.add_broken()
    verb.add_argument("--penalty", type=positive, default=0.01, help="L2 of every probe (default %(default)s)")
    verb.add_argument("--splits", type=positive_int, default=4, help="in random halves, averaged (default %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Pool states, fit probes on them, write `probes.json` and print its table."""
    from skipit.theory.artefact import save_probes
    from skipit.theory.pooling import pool_states
    from skipit.theory.probes import probe_states
    from skipit.train.data.collate import Collator, batches
    from skipit.train.data.sources import load_model
    from skipit.train.display import loading, progress

    with loading("loading"):
        model, processor = load_model(arguments.model)
        rows = readable_rows(arguments, load_rows(arguments, arguments.samples), Collator(processor))
    with progress("probe", len(rows)) as advance:
        pooled = pool_states(model, batches(advance.over(rows), Collator(processor), arguments.batch_size))
    with loading("fitting probes"):
        probes = probe_states(pooled, **chosen(arguments, "penalty", "splits", "seed"))
    save_probes(probes, arguments.out, arguments.overwrite)
    print(probe_table(probes))
    print(f"{arguments.out}: probes.json")


def probe_table(probes: "Probes") -> str:
    """What a linear probe reads of the answer before and after each layer, one line per layer and modality."""
    from rich.console import Console
    from rich.table import Table

    from skipit.theory.pooling import SITES

    about = probes.about
    title = (
        f"{about['rows']} rows, {about['splits']} splits in halves, penalty {about['penalty']:g}, seed {about['seed']}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("layer", "states", "accuracy in", "out", "gap", "V-information in", "out (nats)", "gap"):
        table.add_column(name, justify="left" if name == "states" else "right")
    for layer in range(len(probes.gain)):
        for k, site in enumerate(SITES):
            if probes.rows[k] == 0:
                continue
            table.add_row(
                str(layer),
                "last token" if site == "last" else f"{site}, mean",
                *(f"{value:.1%}" for value in probes.accuracy[layer : layer + 2, k].tolist()),
                _with_error(probes.accuracy_gain[layer, k], probes.accuracy_gain_error[layer, k], 100, "+.1f"),
                *(f"{value:.3f}" for value in probes.information[layer : layer + 2, k].tolist()),
                _with_error(probes.gain[layer, k], probes.gain_error[layer, k], 1, "+.3f"),
            )
        table.add_section()
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    drawn = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    kept = "; ".join(
        f"{site}: {int(classes)} answers in {int(rows)} rows, H_V(Z) {float(entropy):.3f} nats"
        for site, classes, rows, entropy in zip(SITES, probes.classes, probes.rows, probes.entropy, strict=True)
        if rows > 0
    )
    return f"{drawn}\n{kept}.\nGaps are out minus in, with their standard error; accuracy in points."


def _with_error(value: "Tensor", error: "Tensor", scale: float, form: str) -> str:
    return f"{scale * float(value):{form}} ± {scale * float(error):{form[1:]}}"
